"""MAML, FOMAML, ANIL, BOIL and MAML++ by ``parallel-metalearn`` 0.5.6: its vmap over tasks, or its loop (-sequential).

The network is written with its layers, as its own CNN is. Equal work, with what it takes:

- MAML and ANIL: the adapted tensors are named one by one, as norms are not adapted here. Under ANIL it computes the
  features again in every inner step; the gradients are the same.
- MAML++: its rates a tensor and step, and its ``num_step`` to choose the norms of a step, which its own BatchNorm does
  not have (it has statistics a step). Compared after the multi-step phase, as all sides are: in that phase it divides
  the query losses by their weights (``_update_meta_loss``) where MAML++ multiplies, which is other work.
- One task after the other, the loss that it tells, and nothing else, is divided by the number of tasks twice; here it
  is told as it should be.
- Not with it: a sum over tasks (it averages), clipping, Meta-SGD (its rates are one a tensor, not one an element).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from side import Parameters, Unavailable, copies, device_of, dtype_of, fill
from torch import Tensor, nn

from cxgrad_fast import Config, Episodes
from peers import DEPTH, load_package, require_conv4

ALGORITHMS = ("maml", "fomaml", "anil", "boil", "mamlpp")
RATES = "rates."


def build(config: Config, episodes: Episodes, parameters: Parameters, backend: str) -> ParallelMetaLearn:
    """The side; Unavailable says why not. ``backend``: the library's, ``vmap`` or ``sequential``."""
    require_conv4(config)
    outer, inner = config.outer, config.inner
    if outer.reduction != "mean":
        raise Unavailable("averages over tasks, outer.reduction = mean")
    if outer.clip_value or outer.clip_norm:
        raise Unavailable("does not clip")
    if inner.algorithm == "boil" and getattr(inner, "head_learning_rate", 0.0):
        raise Unavailable("has one rate for body and head")
    return ParallelMetaLearn(config, episodes, parameters, backend)


class ParallelMetaLearn:
    """As :class:`side.Side` says."""

    def __init__(self, config: Config, episodes: Episodes, parameters: Parameters, backend: str) -> None:
        algorithms, losses = load_package("metalearn.algorithms.MAML"), load_package("metalearn.loss")
        optimizers = load_package("metalearn.inner_optimizers.optimizers")
        wrappers = load_package("metalearn.model_wrappers.MAMLWrapper")
        device, dtype, inner = device_of(config), dtype_of(config), config.inner
        is_mamlpp = inner.algorithm == "mamlpp"
        steps = inner.steps if is_mamlpp else None
        body = _Backbone(config, load_package("metalearn.nn_models.basic_layers.BatchNormalization").BatchNorm, steps)
        head = _Head(parameters["head.weight"].shape[1], config.task.ways)
        adapted = {"anil": "ANIL", "boil": "BOIL"}.get(inner.algorithm) or _adapted(body)
        model = wrappers.MAML_Model(body, head, fast_weights_names=adapted).to(device, dtype)
        descent = optimizers.InnerSGD(
            model.get_fast_weights(),
            first_order=inner.order == 1,
            inner_lr=inner.learning_rate,
            max_inner_steps=inner.steps,
            per_layer=is_mamlpp,
            per_step=is_mamlpp,
            learn_lr=is_mamlpp,
        ).to(dtype=dtype)
        rate = torch.tensor(inner.learning_rate, dtype=torch.float64)
        fill(descent.lrs, dict.fromkeys(descent.lrs, rate))  # which it made in float32
        rule = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.outer.optimizer]
        self._maml = algorithms.MAML(
            model=model,
            optimizer=rule(model.parameters(), lr=config.outer.learning_rate),
            inner_optimizer=descent,
            support_loss_fn=losses.CrossEntropy(
                load_package("metalearn.loss.categorical_accuracy").CategoricalAccuracy()
            ),
            inner_steps=inner.steps,
            device=device,
            backend=backend,
        )
        self._leaves = _named(model)
        self._rates = {_ours(name): descent.lrs[f"lr_{name.replace('.', '_')}"] for name in _fast(model, is_mamlpp)}
        support_x, query_x = (x.to(device, dtype) for x in (episodes.support_x, episodes.query_x))
        support_y, query_y = ({"labels": y.to(device).long()} for y in (episodes.support_y, episodes.query_y))
        self._sets = (support_x, support_y, query_x, query_y)
        self._shared = len(episodes) if backend == "sequential" else 1
        self.load(parameters)

    def step(self) -> None:
        self._maml.step(iter([self._sets]), training=True)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        held, self._maml.optimizer = self._maml.optimizer, _Still(self._maml.optimizer)
        loss, _ = self._maml.step(iter([self._sets]), training=True)
        loss *= self._shared
        self._maml.optimizer = held
        found = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in self._all()}
        return loss, self._by_our_names(found, torch.zeros_like)

    def parameters(self) -> dict[str, Tensor]:
        return self._by_our_names(dict(self._all()), torch.clone)

    def load(self, parameters: Parameters) -> None:
        fill(self._leaves, parameters)
        self._unused = {name: tensor for name, tensor in parameters.items() if name.startswith(RATES)}
        fill(self._rates, {name: parameters[RATES + name][: len(leaf)] for name, leaf in self._rates.items()})
        self._maml.optimizer.state.clear()

    def _all(self) -> list[tuple[str, Tensor]]:
        return [*self._leaves.items(), *((RATES + name, leaf) for name, leaf in self._rates.items())]

    def _by_our_names(self, values: dict[str, Tensor], last: Any) -> dict[str, Tensor]:
        """With the entry behind the last step of each rate, which nothing uses and the library does not have."""
        found = copies(values)
        for name, tensor in self._unused.items():
            found[name] = torch.cat([found[name], last(tensor[-1:])])
        return found


class _Still:
    """An optimizer's place, held by what moves nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_grad = optimizer.zero_grad

    def step(self) -> None:
        pass


class _StepNorm(nn.Module):
    """The library's BatchNorm with a scale and a shift of every inner step."""

    def __init__(self, norm: nn.Module, channels: int, steps: int) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(steps, channels))
        self.bias = nn.Parameter(torch.zeros(steps, channels))

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        weight, bias = self.weight[how["num_step"]], self.bias[how["num_step"]]
        return self.norm(x, **how) * weight[:, None, None] + bias[:, None, None]


class _Backbone(nn.Module):
    """Conv-4 without its head, with the library's BatchNorm; ``steps``: with norms of each of so many steps."""

    def __init__(self, config: Config, norm: Any, steps: int | None) -> None:
        super().__init__()
        model = config.model
        inputs = [model.channels, *[model.filters] * (DEPTH - 1)]
        how = {"eps": model.norm_eps, "track_running_stats": False, "affine": steps is None}
        norms = [norm(model.filters, **how) for _ in inputs]
        if steps is not None:
            norms = [_StepNorm(each, model.filters, steps) for each in norms]
        self.conv = nn.ModuleList(nn.Conv2d(channels, model.filters, 3, padding=1, bias=False) for channels in inputs)
        self.norm = nn.ModuleList(norms)
        self.slope = model.slope

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = F.leaky_relu(F.max_pool2d(norm(conv(x), **how), 2), self.slope)
        return x


class _Head(nn.Linear):
    """A linear layer that takes the library's words."""

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        return super().forward(x)


def _adapted(body: nn.Module) -> list[str]:
    """The library's names of what MAML adapts here: convolutions and head."""
    convolutions = [f"backbone.{name}" for name, _ in body.named_parameters() if "norm." not in name]
    return [*convolutions, "head.weight", "head.bias"]


def _fast(model: Any, has_rates: bool) -> list[str]:
    return list(model.get_fast_weights()) if has_rates else []


def _ours(name: str) -> str:
    """Our name of a parameter: ``backbone.conv.0.weight`` is ``features.0.weight``."""
    parts = name.split(".")
    if parts[0] == "head":
        return name
    _, kind, layer, part = parts
    return f"features.{layer}.{part}" if kind == "conv" else f"features.{layer}.norm.{part}"


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {_ours(name): tensor for name, tensor in model.named_parameters()}
