"""Every Triton kernel of a network's blocks, without a GPU: machine code, work, floor and a predicted time.

    python bench/triton_kernels.py [--preset NAME] [--tasks 2] [--architecture sm_90] [--precision float32]

The launches of one support pass, its two derivatives and the inner update's weights are written down on tensors without
memory and compiled. A row: programs, warps and registers, bytes of shared memory, programs a multiprocessor holds;

- MB: every tensor of the launch once, its least traffic; GFLOP: the definition's multiply-adds, without padding.
- floor: the larger of traffic and products at the peaks measured on an H100 (3.0 TB/s, 798 TFLOP/s in bfloat16: half of
  that in TF32, a sixth in float32 as three TF32 products).
- predicted: at 80 % of the one and 50 % of the other, rounded up to whole waves of programs, and 1.5 us of launch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cxgrad_fast import Config, InputError, preset
from cxgrad_fast.cli import run_command
from cxgrad_fast.kernels import launch, machine_code
from cxgrad_fast.kernels.conv_block.triton import chain as block_chain
from cxgrad_fast.kernels.normalize_weights.triton import chain as normalize
from cxgrad_fast.kernels.patch_statistics.triton import patch_statistics
from cxgrad_fast.kernels.scale_weights.triton import chain as scale

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
BYTES_PER_S = 3.0e12
FLOPS = {"bfloat16": 798e12, "tf32": 399e12, "float32": 133e12}
OF_BYTES, OF_FLOPS, LAUNCH_S = 0.8, 0.5, 1.5e-6

# kernels with products -> units of convolution (or what takes their place), from a launch's options
_UNITS: dict[str, Callable[[machine_code.Launch], int]] = {
    "_convolve": lambda launch: launch.options["SOURCES"],
    "_weight_gradient": lambda launch: launch.options.get("SOURCES", 1),
    "_forward": lambda launch: 1,
    "_reduce": lambda launch: 1 if "KP" in launch.options else 0,
    "_second": lambda launch: 1 if "KP" in launch.options else 0,
}


@dataclass(frozen=True)
class Row:
    """One launch: where, what of the machine it takes, and its work."""

    where: str
    launch: machine_code.Launch
    flops: float

    @property
    def traffic(self) -> int:
        """Bytes of the tensors, each once."""
        given = [*self.launch.arguments, *self.launch.options.values()]
        lists = [part for value in given for part in (value if isinstance(value, list | tuple) else [value])]
        tensors = [part for part in lists if isinstance(part, Tensor)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    def floor(self, precision: str) -> float:
        """Seconds that traffic or products take at the least."""
        return max(self.traffic / BYTES_PER_S, self.flops / FLOPS[precision])

    def predicted(self, precision: str) -> float:
        """Seconds, by the rule above."""
        count = MULTIPROCESSORS[self.launch.architecture] * max(self.launch.compile().programs_per_sm, 1)
        waves = self.launch.programs / count
        whole = launch.divide(self.launch.programs, count) / waves if waves > 0.5 else 1.0
        memory, products = self.traffic / BYTES_PER_S, self.flops / FLOPS[precision]
        return max(memory / OF_BYTES, products / OF_FLOPS) * whole + LAUNCH_S

    def cells(self, precision: str) -> list[str]:
        """The row of the table."""
        code = self.launch.compile()
        return [
            self.where,
            f"`{self.launch.name.strip('_')}`",
            f"{self.launch.programs}",
            f"{code.num_warps}",
            f"{code.registers}" + (f" ({code.spills} spills)" if code.spills else ""),
            f"{code.shared_memory / 1024:.0f} KB",
            f"{code.programs_per_sm}",
            f"{self.traffic / 1e6:.2f}",
            f"{self.flops / 1e9:.2f}" if self.flops else "",
            f"{1e6 * self.floor(precision):.1f}",
            f"{1e6 * self.predicted(precision):.0f}",
        ]


HEAD = "| where | kernel | programs | warps | registers | shared | an SM | MB | GFLOP | floor us | predicted us |"


def rows(config: Config, tasks: int, architecture: str, precision: str) -> Iterator[Row]:
    """The launches of one support pass over Conv-4, its derivatives, and the weights' operators."""
    if config.model.backbone != "conv4":
        raise InputError("triton_kernels goes through conv4's blocks: --preset of a conv4")
    images, size, filters = config.task.ways * config.task.shots, config.model.image_size, config.model.filters
    dtype = torch.float64 if precision == "float64" else torch.float32

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, device="meta", dtype=of)

    shapes = [(filters, config.model.channels if layer == 0 else filters, 3, 3) for layer in range(4)]
    weights, v = ([empty(tasks, *shape) for shape in shapes] for _ in range(2))
    table = empty(tasks, 4)
    for name, found in _recorded(
        architecture,
        {
            "weights, scaled": lambda: scale.forward(weights, table),
            "weights, first": lambda: normalize.backward(weights, v, table),
            "weights, second": lambda: normalize.double_backward(weights, v, table, weights),
        },
    ):
        yield from (Row(name, one, 0.0) for one in found)
    inputs = config.model.channels
    patches: list[Tensor | None] = [None, None]
    for layer in range(4):
        x = empty(tasks, images, size, size, inputs).permute(0, 1, 4, 2, 3)
        if layer == 0:
            x = empty(tasks, images, inputs, size, size)
            for name, found in _recorded(architecture, {"patches": lambda x=x: patch_statistics(x)}):
                yield from (Row(name, one, _patch_flops(x) if one.name == "_products" else 0.0) for one in found)
            length = 9 * inputs
            patches = [empty(tasks, length, of=torch.float64), empty(tasks, length, length, of=torch.float64)]
        for name, found in _block(architecture, precision, x, filters, patches if layer == 0 else [None, None]):
            unit = 2.0 * tasks * images * size * size * 9 * inputs * filters
            for one in found:
                yield Row(f"layer {layer + 1}, {name}", one, unit * _UNITS.get(one.name, lambda _: 0)(one))
        inputs, size = filters, size // 2


def _patch_flops(x: Tensor) -> float:
    return 2.0 * x.numel() / x.shape[2] * (9 * x.shape[2]) ** 2


def _recorded(
    architecture: str, calls: dict[str, Callable[[], object]]
) -> Iterator[tuple[str, list[machine_code.Launch]]]:
    for name, call in calls.items():
        with machine_code.recording(architecture) as found:
            call()
        yield name, found


def _block(
    architecture: str, precision: str, x: Tensor, filters: int, patches: Sequence[Tensor | None]
) -> Iterator[tuple[str, list[machine_code.Launch]]]:
    chain = block_chain("float32" if precision == "float64" else precision)
    tasks, _, inputs = x.shape[:3]

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=x.dtype)

    weight, scale, bias, eps = (
        empty(tasks, filters, inputs, 3, 3),
        empty(tasks, filters),
        empty(tasks, filters),
        empty(tasks),
    )
    leaves, slope = (x, weight, scale, bias, eps), 0.01
    is_first = patches[0] is not None
    with machine_code.recording(architecture) as found:
        out, *saved = chain.forward(*leaves, slope, True, *patches)
    yield "forward", found
    with machine_code.recording(architecture) as found:
        first = chain.backward(out, None, *leaves, *saved, slope, True, *patches, not is_first, True)
    yield "first", found
    sums = (first[2], first[3], first[5])
    on = (None if is_first else x, weight, scale, bias, eps)
    with machine_code.recording(architecture) as found:
        chain.double_backward(*on, out, *leaves, *saved, *sums, slope, True, *patches, not is_first, True)
    yield "second", found


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="released-mini-5w5s")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--architecture", choices=tuple(MULTIPROCESSORS), default="sm_90")
    parser.add_argument("--precision", choices=tuple(FLOPS), default="float32")
    options = parser.parse_args(argv)
    print(f"{options.preset}, {options.tasks} tasks, {options.precision}, {options.architecture}\n\n{HEAD}")
    print("|---" * HEAD.count("| ") + "|")
    found = list(rows(preset(options.preset), options.tasks, options.architecture, options.precision))
    for row in found:
        print(f"| {' | '.join(row.cells(options.precision))} |", flush=True)
    print("\n| what | launches | floor us | predicted us |\n|---|---|---|---|")
    for what in dict.fromkeys(row.where for row in found):
        part = [row for row in found if row.where == what]
        times = [1e6 * sum(getattr(row, name)(options.precision) for row in part) for name in ("floor", "predicted")]
        print(f"| {what} | {len(part)} | {times[0]:.1f} | {times[1]:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
