"""What tests/test_conv_block_triton.py asks of the general block's kernels, on CUDA or in the interpreter.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: for each of ``CHECKS`` what it found, by case.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton_blocks as blocks
from torch import Tensor
from triton_blocks import OUTPUTS, compare, relative_error

from cxgrad_fast.kernels.cases import CASES, Case

FOLDER = "cxgrad_fast.kernels.conv_block"
forward = importlib.import_module(f"{FOLDER}.forward").forward
backward = importlib.import_module(f"{FOLDER}.backward").backward
double_backward = importlib.import_module(f"{FOLDER}.double_backward").double_backward
convolution = importlib.import_module(f"{FOLDER}.convolution")

SMALL = {
    case.name: case
    for case in CASES
    if case.operator == "conv_block" and not case.large and not case.first_layer and case.norm == "batch"
    if not case.given and case.tasks
}
BLOCK = Case("conv_block", "", "a block of its own")
# each combines what the table of cases has one by one: an interpreted launch takes a tenth of a second
COMBINED = [
    replace(SMALL["plain"], height=6, width=6),
    replace(SMALL["no_pool"], height=5, width=5),
    SMALL["one_pixel"],
    SMALL["one_channel"],
    SMALL["ties"],
    SMALL["dead_filter"],
    replace(SMALL["48_channels"], tasks=1, images=2),
    replace(SMALL["image_major"], name="odd_relu", height=7, width=5, slope=0.0),
    replace(SMALL["strided"], name="pointwise_pool", kernel=1, height=7),
    replace(SMALL["no_activation"], name="one_row", height=1, width=23, channels=5, out=9),
    replace(SMALL["channels_last"], name="many_images", tasks=1, height=2, width=2, images=375, eps=1e-5),
    replace(SMALL["plain"], name="65_channels", channels=7, out=65, height=3, width=4, tasks=1),
    replace(SMALL["plain"], name="96_filters", channels=3, out=96, height=4, width=4, tasks=1, images=5),
]
# and on a device: minutes in the interpreter
LARGER = [
    replace(SMALL["plain"], name="64_tasks", tasks=64, images=5, channels=32, out=32, height=14, width=14),
    replace(SMALL["plain"], name="375_images", tasks=1, images=375, channels=48, out=48, height=10, width=10),
    replace(SMALL["plain"], name="96_channels", tasks=2, images=5, channels=96, out=96, height=21, width=21),
    replace(SMALL["no_pool"], name="512_channels", tasks=1, images=5, channels=512, out=512, height=10, width=10),
]
ROUNDED = [
    replace(SMALL["plain"], tasks=4, channels=8, height=6, width=6),
    replace(SMALL["no_pool"], tasks=4, channels=8, height=5, width=5, eps=1e-5),
    replace(SMALL["48_channels"], tasks=1),
]
FAST = replace(SMALL["plain"], channels=8)  # of fast products


class Block(blocks.LaunchedBlock):
    """A block that is not the first."""

    LEAVES = ("x", "weight", "scale", "bias", "eps")

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        super().__init__(case, dtype, device, seed)
        tensors = {name: tensor.detach().to(device) for name, tensor in self.given.tensors.items()}
        affine = [tensors[name].expand(case.tasks, case.out) for name in ("scale", "bias")]
        eps = tensors.get("eps", torch.full((case.tasks,), case.eps, dtype=dtype, device=device))
        self.leaves = (tensors["x"], tensors["weight"], *affine, eps)

    def derivatives(self, q: Tensor, cotangents: list[Tensor], *, precision: str = "float32") -> dict[str, Tensor]:
        """Put together from the three functions as the chain does."""
        leaves, options = self.leaves, (self.slope, self.case.pool)
        out, *saved = forward(*leaves, *options, precision=precision)
        first = backward(q, None, *leaves, *saved, *options, True, True, precision=precision)
        second = double_backward(
            *cotangents, q, *leaves, *saved, *first[2:4], *options, True, True, precision=precision
        )
        nothing = torch.zeros_like(q)
        pushed = backward(nothing, second[5], *leaves, *saved, *options, True, True, precision=precision)
        found = {"out": out} | {f"d.{name}": gradient for name, gradient in zip(self.LEAVES, first, strict=False)}
        found |= {"dd.q": second[0], "dd.scale": second[3], "dd.eps": second[4]}
        return found | {"dd.x": second[1] + pushed[0], "dd.weight": second[2] + pushed[1]}

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        return {name: value for name, value in self.given.constants.items() if name != "eps"}


rounding = partial(blocks.rounding, Block)
low_precision = partial(blocks.low_precision, Block, FAST)
different_bits = partial(blocks.different_bits, Block)


# --- against the C++ operators ---


def contract_errors(
    case: Case,
    device: str = "cpu",
    parts: bool = False,
    dtype: torch.dtype = torch.float64,
    precision: str = "float32",
) -> dict[str, float]:
    """Relative error of every output of the three functions, and of parts of the second derivative."""
    ops = torch.ops.cxgrad_fast
    b = Block(case, dtype, device)
    host = [tensor.cpu() for tensor in b.leaves]
    options, patches = (b.slope, case.pool), (None, None)
    found, wanted = (
        forward(*b.leaves, *options, precision=precision),
        ops.conv_block(*host, *options, *patches, precision),
    )
    errors = compare("forward", OUTPUTS[0], found, wanted)
    saved, saved_host = found[1:], wanted[1:]
    q, more = b.normal(wanted[0]), b.normal(wanted[1])
    for name, other in (("backward", None), ("backward+", more)) if parts else (("backward+", more),):
        sent = None if other is None else other.to(device)
        found = backward(q.to(device), sent, *b.leaves, *saved, *options, True, True, precision=precision)
        wanted = ops.conv_block_backward(q, other, *host, *saved_host, *options, *patches, True, True, precision)
        errors |= compare(name, OUTPUTS[1], found, wanted)
    sums = wanted[2:4]  # any will do
    cotangents = [b.normal(tensor) for tensor in wanted[:5]]
    for left_out in ((), (0,), (1,), (0, 1, 2, 3)) if parts else ((),):
        for needs in ((True, True), (False, False)) if parts and not left_out else ((True, True),):
            on = [None if index in left_out else tensor for index, tensor in enumerate(cotangents)]
            sent = [None if tensor is None else tensor.to(device) for tensor in on]
            there = [tensor.to(device) for tensor in sums]
            arguments = (*sent, q.to(device), *b.leaves, *saved, *there, *options, *needs)
            found = double_backward(*arguments, precision=precision)
            wanted = ops.conv_block_double_backward(
                *on, q, *host, *saved_host, *sums, torch.empty(0).double(), *options, *patches, *needs, precision
            )
            errors |= compare(f"double{left_out}{needs}", OUTPUTS[2], found, wanted)
    return errors


# --- places ---


def beyond_int32() -> dict[str, float]:
    """Errors of products whose images lie more than 2^31 values behind the first: two tasks, the second one's start."""
    channels, out, count = 512, 16, (1 << 22) + 128
    some = 1 << 17
    x = torch.empty(count * channels + some, dtype=torch.bfloat16)  # of which only the ends are touched
    generator = torch.Generator().manual_seed(0)
    x[-some:] = torch.randn(some, generator=generator)
    x[:some] = math.nan
    weight = torch.randn(2, out, channels, 1, 1, generator=generator).bfloat16()
    packed = convolution.pack(weight, False, precision="float32")
    y = torch.zeros(2 * count * out, dtype=torch.bfloat16)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 64}
    shape = {"H": 1, "W": count, "CIN": channels, "COUT": out, "KERNEL": 1, "PRODUCTS": "bfloat16"}
    more = {"PADDED": channels, "SOURCES": 1, "REDUCTIONS": "", "SLOPE": 1.0, "POOL": False, "SPLITS": 1}
    convolution._convolve[(1, 2)](x, packed, x, packed, y, y, y, y, y, y, count, 8, **shape, **more, **blocks)
    rows = x[-some:].view(-1, channels)[:64].double()
    wanted = rows @ weight[1, :, :, 0, 0].double().T
    return {"convolve": relative_error(y.view(2, count, out)[1, :64], wanted)}


CHECKS: dict[str, Any] = {
    "contract": lambda: {
        case.name: contract_errors(case, parts=case.name in ("plain", "no_pool")) for case in COMBINED
    },
    "rounding": lambda: {case.name: rounding(case) for case in ROUNDED},
    "low": lambda: blocks.fast_products(Block, FAST),
    "cpp": lambda: blocks.fast_contract(contract_errors, SMALL["plain"]),
    "bits": lambda: different_bits(replace(SMALL["no_pool"], images=6, height=5, width=5)),
    "far": beyond_int32,
}


if __name__ == "__main__":
    blocks.print_checks(CHECKS)
