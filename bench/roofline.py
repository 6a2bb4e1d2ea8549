"""How fast a meta-step could be here: exact FLOPs, least bytes, the machine's measured peaks, the floor between them.

    python bench/roofline.py [--preset NAME] [--config FILE] [--dense] [--group.setting value ...]

**FLOPs counted**: the multiply-adds (two FLOPs each) of every convolution and of the linear head, padding included, in
*units*: one unit of a layer is ``2 k^2 Cin Cout H W`` FLOPs an image. :func:`step_cost` counts the least that the forms
of MATH.md need, :func:`dense_cost` what autograd of the plain composition spends (scaled form, no closed form):

                                   first layer        every other layer
    any pass        forward        1                  1
                    backward       wgrad              dgrad, wgrad
    context, least  forward        1                  1
                    backward                          dgrad
    second          tangent        conv(x, W)         conv(X, w), conv(x, W)
                    cotangent      wgrad(x, y')       dgrad(y', w), dgrad(dy, W), wgrad(x, y'), wgrad(X, dy)

- The context pass needs no weight gradient: dL/dgamma comes from the norms' (MATH.md 3). Differentiated again
  (``initial_context_order = 2``) it has no W, so that conv(x, W) and dgrad(dy, W) fall away: 4 units instead of 6.
  The dense form takes the weight gradients of the scaled layers and differentiates them again.
- First layer of Conv-4 with batch norm (MATH.md 2): its wgrads and conv(x, W) are needed at the arg-max positions
  alone, ``(H // 2)(W // 2)`` of ``H W``: a quarter of a unit each. MATH.md 4 counts one sparse wgrad a support pass;
  the second backward has another, ``wgrad(x, P(m p'))`` for the cotangent p' that the second layer sends: its operand
  is new, and no saved product gives it. With it an episode is 140.0 GFLOP (5-shot) and 46.6 (1-shot), not 139.4 and
  46.5.

**FLOPs not counted**: elementwise work and reductions (they are in the bytes), the scaling network g_phi
(``2 D (D + L)`` a task and evaluation: 21 kFLOP), the loss, the patches' covariance (float64, once an image set:
1.6 MFLOP an 84x84 RGB image, 0.1-0.3 % of a step), the optimizer. What is left out makes the floor lower, never higher.

**Bytes counted**: a *visit* is one layer in one sweep (forward, backward, and the two sweeps of a second backward). A
visit reads each tensor it needs once and writes each tensor that a later visit needs once, in the element size of
``run.precision``: perfect reuse inside a visit, none between visits. With x the input, y the convolution output, p the
pooled output (stored only where there is a pool: else the next layer normalises y as it reads), q the gradient at the
block's output, w the weight (one a task), primes for cotangents:

    forward      reads x, w                      writes y, p
    backward     reads x, w, y, q                writes dx, dw
    tangent      reads x, X, w, W, y, q          writes u, and X of the next layer
    cotangent    reads x, X, w, W, y, u, q, p'   writes x', w'

less what the products above do not need (the first layer's X, dx, x'; W of a context pass). The closed first layer has
p and one byte a pooled element (its arg-max) in the place of y, no u, and reads the saved sparse wgrad, not q. The end
of a residual block is a visit of its own: both branches in, the pooled sum and a byte a position (its arg-max and
sign) out; backwards the other way. An inner update reads weight and gradient and writes the weight, again for its
second backward; Adam reads four and writes three tensors of the adapted meta-parameters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from peaks import DTYPES, Peaks, measured_peaks, peaks_for

from cxgrad_fast.cli import add_config_options, build_config, run_command, split_settings
from cxgrad_fast.config import Config, ModelConfig

__all__ = ["Cost", "Part", "Peaks", "dense_cost", "measured_peaks", "peaks_for", "step_cost", "time_floor"]

ELEMENT_SIZE = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2}  # bytes, by run.precision


@dataclass(frozen=True)
class Part:
    """Share of a meta-step, all tasks: FLOPs and bytes of one layer in one kind of pass."""

    phase: str  # context pass, support passes, second backward, query pass, updates
    layer: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What one meta-step of ``tasks`` tasks costs."""

    tasks: int
    parts: tuple[Part, ...]

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def by(self, key: str) -> dict[str, tuple[int, int]]:
        """FLOPs and bytes by ``phase`` or by ``layer``, in order of appearance."""
        table: dict[str, tuple[int, int]] = {}
        for part in self.parts:
            flops, moved = table.get(getattr(part, key), (0, 0))
            table[getattr(part, key)] = (flops + part.flops, moved + part.bytes)
        return table


@dataclass(frozen=True)
class Work:
    """Work of one visit: FLOPs, elements and single bytes an image, elements a task (weights)."""

    flops: int = 0
    elements: int = 0
    single: int = 0
    weights: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.elements + other.elements,
            self.single + other.single,
            self.weights + other.weights,
        )

    def part(self, phase: str, layer: str, images: int, sets: int, element: int) -> Part:
        """This work for ``sets`` sets of ``images`` images, in elements of ``element`` bytes."""
        moved = element * (images * self.elements + self.weights) + images * self.single
        return Part(phase, layer, sets * images * self.flops, sets * moved)


@dataclass(frozen=True)
class Layer:
    """A convolution with its norm, or the head (a convolution of one position), for one image.

    Attributes:
        weight: elements of its weight, ``k^2 Cin Cout``.
        positions: ``H W`` of its output.
        read: elements of its input.
        written: elements of its convolution output, y.
        pooled: positions after the pool; 0 without.
        on_images: its input needs no gradient.
        scaled: CxGrad scales its weight.
        closed: the first-layer form (MATH.md 2) applies.
    """

    name: str
    weight: int
    positions: int
    read: int
    written: int
    pooled: int = 0
    on_images: bool = False
    scaled: bool = True
    closed: bool = False

    @property
    def unit(self) -> int:
        return 2 * self.weight * self.positions

    @property
    def sparse(self) -> int:
        """FLOPs of a wgrad or a convolution where only what the pool kept is needed."""
        return 2 * self.weight * self.pooled if self.closed else self.unit

    @property
    def output(self) -> int:
        """Elements of the block's output, and of the gradient there."""
        return self.written // self.positions * self.pooled if self.pooled else self.written

    @property
    def saved(self) -> Work:
        """What a later visit reads of the forward pass besides the input."""
        return Work(elements=self.output, single=self.output) if self.closed else Work(elements=self.written)

    def forward(self) -> Work:
        stored = self.saved if self.closed else self.saved + Work(elements=self.output if self.pooled else 0)
        return Work(self.unit, self.read, weights=self.weight) + stored

    def backward(self, weight_gradient: bool) -> Work:
        work = Work()
        if not self.on_images:
            work += Work(self.unit, self.read, weights=self.weight)
        if weight_gradient:
            work += Work(self.sparse, self.read, weights=self.weight)
        if work == Work() and not self.scaled:
            return work  # a shortcut on the images in a context pass: nothing depends on it
        return work + self.saved + Work(elements=self.output)

    def second_backward(self, weight_cotangent: bool) -> Work:
        """Tangent and cotangent sweep; without ``weight_cotangent`` W is zero (a context pass)."""
        return self._tangent(weight_cotangent) + self._cotangent(weight_cotangent)

    def _tangent(self, weight_cotangent: bool) -> Work:
        work = Work()
        if not self.on_images:
            work += Work(self.unit, self.read, weights=self.weight)
        if weight_cotangent:
            work += Work(self.sparse, self.read, weights=self.weight)
        if work == Work() and not self.scaled:
            return work
        u = 0 if self.closed or work == Work() else self.written
        return work + self.saved + Work(elements=2 * self.output + u)

    def _cotangent(self, weight_cotangent: bool) -> Work:
        work = Work(self.sparse, self.read + self.output, weights=self.weight) + self.saved
        if not self.on_images:
            work += Work(2 * self.unit, 2 * self.read + self.output + self.written, weights=self.weight)
            if weight_cotangent:
                work += Work(self.unit, weights=self.weight)
        elif self.closed and weight_cotangent:
            work += Work(weights=self.weight)
        elif weight_cotangent:
            work += Work(elements=self.output + self.written)
        elif self.scaled:
            work += Work(elements=self.output)
        return work


@dataclass(frozen=True)
class ResidualEnd:
    """Addition, activation and pool: no FLOPs that are counted, traffic of ``branch`` in and ``output`` out."""

    name: str
    branch: int
    output: int

    def forward(self) -> Work:
        return Work(elements=2 * self.branch + self.output, single=self.output)

    def backward(self, weight_gradient: bool) -> Work:
        return Work(elements=self.branch + self.output, single=self.output)

    def second_backward(self, weight_cotangent: bool) -> Work:
        return Work(elements=3 * self.branch + 2 * self.output, single=2 * self.output)


def step_cost(config: Config) -> Cost:
    """The least work of one meta-step of ``config.outer.meta_batch`` tasks (module docstring)."""
    return _cost(config, dense=False)


def dense_cost(config: Config) -> Cost:
    """The same step as autograd of the plain composition does it: every operand dense, the scaled form."""
    return _cost(config, dense=True)


def layers(config: Config) -> list[Layer | ResidualEnd]:
    """The network of ``config``, in forward order, the head last."""
    return _conv4(config) if config.model.backbone == "conv4" else _resnet12(config)


def _cost(config: Config, dense: bool) -> Cost:
    task, inner = config.task, config.inner
    tasks, element = config.outer.meta_batch, ELEMENT_SIZE[config.run.precision]
    support, query = task.ways * task.shots, task.ways * task.queries
    context = _context_passes(config)
    second = inner.order == 2 and inner.steps > 0
    network = layers(config)
    if dense:
        network = [replace(layer, closed=False) if isinstance(layer, Layer) else layer for layer in network]
    parts: list[Part] = []
    for layer in network:
        context_weights = dense and isinstance(layer, Layer) and layer.scaled
        again = context if context and second and inner.initial_context_order == 2 else 0
        phases = [
            ("context pass", context, layer.forward() + layer.backward(context_weights)),
            ("support passes", inner.steps, layer.forward() + layer.backward(True)),
            ("second backward", inner.steps * second, layer.second_backward(True)),
            ("second backward", again, layer.second_backward(context_weights)),
        ]
        for phase, passes, work in phases:
            if passes:
                parts.append(work.part(phase, layer.name, support, tasks * passes, element))
        parts.append((layer.forward() + layer.backward(True)).part("query pass", layer.name, query, tasks, element))
    adapted = sum(layer.weight for layer in network if isinstance(layer, Layer))
    moved = 3 * adapted * tasks * inner.steps * (1 + second) + 7 * adapted
    return Cost(tasks, (*parts, Part("updates", "all", 0, element * moved)))


def _context_passes(config: Config) -> int:
    if config.inner.algorithm != "cxgrad":
        return 0
    return 1 if config.inner.context_update == "task" else config.inner.steps


def _conv4(config: Config) -> list[Layer | ResidualEnd]:
    model, network = config.model, list[Layer | ResidualEnd]()
    channels, size = model.channels, model.image_size
    for index in range(4):
        network.append(
            replace(
                _convolution(f"features.{index}", model, 3, channels, model.filters, size),
                pooled=model.sizes_by_block()[index] ** 2,
                on_images=index == 0,
                closed=index == 0 and model.norm == "batch" and not (model.pool_ceil and size % 2),
            )
        )
        channels, size = model.filters, model.sizes_by_block()[index]
    return [*network, _head(config.task.ways, channels * size * size, channels * size * size)]


def _resnet12(config: Config) -> list[Layer | ResidualEnd]:
    model, network = config.model, list[Layer | ResidualEnd]()
    channels, size = model.channels, model.image_size
    for block in range(4):
        filters, name = model.filters_by_block[block], f"features.{block}"
        shortcut = _convolution(f"{name}.shortcut", model, 1, channels, filters, size)
        network.append(replace(shortcut, on_images=block == 0, scaled=False))
        for index in range(3):
            inputs = channels if index == 0 else filters
            layer = _convolution(f"{name}.{index}", model, 3, inputs, filters, size)
            network.append(replace(layer, on_images=block == 0 and index == 0))
        pool = block < 3 or model.pool_last
        after = (size + 2 * model.pool_padding[block]) // 2 if pool else size
        network.append(ResidualEnd(f"{name}.end", filters * size**2, filters * after**2))
        channels, size = filters, after
    return [*network, _head(config.task.ways, channels, channels * size * size)]


def _convolution(name: str, model: ModelConfig, kernel: int, inputs: int, outputs: int, size: int) -> Layer:
    return Layer(name, kernel**2 * inputs * outputs, size**2, inputs * size**2, outputs * size**2)


def _head(ways: int, features: int, read: int) -> Layer:
    return Layer("head", ways * features, 1, read, ways, scaled=False)


def time_floor(cost: Cost, peaks: Peaks) -> float:
    """Seconds that no version of the step undercuts: arithmetic or traffic, whichever is longer."""
    return max(cost.flops / peaks.flops, cost.bytes / peaks.bandwidth)


def report(config: Config, count: Callable[[Config], Cost], device: torch.device) -> list[str]:
    """The lines that the command prints."""
    cost = count(config)
    lines = [f"{config.preset}: a meta-step of {cost.tasks} tasks, {_amount(cost.flops, cost.bytes)}"]
    lines += [f"an episode: {_amount(cost.flops // cost.tasks, cost.bytes // cost.tasks)}"]
    for key in ("phase", "layer"):
        lines += ["", f"{key:<22} {'GFLOP':>10} {'MB':>10}"]
        lines += [
            f"{name:<22} {flops / 1e9:10.3f} {moved / 1e6:10.1f}" for name, (flops, moved) in cost.by(key).items()
        ]
    lines += ["", f"{device!s:<22} {'GFLOP/s':>10} {'GB/s':>10} {'floor ms':>10} {'episodes/s':>10}"]
    for precision in DTYPES:
        if precision == "tf32" and device.type != "cuda":
            continue
        peaks = peaks_for(precision, device)
        floor = time_floor(count(config.override({"run.precision": precision})), peaks)
        numbers = (peaks.flops / 1e9, peaks.bandwidth / 1e9, 1e3 * floor, cost.tasks / floor)
        lines.append(f"{precision:<22} " + " ".join(f"{number:10.2f}" for number in numbers))
    return lines


def _amount(flops: int, moved: int) -> str:
    return f"{flops / 1e9:.2f} GFLOP, {moved / 1e6:.1f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser, "released-mini-5w5s")
    parser.add_argument("--dense", action="store_true", help="count what plain autograd does")
    settings, words = split_settings(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    config = build_config(options.preset, options.config, settings, "released-mini-5w5s")
    device = config.run.device if config.run.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    print("\n".join(report(config, dense_cost if options.dense else step_cost, torch.device(device))))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
