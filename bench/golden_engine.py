"""The engine's numbers for a golden file: for each algorithm that it has, the Config that the file asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from golden_files import Arrays, Golden
from golden_rules import reduction

from cxgrad_fast import Config, Learner, preset


def engine(file: Golden) -> Arrays | None:
    """What the engine computes for ``file``, by the file's keys; None where it has no such algorithm or network.

    Raises:
        InputError: a setting that the algorithm needs is missing or of the wrong type.
    """
    configure = _ALGORITHMS.get(file.family)
    config = configure(file) if configure else None
    return None if config is None else _by_learner(file, config)


def _by_learner(file: Golden, config: Config) -> Arrays:
    learner = Learner(config)
    learner.load_released({file.table[name]: tensor for name, tensor in file.parameters.items()})
    out = learner.meta_loss(file.episodes)
    parameters = learner.meta_parameters
    gradients = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    adapted = learner.adapt(file.episodes.support_x, file.episodes.support_y).state.fast
    return {
        "outer_loss": out.loss,
        "trace_loss": torch.cat([out.support_losses, out.query_losses[:, None]], 1),
        "query_logits": out.query_logits,
        **file.under("grad", dict(zip(parameters, gradients, strict=True))),
        **file.under("adapted", adapted),
    }


def _of_file(file: Golden, **inner: object) -> Config | None:
    """The Config of a file whose network is Conv-4 without convolution biases, which the engine does not have."""
    if file.text("backbone", "conv4") != "conv4" or "features.0.bias" in file.parameters:
        return None
    x, ways = file.episodes.support_x, file.whole("ways", default=len(file.parameters["head.bias"]))
    return preset(
        "released-mini-5w1s",
        {
            "task.ways": ways,
            "task.shots": max(1, x.shape[1] // ways),
            "task.queries": max(1, file.episodes.query_x.shape[1] // ways),
            "model.channels": x.shape[2],
            "model.image_size": x.shape[3],
            "model.filters": len(file.parameters["features.0.weight"]),
            "model.slope": file.number("leaky_relu_slope", default=0.0),
            "model.norm_eps": file.number("bn_eps", default=1e-5),
            "outer.reduction": reduction(file),
            "run.precision": "float64",
            "run.device": "cpu",
            "inner.steps": file.whole("steps"),
            "inner.learning_rate": file.number("alpha"),
            "inner.order": 1 + file.flag("second_order", default=file.family != "fomaml"),
            **{f"inner.{name}": value for name, value in inner.items()},
        },
    )


def _maml(file: Golden) -> Config | None:
    return _of_file(file, algorithm="maml")


def _cxgrad(file: Golden) -> Config | None:
    return _of_file(
        file,
        algorithm="cxgrad",
        context_dim=file.whole("context_dim"),
        context_learning_rate=file.number("beta"),
    )


_ALGORITHMS: dict[str, Callable[[Golden], Config | None]] = {"cxgrad": _cxgrad, "maml": _maml, "fomaml": _maml}
