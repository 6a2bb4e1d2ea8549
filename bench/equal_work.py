"""The equal-work check: no side gets a figure that does not compute the same meta-training step.

The judge is the oracle, ``cxgrad_fast/reference/`` in float64, one task at a time. Three questions are asked:

- **On a small copy of the case, in float64**: loss to 1e-10, every gradient to 1e-8 (relative, tensor by tensor), and
  one whole step moves every parameter as the optimizer moves it by those gradients. Every mistake in the mathematics
  shows here, those in the algorithm's own parameters included.
- **On small copies, in the precision that is timed**: loss and gradients by group of parameters to
  :data:`TOLERANCE`, on one of :data:`ATTEMPTS` copies at least. A right program misses some: where rounding turns the
  choice of a pooling window, the gradient jumps, and the inner steps amplify it. A wrong one misses all.
- **On the very episodes that are timed, in the precision that is timed**: the same to :data:`TIMED_TOLERANCE`, which
  leaves room for the turned choices among a million. The meta-parameters are calm (:func:`make_case`): at usual ones,
  random images make five inner steps chaotic, and float32 then knows the gradient at 84x84 to 10 to 80 % only.

Sides whose first step holds a long compilation are asked the third question alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from isolated import Host
from side import Parameters, device_of
from sides import COMPILING
from torch import Tensor

from cxgrad_fast import Config, Episodes, Learner, reference
from cxgrad_fast.algorithms import build_algorithm
from cxgrad_fast.minibatches import draw_batches
from cxgrad_fast.models import build_backbone

# by run.precision, relative. float32 on small copies: measured 1e-7 to 2e-6 and 1e-6 to 7e-4 where no choice turned; an
# error of 1 % in a group is outside
TOLERANCE = {
    "float64": {"loss": 1e-10, "convolutions": 1e-8, "norms": 1e-8, "head": 1e-8, "own": 1e-7},
    "float32": {"loss": 1e-4, "convolutions": 5e-3, "norms": 5e-3, "head": 5e-3, "own": 5e-3},
}
# float32: measured at most 2e-4, 6e-2, 6e-2, 8e-3 and 4e-3 over 20 cases of 28x28 and 84x84, engine and loop
TIMED_TOLERANCE = {
    "float64": {"loss": 1e-8, "convolutions": 1e-6, "norms": 1e-6, "head": 1e-6, "own": 1e-5},
    "float32": {"loss": 1e-3, "convolutions": 0.2, "norms": 0.2, "head": 0.05, "own": 0.05},
    # measured at most 2e-3, 0.2, 0.18, 0.1 and 0.5, six cases of 28x28 and one of 84x84: what bfloat16 costs
    "bfloat16": {"loss": 1e-2, "convolutions": 0.4, "norms": 0.4, "head": 0.2, "own": 0.8},
}
STRICT_LOSS, STRICT_GRADIENT, STRICT_STEP = 1e-10, 1e-8, 1e-3  # the small copy; its step in units of the learning rate
VANISHING = 1e-12  # a gradient whose norm is a smaller part of the largest one is rounding
ATTEMPTS = 5
ADAM_EPS = 1e-8
SCALER_BIAS = "scaler.2.bias"
CALM_NORM = 10.0  # of a convolution's weight: batch norm makes its effective learning rate proportional to 1/norm^2


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


def make_case(config: Config, calm: bool = False) -> Case:
    """Seeded uniform noise for images, shuffled labels, and initial meta-parameters moved off their special values.

    Args:
        config: of the case.
        calm: move them less, and make the convolutions' weights long, so that inner steps turn them little and rounding
            is not amplified.
    """
    g = torch.Generator().manual_seed(config.run.seed)
    task, model, tasks = config.task.of_training(), config.model, config.outer.meta_batch

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        count = task.ways * per_class
        x = torch.rand(tasks, count, model.channels, model.image_size, model.image_size, generator=g)
        y = torch.arange(task.ways).repeat(per_class)
        return x.double(), torch.stack([y[torch.randperm(count, generator=g)] for _ in range(tasks)])

    episodes = Episodes(*part(task.shots), *part(task.queries), batches=_batches(config), ways=task.ways)
    plain = {"run.device": "cpu", "run.precision": "float64", "run.backend": "reference", "run.compile": False}
    start = Learner(config.override(plain)).meta_parameters

    def moved(tensor: Tensor) -> Tensor:
        size = 1.0
        if calm:  # a constant by a part of itself: a learning rate stays one
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            size = spread if spread > 1e-6 else float(tensor.abs().mean()) or 1.0
        return tensor + 0.1 * size * torch.randn(tensor.shape, generator=g)

    parameters = {name: moved(tensor.detach()) for name, tensor in start.items()}
    parameters |= {name: tensor.abs() for name, tensor in parameters.items() if is_carried(name)}
    if calm:
        for name, tensor in parameters.items():
            if group_of(name) == "convolutions" and tensor.dim() == 4:
                tensor *= CALM_NORM / tensor.norm()
            if name == SCALER_BIAS:  # gamma, the norm after scaling, is its softplus
                tensor += CALM_NORM
    return Case(config, episodes, parameters)


def _batches(config: Config) -> Tensor | None:
    """What the inner steps of each task take from the support set, where the algorithm draws minibatches."""
    size, images = config.inner.minibatch(training=True), config.task.ways * config.task.shots
    if size is None:
        return None
    tasks = range(config.outer.meta_batch)
    drawn = [draw_batches((config.run.seed, task, 1), images, config.inner.steps, size) for task in tasks]
    return torch.from_numpy(np.stack(drawn))


def small_copy(config: Config, precision: str = "float64", seed: int = 0) -> Config:
    """The same algorithm, orders, slopes and norms on few small images; an odd image size."""
    model = config.model
    fewer = {"inner.steps": 2} if config.inner.steps > 2 else {}
    return config.override(
        fewer
        | {
            "model.image_size": min(model.image_size, max(21, config.inner.least_size(model))),
            "model.filters": model.norm_groups if model.norm == "group" else min(model.filters, 4),
            "task.shots": min(config.task.shots, 2),
            "task.queries": min(config.task.queries, 3),
            "task.train_shots": min(config.task.train_shots, 2),
            "task.train_queries": min(config.task.train_queries, 3),
            "outer.meta_batch": min(config.outer.meta_batch, 2),
            "run.precision": precision,
            "run.seed": seed,
        }
    )


def small_copies(config: Config) -> Iterator[tuple[Case, Truth]]:
    """Those of the second question."""
    for seed in range(ATTEMPTS):
        case = make_case(small_copy(config, config.run.precision, seed))
        yield case, truth(case)


def truth(case: Case) -> Truth:
    """By the oracle in float64 on the case's device, a task at a time so that one graph exists at a time.

    All tasks together where a task needs what the one before it left.
    """
    device, tasks = device_of(case.config), len(case.episodes)
    leaves = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in case.parameters.items()}
    at_once = tasks if any(map(is_carried, leaves)) else 1
    share = at_once / tasks if case.config.outer.reduction == "mean" else 1.0
    total, gradients = 0.0, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for task in range(0, tasks, at_once):
        episode = case.episodes[task : task + at_once].to(device)
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
    largest = max(float(gradient.norm()) for gradient in expected.gradients.values())
    worst = {}
    for name, gradient in expected.gradients.items():
        # what is zero but for rounding (a bias in front of a norm) is compared on the scale of what is not
        scale = float(gradient.norm())
        scale = scale if scale > VANISHING * largest else largest
        worst[name] = float((found[name] - gradient).norm()) / max(scale, 1e-300)
    name = max(worst, key=lambda name: worst[name])
    errors["float64 gradient"] = worst[name]
    host.step()
    errors["float64 step"] = _step_error(host.parameters(), case, expected.gradients)
    bounds = {"float64 loss": STRICT_LOSS, "float64 gradient": STRICT_GRADIENT, "float64 step": STRICT_STEP}
    return _verdict(errors, bounds, {"float64 gradient": f" of {name}"})


def check_rounded(host: Host, copies: Iterable[tuple[Case, Truth]]) -> Verdict:
    """The second question; builds the side on one small copy after the other until it passes."""
    verdict = Verdict({}, "no small copy to compare on")
    for case, expected in copies:
        host.build(case.config, case.episodes, case.parameters)
        verdict = _compared(host, expected, TOLERANCE[case.config.run.precision], f"{case.config.run.precision} small ")
        if not verdict.failure:
            break
    return verdict


def check_timed(host: Host, case: Case, expected: Truth, precision: str = "") -> Verdict:
    """The third question, of a side that was built on the case itself and holds its parameters.

    ``precision``: that it multiplies in, where it is another than the case's.
    """
    precision = precision or case.config.run.precision
    return _compared(host, expected, TIMED_TOLERANCE[precision], f"{precision} ")


def _compared(host: Host, expected: Truth, tolerance: Mapping[str, float], prefix: str) -> Verdict:
    loss, found = host.gradients()
    errors = {"loss": _scalar_error(loss, expected.loss)}
    for group in dict.fromkeys(map(group_of, expected.gradients)):
        names = [name for name in expected.gradients if group_of(name) == group]
        errors[group] = _error([found[n] for n in names], [expected.gradients[n] for n in names])
    bounds = {prefix + what: bound for what, bound in tolerance.items()}
    return _verdict({prefix + what: error for what, error in errors.items()}, bounds, {})


def needs_small(name: str) -> bool:
    """Whether a side is asked the first two questions."""
    return name not in COMPILING


def _verdict(errors: dict[str, float], bounds: Mapping[str, float], where: Mapping[str, str]) -> Verdict:
    for what, error in errors.items():
        if not error <= bounds[what]:
            allowed = f"off by {error:.1e}, allowed {bounds[what]:.0e}"
            return Verdict(errors, f"not the same work: {what}{where.get(what, '')} is {allowed}")
    return Verdict(errors)


def group_of(name: str) -> str:
    """Convolutions, norms, head, or what is the algorithm's own."""
    first = name.partition(".")[0]
    if first == "features":
        return "norms" if ".norm." in name else "convolutions"
    return "head" if first == "head" else "own"


def is_carried(name: str) -> bool:
    """Whether it is no meta-parameter that is trained but what a task leaves for the next (Reptile's moments)."""
    return name == "count" or name.startswith("moments.")


def _scalar_error(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what was expected; NaN stays NaN, which no bound allows."""
    a, b = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def _step_error(after: Parameters, case: Case, gradients: Mapping[str, Tensor]) -> float:
    """Largest deviation from the optimizer's first update, in units of the learning rate.

    Adam's does not change with what clipping does; that of gradient descent is the gradient, and it is not asked for
    where that is clipped.
    """
    config, outer = case.config, case.config.outer
    declared = build_algorithm(config, build_backbone(config.model)).declared
    worst = 0.0
    for name, start in case.parameters.items():
        if is_carried(name):
            continue
        gradient = gradients[name] * declared[name].trained
        if outer.optimizer == "adam":
            gradient = gradient / (gradient.abs() + ADAM_EPS)
        elif outer.clip_value or outer.clip_norm:
            continue
        deviation = float((after[name] - start + outer.learning_rate * gradient).abs().max()) / outer.learning_rate
        worst = deviation if not deviation <= worst else worst
    return worst
