"""The oracle's numbers for a golden file: for each algorithm, the rule and the settings that its file asks for.

Results go by the file's own keys, so that each of its arrays finds its counterpart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from golden_files import Arrays, Golden
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.reference.alfa import alfa
from cxgrad_fast.reference.anil import anil
from cxgrad_fast.reference.boil import boil
from cxgrad_fast.reference.cavia import cavia
from cxgrad_fast.reference.cxgrad import cxgrad
from cxgrad_fast.reference.l2f import l2f
from cxgrad_fast.reference.maml import maml
from cxgrad_fast.reference.mamlpp import mamlpp, step_weights
from cxgrad_fast.reference.matchingnet import matchingnet
from cxgrad_fast.reference.metasgd import metasgd
from cxgrad_fast.reference.modgrad import modgrad
from cxgrad_fast.reference.network import Statistics, running_statistics
from cxgrad_fast.reference.protonet import protonet
from cxgrad_fast.reference.relationnet import relationnet
from cxgrad_fast.reference.reptile import meta_step
from cxgrad_fast.reference.tasks import Rule, over_tasks

Settings = dict[str, Any]
CLOSERLOOK_PADDING_UNDER = 10  # CloserLookFewShot pads the relation module's convolutions where its maps are smaller


def oracle(file: Golden) -> Arrays:
    """What the oracle computes for ``file``, by the file's keys.

    Raises:
        InputError: a setting that the algorithm needs is missing or of the wrong type.
    """
    return _ALGORITHMS[file.family](file)


def reduction(file: Golden) -> str:
    """Of the tasks' losses; some files say more about the mean."""
    return "sum" if file.text("outer_reduction", "mean").startswith("sum") else "mean"


def network(file: Golden) -> Settings:
    """Keywords of the oracle's features: Conv-4, or the ALFA program's ResNet-12."""
    common = {"slope": file.number("leaky_relu_slope", default=0.0), "eps": file.number("bn_eps", default=1e-5)}
    if file.text("backbone", "conv4") == "resnet12":
        return common | {"backbone": "resnet12", "pool_last": False, "pool_padding": (0, 0, 1, 1)}
    return common


def by_gradients(file: Golden) -> Settings:
    """Settings that all rules with gradients in their inner loop have."""
    return {"second_order": file.flag("second_order", default=file.family != "fomaml"), **network(file)}


def run(file: Golden, rule: Rule, **settings: Any) -> tuple[Arrays, dict[str, Any]]:
    """The arrays that files of all algorithms share, and whatever else the rule returned."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in file.parameters.items()}
    found = over_tasks(rule, leaves, file.episodes, reduction=reduction(file), **settings)
    loss = found.pop("loss")
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    arrays = {"outer_loss": loss, "trace_loss": found.pop("losses")}
    arrays |= file.under("grad", dict(zip(leaves, gradients, strict=True)))
    arrays |= file.under("adapted", found.pop("adapted", {}))
    arrays |= {key: value for key, value in found.items() if isinstance(value, Tensor)}
    return arrays, found


def _maml(file: Golden) -> Arrays:
    settings = by_gradients(file) | {"steps": file.whole("steps"), "learning_rate": file.number("alpha")}
    return run(file, maml, **settings)[0]


def _cxgrad(file: Golden) -> Arrays:
    settings = by_gradients(file) | {"steps": file.whole("steps"), "learning_rate": file.number("alpha")}
    context = {"context_dim": file.whole("context_dim"), "context_learning_rate": file.number("beta")}
    return run(file, cxgrad, **settings, **context)[0]


def _anil(file: Golden) -> Arrays:
    settings = by_gradients(file) | {"steps": file.whole("steps"), "learning_rate": file.number("alpha")}
    return run(file, anil, joint=joint(file, file.algorithm == "anil_joint"), **settings)[0]


def _boil(file: Golden) -> Arrays:
    rate = file.number("extractor_step_size", "alpha")
    head_rate = file.number("classifier_step_size", default=0.0)
    settings = by_gradients(file) | {"steps": file.whole("steps", default=1)}
    return run(file, boil, learning_rate=rate, head_learning_rate=head_rate, **settings)[0]


def _metasgd(file: Golden) -> Arrays:
    return run(file, metasgd, steps=file.whole("steps"), **by_gradients(file))[0]


def _mamlpp(file: Golden) -> Arrays:
    steps, epoch, epochs = file.whole("steps"), file.whole("epoch"), file.whole("msl_epochs", default=15)
    weights = step_weights(steps, epoch, epochs)
    applied = file.flag("multi_step_loss", default=epoch < epochs)
    arrays, found = run(file, mamlpp, steps=steps, query_weights=weights if applied else None, **by_gradients(file))
    arrays["msl_weights"] = torch.tensor(weights, dtype=torch.float64)
    return arrays | file.under("after", _running_rows(file, found["passes"]))


def _running_rows(file: Golden, tasks: list[list[list[dict[str, Statistics]]]]) -> Arrays:
    """MAML++'s running statistics after all passes: row s of ``[steps, C]`` is moved by the passes of step s."""
    momentum = file.number("bn_momentum", default=0.1)
    layers = [name.removesuffix(".norm.running_mean") for name in file.constants if name.endswith(".running_mean")]
    start = {layer: [file.constants[f"{layer}.norm.running_{part}"] for part in ("mean", "var")] for layer in layers}
    rows = []
    for step in range(len(tasks[0])):
        passes = [found for task in tasks for found in task[step]]
        row = {layer: (mean[step], variance[step]) for layer, (mean, variance) in start.items()}
        rows.append(_by_name(running_statistics(row, passes, momentum)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _by_name(statistics: Mapping[str, Statistics]) -> Arrays:
    return {
        f"{layer}.norm.running_{part}": value
        for layer, pair in statistics.items()
        for part, value in zip(("mean", "var"), pair, strict=True)
    }


def _l2f(file: Golden) -> Arrays:
    settings = by_gradients(file) | {"steps": file.whole("steps"), "learning_rate": file.number("alpha")}
    in_graph = file.flag("embedding_in_graph", default=file.algorithm == "l2f_alfa")
    return run(file, l2f, embedding_in_graph=in_graph, **settings)[0]


def _alfa(file: Golden) -> Arrays:
    in_graph = file.flag("conditioning_gradient_in_graph", default=False)
    settings = by_gradients(file) | {"steps": file.whole("steps")}
    return run(file, alfa, conditioning_in_graph=in_graph, **settings)[0]


def _cavia(file: Golden) -> Arrays:
    context_in = file.flags("context_in", 5)
    settings = by_gradients(file) | {"steps": file.whole("steps"), "context_dim": file.whole("context_dim")}
    rate = file.number("lr_inner", "alpha")
    return run(file, cavia, context_in=context_in, context_learning_rate=rate, **settings)[0]


def _modgrad(file: Golden) -> Arrays:
    ours = released.ours(file.table)
    layers = [ours[name].removesuffix(".weight") for name in file.texts("adapted_names") if name.endswith(".weight")]
    settings = by_gradients(file) | {"context_dim": file.whole("context_dim"), "layers": layers}
    settings |= {"rounds": 2 * file.whole("inner_step"), "mixtures": file.whole("num_mix", default=5)}
    return run(file, modgrad, learning_rate=file.number("alpha"), **settings)[0]


def reptile_network(file: Golden) -> Settings:
    """As :func:`network`, of the released Reptile's Conv-4."""
    is_flat = file.text("flat_order", "height, width, channel").startswith("height")
    shape = {"pool_ceil": "ceil" in file.text("pool", "ceil"), "channels_last": is_flat}
    return network(file) | {"eps": file.number("bn_eps", default=1e-3)} | shape


def _reptile(file: Golden) -> Arrays:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in file.parameters.items()}
    found = meta_step(
        leaves,
        file.episodes.support_x,
        file.episodes.support_y,
        file.batches,
        {name: torch.zeros_like(tensor) for name, tensor in file.parameters.items()},
        0,
        meta_rate=file.number("meta_step"),
        learning_rate=file.number("inner_lr", "alpha"),
        beta2=file.number("adam_beta2", default=0.999),
        adam_eps=file.number("adam_eps", default=1e-8),
        **reptile_network(file),
    )
    moved = {name: tensor - file.parameters[name] for name, tensor in found["parameters"].items()}
    return {
        "trace_loss": found["losses"],
        "adam_steps_after": torch.tensor(float(found["count"])),
        **file.under("adapted", found["adapted"]),
        **file.under("param_after", found["parameters"]),
        **file.under("meta_delta", moved),
        **file.under("adam_v_after", found["moments"]),
    }


def joint(file: Golden, usual: bool) -> bool:
    """Whether support and query are normalised together."""
    return "together" in file.text("batch_statistics", "together" if usual else "apart")


def ways(file: Golden) -> int:
    """The classes of a task."""
    return file.whole("ways", default=int(file.episodes.support_y.max()) + 1)


def _metric(file: Golden, rule: Rule, **settings: Any) -> Arrays:
    """The tasks in training mode, then scored again under the running statistics that this left."""
    settings |= {"ways": ways(file), **network(file)}
    arrays, found = run(file, rule, **settings)
    passes = [each for task in found["passes"] for each in task]
    widths = {layer: mean for each in passes for layer, (mean, _) in each.items()}
    start = {layer: (torch.zeros_like(mean), torch.ones_like(mean)) for layer, mean in widths.items()}
    running: dict[str, Statistics] = {}
    for group, key, usual in (("features", "bn_momentum", 0.1), ("relation", "relation_bn_momentum", 1.0)):
        own = [{layer: pair for layer, pair in each.items() if layer.startswith(group)} for each in passes]
        first = {layer: pair for layer, pair in start.items() if layer.startswith(group)}
        running |= running_statistics(first, own, file.number(key, default=usual))
    with torch.no_grad():
        scored = over_tasks(rule, file.parameters, file.episodes, given=running, **settings)
    return arrays | file.under("buffer_after", _by_name(running)) | {"eval_query_logits": scored["query_logits"]}


def protonet_form(file: Golden) -> Settings:
    """What files of ProtoNet say about its form, by the names of the settings."""
    easyfsl = file.table is released.EASYFSL
    usual = "cosine" if file.algorithm.endswith("cosine") else "euclidean" if easyfsl else "squared"
    said = file.text("distance", usual)
    distance = "cosine" if "cos" in said else "squared" if said.startswith("squared") else "euclidean"
    return {"distance": distance, "joint": joint(file, not easyfsl)}


def _protonet(file: Golden) -> Arrays:
    return _metric(file, protonet, **protonet_form(file))


def matchingnet_form(file: Golden) -> Settings:
    """What files of MatchingNet say about its form, by the names of the settings."""
    easyfsl = file.table is released.EASYFSL
    full_context = file.flag("fce", default="query_lstm.weight_ih" in file.parameters)
    attention = "support_cosine" if easyfsl else "cosine"
    return {"full_context": full_context, "attention": attention, "joint": joint(file, not easyfsl)}


def _matchingnet(file: Golden) -> Arrays:
    return _metric(file, matchingnet, **matchingnet_form(file))


def relationnet_form(file: Golden) -> Settings:
    """What files of RelationNet say about its form."""
    closerlook = file.table is released.CLOSERLOOK_RELATIONNET
    small = closerlook and file.episodes.support_x.shape[3] // 4 - 2 < CLOSERLOOK_PADDING_UNDER
    return {
        "shots_rule": file.text("shots_rule", "mean" if closerlook else "sum"),
        "relation_padding": file.whole("relation_padding", default=int(small)),
        "loss_type": file.text("loss_type", "softmax" if file.algorithm.endswith("softmax") else "mse"),
        "joint": joint(file, closerlook),
    }


def _relationnet(file: Golden) -> Arrays:
    return _metric(file, relationnet, **relationnet_form(file))


_ALGORITHMS: dict[str, Callable[[Golden], Arrays]] = {
    "cxgrad": _cxgrad,
    "maml": _maml,
    "fomaml": _maml,
    "anil": _anil,
    "boil": _boil,
    "metasgd": _metasgd,
    "mamlpp": _mamlpp,
    "cavia": _cavia,
    "l2f": _l2f,
    "alfa": _alfa,
    "modgrad": _modgrad,
    "reptile": _reptile,
    "protonet": _protonet,
    "matchingnet": _matchingnet,
    "relationnet": _relationnet,
}
