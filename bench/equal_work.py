"""The equal-work check: no side gets a figure that does not compute the same meta-training step.

The judge is the oracle, ``cxgrad_fast/reference.py`` in float64, one task at a time. Two questions are asked:

- **On a small copy of the case, in float64**: loss to 1e-10, every gradient to 1e-8 (relative, tensor by tensor), and
  one whole step moves every parameter as Adam moves it by those gradients. Every mistake in the mathematics shows here,
  the scaler's gradients included.
- **On the very episodes that are timed, in the precision that is timed**: loss and gradients by group of parameters
  to the tolerance of that precision. Sides whose first step holds a long compilation are asked this question alone.

In float32 the scaled form knows single gradients dL/dnu badly (docs/math.md); the meta-gradients of the scaler, at
parameters moved off their initial values as here, it knows as well as all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from isolated import Host
from sides import COMPILING, Parameters, device_of
from torch import Tensor

from cxgrad_fast import Config, Episodes, Learner, reference

# by run.precision: loss, gradients by group of parameters, relative. float32: measured at most 4e-6 and 7e-4 over the
# 28x28 cases and all sides; an error of 1 % in a group is outside
TOLERANCE = {
    "float64": {"loss": 1e-10, "convolutions": 1e-8, "norms": 1e-8, "head": 1e-8, "scaler": 1e-7},
    "float32": {"loss": 1e-4, "convolutions": 5e-3, "norms": 5e-3, "head": 5e-3, "scaler": 5e-3},
}
STRICT_LOSS, STRICT_GRADIENT, STRICT_STEP = 1e-10, 1e-8, 1e-3  # the small copy; its step in units of the learning rate
ADAM_EPS = 1e-8


@dataclass(frozen=True)
class Case:
    """One config with the random episodes and meta-parameters that every side gets, in float64 on the CPU."""

    config: Config
    episodes: Episodes
    parameters: dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """The oracle's meta-loss and gradients."""

    loss: float
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the check found: errors by what was compared, and the first that was too large (empty: passed)."""

    errors: dict[str, float]
    failure: str = ""


def make_case(config: Config) -> Case:
    """Seeded uniform noise for images, shuffled labels, and initial meta-parameters moved off their special values."""
    g = torch.Generator().manual_seed(config.run.seed)
    task, model, tasks = config.task, config.model, config.outer.meta_batch

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        count = task.ways * per_class
        x = torch.rand(tasks, count, model.channels, model.image_size, model.image_size, generator=g)
        y = torch.arange(task.ways).repeat(per_class)
        return x.double(), torch.stack([y[torch.randperm(count, generator=g)] for _ in range(tasks)])

    episodes = Episodes(*part(task.shots), *part(task.queries))
    plain = {"run.device": "cpu", "run.precision": "float64", "run.backend": "reference", "run.compile": False}
    start = Learner(config.override(plain)).meta_parameters
    parameters = {
        name: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=g) for name, tensor in start.items()
    }
    return Case(config, episodes, parameters)


def small_copy(config: Config) -> Config:
    """The same algorithm, orders, slopes and norms on few small images, in float64; an odd image size."""
    model = config.model
    return config.override(
        {
            "model.image_size": min(model.image_size, 21),
            "model.filters": model.norm_groups if model.norm == "group" else min(model.filters, 4),
            "task.shots": min(config.task.shots, 2),
            "task.queries": min(config.task.queries, 3),
            "inner.steps": min(config.inner.steps, 2),
            "outer.meta_batch": min(config.outer.meta_batch, 2),
            "run.precision": "float64",
        }
    )


def truth(case: Case) -> Truth:
    """By the oracle in float64 on the case's device, a task at a time so that one graph exists at a time."""
    device, tasks = device_of(case.config), len(case.episodes)
    leaves = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in case.parameters.items()}
    share = 1 / tasks if case.config.outer.reduction == "mean" else 1.0
    total, gradients = 0.0, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for task in range(tasks):
        episode = case.episodes[task : task + 1].to(device)
        loss = share * reference.meta_loss(case.config, leaves, episode).loss
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        total += float(loss.detach())
        for gradient, part in zip(gradients.values(), found, strict=True):
            gradient += part
    return Truth(total, {name: gradient.cpu() for name, gradient in gradients.items()})


def check_small(host: Host, case: Case, expected: Truth) -> Verdict:
    """The first question; builds the side on the small copy."""
    host.build(case.config, case.episodes, case.parameters)
    loss, found = host.gradients()
    errors = {"float64 loss": _scalar_error(loss, expected.loss)}
    worst = {name: _error([found[name]], [expected.gradients[name]]) for name in expected.gradients}
    name = max(worst, key=lambda name: worst[name])
    errors["float64 gradient"] = worst[name]
    host.step()
    errors["float64 step"] = _step_error(host.parameters(), case, expected.gradients)
    bounds = {"float64 loss": STRICT_LOSS, "float64 gradient": STRICT_GRADIENT, "float64 step": STRICT_STEP}
    return _verdict(errors, bounds, {"float64 gradient": f" of {name}"})


def check_timed(host: Host, case: Case, expected: Truth) -> Verdict:
    """The second question, of a side that was built on the case itself and holds its parameters."""
    loss, found = host.gradients()
    precision = case.config.run.precision
    errors = {"loss": _scalar_error(loss, expected.loss)}
    for group in dict.fromkeys(map(group_of, expected.gradients)):
        names = [name for name in expected.gradients if group_of(name) == group]
        errors[group] = _error([found[n] for n in names], [expected.gradients[n] for n in names])
    prefixed = {f"{precision} {what}": error for what, error in errors.items()}
    return _verdict(prefixed, {f"{precision} {what}": bound for what, bound in TOLERANCE[precision].items()}, {})


def needs_small(name: str) -> bool:
    """Whether a side is asked the first question."""
    return name not in COMPILING


def _verdict(errors: dict[str, float], bounds: Mapping[str, float], where: Mapping[str, str]) -> Verdict:
    for what, error in errors.items():
        if not error <= bounds[what]:
            allowed = f"off by {error:.1e}, allowed {bounds[what]:.0e}"
            return Verdict(errors, f"not the same work: {what}{where.get(what, '')} is {allowed}")
    return Verdict(errors)


def group_of(name: str) -> str:
    """Convolutions, norms, head or scaler."""
    first = name.partition(".")[0]
    return "norms" if ".norm." in name else "convolutions" if first == "features" else first


def _scalar_error(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what was expected; NaN stays NaN, which no bound allows."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def _step_error(after: Parameters, case: Case, gradients: Mapping[str, Tensor]) -> float:
    """Largest deviation from Adam's first update, in units of the learning rate."""
    rate = case.config.outer.learning_rate
    worst = 0.0
    for name, start in case.parameters.items():
        moved = start - rate * gradients[name] / (gradients[name].abs() + ADAM_EPS)
        deviation = float((after[name] - moved).abs().max()) / rate
        worst = deviation if not deviation <= worst else worst
    return worst
