"""The engine's numbers for a golden file: for each algorithm that it has, the Config that the file asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_files import Arrays, Golden
from golden_rules import (
    joint,
    matchingnet_form,
    network,
    protonet_form,
    reduction,
    relationnet_form,
    reptile_network,
    ways,
)

from cxgrad_fast import Config, Episodes, Learner, preset, released
from cxgrad_fast.engine import MetaLoss

EPOCH = 500  # iterations, in the released MAML++
WITHOUT_INNER_LOOP = ("protonet", "matchingnet", "relationnet")


def engine(file: Golden) -> Arrays | None:
    """What the engine computes for ``file``, by the file's keys; None where it has no such algorithm or network.

    Raises:
        InputError: a setting that the algorithm needs is missing or of the wrong type.
    """
    config = config_for(file)
    if config is None:
        return None
    return _by_meta_step(file, config) if file.family == "reptile" else _by_learner(file, config)


def config_for(file: Golden) -> Config | None:
    """The Config that ``file`` asks for; None where the engine has no such algorithm or network.

    Raises:
        InputError: as :func:`engine`.
    """
    configure = _ALGORITHMS.get(file.family)
    return configure(file) if configure else None


def _by_learner(file: Golden, config: Config) -> Arrays:
    learner = Learner(config)
    iteration = file.whole("epoch", default=0) * EPOCH if file.family == "mamlpp" else None
    learner.load_released({file.table[name]: tensor for name, tensor in file.parameters.items()})
    out = learner.meta_loss(file.episodes, iteration)
    parameters = learner.meta_parameters
    gradients = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    scored = _scored(file, learner) if file.family in WITHOUT_INNER_LOOP else {}
    adapted = {}  # where the query images are needed to adapt, there is nothing to look at before they come
    if not learner.algorithm.joint:
        adapted = learner.adapt(file.episodes.support_x, file.episodes.support_y).state.fast
    return {
        "outer_loss": out.loss,
        "trace_loss": _in_order(out),
        "query_logits": out.query_logits,
        **file.under("grad", dict(zip(parameters, gradients, strict=True))),
        **file.under("adapted", adapted),
        **scored,
    }


def _scored(file: Golden, learner: Learner) -> Arrays:
    """The running statistics after a meta-step a task, as the programs train, and the logits under them."""
    parameters = learner.state_dict()["parameters"]
    for task in range(len(file.episodes)):
        learner.meta_step(file.episodes[task : task + 1])
        learner.load_state_dict(learner.state_dict() | {"parameters": parameters})  # as before the step
    running = {
        f"{layer}.norm.running_{part}": value
        for layer, pair in learner.running_statistics.items()
        for part, value in zip(("mean", "var"), pair, strict=True)
    }
    logits = learner.predict(file.episodes, "running")
    return {"eval_query_logits": logits, **file.under("buffer_after", running)}


def _by_meta_step(file: Golden, config: Config) -> Arrays:
    """Reptile's: a whole meta-step, and before it the tasks one by one, each from what the one before it left."""
    learner, sets = Learner(config), file.episodes
    parameters = {name: torch.zeros_like(tensor) for name, tensor in learner.meta_parameters.items()}
    learner.load_released({file.table[name]: tensor for name, tensor in (parameters | file.parameters).items()})
    start, adapted = learner.state_dict(), []
    # the query set, which the file lacks, is scored for the record alone
    episodes = Episodes(sets.support_x, sets.support_y, sets.support_x, sets.support_y, batches=file.batches)
    for task in range(len(episodes)):
        one = episodes[task : task + 1]
        adapted.append(learner.adapt(one.support_x, one.support_y, batches=one.batches).state.fast)
        learner.meta_step(one)
        left = learner.state_dict()["parameters"]
        learner.load_state_dict(start | {"parameters": left | file.parameters})
    learner.load_state_dict(start)
    out = learner.meta_step(episodes)
    after = learner.state_dict()["parameters"]
    return {
        "trace_loss": out.support_losses,
        "adam_steps_after": after["count"],
        **file.under("adapted", {name: torch.cat([task[name] for task in adapted]) for name in file.parameters}),
        **file.under("param_after", {name: after[name] for name in file.parameters}),
        **file.under("meta_delta", {name: after[name] - tensor for name, tensor in file.parameters.items()}),
        **file.under("adam_v_after", {name: after[f"moments.{name}"] for name in file.parameters}),
    }


def _in_order(out: MetaLoss) -> torch.Tensor:
    """The losses of all passes; where the query is asked after every step, support and query take turns."""
    support, asked = out.support_losses, out.asked_losses
    if asked.shape[1] == 1:
        return torch.cat([support, asked], 1)
    return torch.stack([support, asked], 2).flatten(1)


def _of_file(file: Golden, changes: dict[str, object] | None = None, **inner: object) -> Config | None:
    """The Config of a file whose network is Conv-4 or ResNet-12."""
    if file.family not in WITHOUT_INNER_LOOP:
        inner["order"] = 1 + file.flag("second_order", default=file.family != "fomaml")
    model = _network(file)
    if model is None:
        return None
    x = file.episodes.support_x
    classes = ways(file) if file.family in WITHOUT_INNER_LOOP else len(file.parameters["head.bias"])
    return preset(
        "released-mini-5w1s",
        {
            "task.ways": classes,
            "task.shots": max(1, x.shape[1] // classes),
            "task.queries": max(1, file.episodes.query_x.shape[1] // classes),
            "model.channels": x.shape[2],
            "model.image_size": x.shape[3],
            **{f"model.{name}": value for name, value in model.items()},
            "outer.reduction": reduction(file),
            "run.precision": "float64",
            "run.device": "cpu",
            **{f"inner.{name}": value for name, value in inner.items()},
            **(changes or {}),
        },
    )


def _network(file: Golden) -> dict[str, object] | None:
    """Settings of the file's network, its widths from the parameters; None where the engine has no such backbone."""
    said = network(file)
    backbone = file.text("backbone", "conv4")
    first = {"conv4": "features.0", "resnet12": "features.0.0"}.get(backbone)
    if first is None:
        return None
    model = {"backbone": backbone, "conv_bias": f"{first}.bias" in file.parameters}
    model |= {"slope": said["slope"], "norm_eps": said["eps"]}
    if backbone == "conv4":
        return model | {"filters": len(file.parameters[f"{first}.weight"])}
    filters = [len(file.parameters[f"features.{block}.0.weight"]) for block in released.BLOCKS]
    pools = {name: said[name] for name in ("pool_last", "pool_padding")}
    return model | pools | {"filters": filters[0], "block_filters": filters}


def _gradient_descent(file: Golden) -> dict[str, object]:
    return {"algorithm": file.family, "steps": file.whole("steps"), "learning_rate": file.number("alpha")}


def _maml(file: Golden) -> Config | None:
    return _of_file(file, **_gradient_descent(file) | {"algorithm": "maml"})  # the order decides


def _cxgrad(file: Golden) -> Config | None:
    context = {"context_dim": file.whole("context_dim"), "context_learning_rate": file.number("beta")}
    return _of_file(file, **_gradient_descent(file), **context)


def _anil(file: Golden) -> Config | None:
    return _of_file(file, **_gradient_descent(file), joint=joint(file, file.algorithm == "anil_joint"))


def _boil(file: Golden) -> Config | None:
    return _of_file(
        file,
        algorithm="boil",
        steps=file.whole("steps", default=1),
        learning_rate=file.number("extractor_step_size", "alpha"),
        head_learning_rate=file.number("classifier_step_size", default=0.0),
    )


def _metasgd(file: Golden) -> Config | None:
    return _of_file(file, algorithm="metasgd", steps=file.whole("steps"))


def _l2f(file: Golden) -> Config | None:
    in_graph = file.flag("embedding_in_graph", default=file.algorithm == "l2f_alfa")
    return _of_file(file, **_gradient_descent(file), embedding_in_graph=in_graph)


def _alfa(file: Golden) -> Config | None:
    if file.flag("conditioning_gradient_in_graph", default=False):
        return None
    random_init = any(name.startswith("decay_elements.") for name in file.parameters)
    return _of_file(file, algorithm="alfa", steps=file.whole("steps"), random_init=random_init)


def _cavia(file: Golden) -> Config | None:
    *blocks, head = file.flags("context_in", 5)
    return _of_file(
        file,
        algorithm="cavia",
        steps=file.whole("steps"),
        learning_rate=file.number("lr_inner", "alpha"),
        context_dim=file.whole("context_dim"),
        layers=[block for block, has_context in enumerate(blocks) if has_context],
        hidden=any(name.startswith("film.") and name.split(".")[2] == "2" for name in file.parameters),
        context_at_head=head,
    )


def _mamlpp(file: Golden) -> Config | None:
    epoch, epochs = file.whole("epoch"), file.whole("msl_epochs", default=15)
    is_asked = file.flag("multi_step_loss", default=epoch < epochs)
    return _of_file(
        file,
        algorithm="mamlpp",
        steps=file.whole("steps"),
        multi_step_iterations=epochs * EPOCH if is_asked else 0,
        multi_step_epoch=EPOCH,
    )


def _modgrad(file: Golden) -> Config | None:
    ours = released.ours(file.table)
    names = [ours[name] for name in file.texts("adapted_names") if name.endswith(".weight")]
    return _of_file(
        file,
        algorithm="modgrad",
        steps=2 * file.whole("inner_step"),
        learning_rate=file.number("alpha"),
        context_dim=file.whole("context_dim"),
        mixtures=file.whole("num_mix", default=5),
        layers=[int(name.split(".")[1]) for name in names],
    )


def _protonet(file: Golden) -> Config | None:
    return _metric(file, **protonet_form(file))


def _relationnet(file: Golden) -> Config | None:
    form = relationnet_form(file)
    form["loss"] = form.pop("loss_type")
    return _metric(
        file,
        relation_dim=len(file.parameters["relation.hidden.bias"]),
        relation_momentum=file.number("relation_bn_momentum", default=1.0),
        **form,
    )


def _matchingnet(file: Golden) -> Config | None:
    return _metric(file, **matchingnet_form(file))


def _metric(file: Golden, **inner: object) -> Config | None:
    return _of_file(file, algorithm=file.family, statistics_momentum=file.number("bn_momentum", default=0.1), **inner)


def _reptile(file: Golden) -> Config | None:
    network = reptile_network(file)
    changes = {f"model.{name}": network[name] for name in ("pool_ceil", "channels_last")}
    changes |= {"model.norm_eps": network["eps"], "outer.optimizer": "sgd"}
    changes |= {"outer.learning_rate": file.number("meta_step"), "inner.order": 1}
    return _of_file(
        file,
        changes,
        algorithm="reptile",
        steps=file.batches.shape[1],
        batch=file.batches.shape[2],
        learning_rate=file.number("inner_lr", "alpha"),
        beta2=file.number("adam_beta2", default=0.999),
        adam_eps=file.number("adam_eps", default=1e-8),
    )


_ALGORITHMS: dict[str, Callable[[Golden], Config | None]] = {
    "alfa": _alfa,
    "anil": _anil,
    "boil": _boil,
    "cavia": _cavia,
    "cxgrad": _cxgrad,
    "fomaml": _maml,
    "l2f": _l2f,
    "maml": _maml,
    "mamlpp": _mamlpp,
    "matchingnet": _matchingnet,
    "metasgd": _metasgd,
    "modgrad": _modgrad,
    "protonet": _protonet,
    "relationnet": _relationnet,
    "reptile": _reptile,
}
