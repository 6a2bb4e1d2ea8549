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
- An algorithm that adapts less needs less: no wgrad and no W where a weight is not adapted, no dgrad of the first
  backward and no X where nothing below is, and layers whose weight and input are the same in all passes over the
  support set are computed once, with one backward where the meta-gradient runs through them: ANIL's backbone, CAVIA's
  convolutions up to the first that its context acts behind, ModGrad's below the first that is adapted. bench/passes.py
  says which passes an algorithm has. The dense form repeats them, but for a whole backbone.
- First layer of Conv-4 with batch norm (MATH.md 2): its wgrads and conv(x, W) are needed at the arg-max positions
  alone, ``(H // 2)(W // 2)`` of ``H W``: a quarter of a unit each. MATH.md 4 counts one sparse wgrad a support pass;
  the second backward has another, ``wgrad(x, P(m p'))`` for the cotangent p' that the second layer sends: its operand
  is new, and no saved product gives it. With it an episode is 140.0 GFLOP (5-shot) and 46.6 (1-shot), not 139.4 and
  46.5.

**FLOPs not counted**: elementwise work and reductions (they are in the bytes), the algorithms' own networks (CxGrad's
g_phi: ``2 D (D + L)`` a task and evaluation, 21 kFLOP), the loss, the patches' covariance (float64, once an image set:
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
second backward; Adam reads four and writes three tensors of the network's weights. An algorithm's own parameters are
not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from layers import HEAD, Asked, Layer, ResidualEnd, Work, layers
from passes import passes_of
from peaks import DTYPES, Peaks, measured_peaks, peaks_for

from cxgrad_fast.cli import add_config_options, build_config, run_command, split_settings
from cxgrad_fast.config import Config

__all__ = ["Cost", "Part", "Peaks", "dense_cost", "measured_peaks", "peaks_for", "step_cost", "time_floor"]

ONCE = "computed once"
ELEMENT_SIZE = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2}  # bytes, by run.precision


@dataclass(frozen=True)
class Part:
    """Share of a meta-step, all tasks: FLOPs and bytes of one layer in one kind of pass."""

    phase: str  # computed once, support passes (or as bench/passes.py calls them), second backward, query pass, updates
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


def step_cost(config: Config, iteration: int | None = None) -> Cost:
    """The least work of one meta-step of ``config.outer.meta_batch`` tasks (module docstring).

    ``iteration``: of meta-training, counted from 0; None: after all phases of the algorithm.
    """
    return _cost(config, iteration, dense=False)


def dense_cost(config: Config, iteration: int | None = None) -> Cost:
    """The same step as autograd of the plain composition does it: every operand dense, the scaled form."""
    return _cost(config, iteration, dense=True)


def _cost(config: Config, iteration: int | None, dense: bool) -> Cost:
    task, network = config.task.of_training(), layers(config)
    tasks, element = config.outer.meta_batch, ELEMENT_SIZE[config.run.precision]
    support, query = task.ways * task.shots, task.ways * task.queries
    if dense:
        network = [replace(layer, closed=False) if isinstance(layer, Layer) else layer for layer in network]
    step = passes_of(config, iteration, dense)
    once = step.once(network)
    parts: list[Part] = []

    def count(phase: str, layer: Layer | ResidualEnd, work: Work, images: int, sets: int) -> None:
        if sets:
            moved = sets * work.moved(images, element)
            parts.append(Part(phase, layer.name, sets * images * work.flops, moved))

    for layer in network:
        everything = Asked(bool(layer.below), weight=True, here=True)
        if layer.name in once:
            count(ONCE, layer, layer.forward(), support, tasks)
            count(ONCE, layer, layer.backward(everything), support, tasks * step.differentiates_support)
        else:
            for each in step.passes:
                if each.features and layer.name == HEAD:
                    continue
                asked = each.asked(layer)
                first = layer.forward() + (layer.backward(asked) if each.backward else Work())
                first += layer.backward(everything) if each.features else Work()
                images, times = step.images or support, tasks * each.times
                count(each.phase, layer, first, images, times)
                count("second backward", layer, layer.second_backward(asked), images, times * each.second)
        asked_of_query = layer.backward(everything) if step.differentiates_queries else Work()
        count("query pass", layer, layer.forward() + asked_of_query, query, tasks * step.queries)
    weights = {layer.name: layer.weight for layer in network if isinstance(layer, Layer)}
    moved = 3 * sum(weights.get(name, 0) for name in step.adapted) * tasks * config.inner.steps * (1 + step.second)
    return Cost(tasks, (*parts, Part("updates", "all", 0, element * (moved + 7 * sum(weights.values())))))


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
