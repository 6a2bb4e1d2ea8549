"""What tests/test_first_layer_triton.py asks of the kernels that read images, on CUDA or in the interpreter.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: for each of ``CHECKS`` what it found, by case.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton_blocks as blocks
from torch import Tensor
from triton_blocks import OUTPUTS, compare, relative_error

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.case_calls import like
from cxgrad_fast.kernels.cases import CASES, Case, inputs
from cxgrad_fast.kernels.patch_statistics import reference as patch_definition
from cxgrad_fast.kernels.residual_end import reference as end_definition

FOLDER = "cxgrad_fast.kernels"
first_layer = importlib.import_module(f"{FOLDER}.conv_block.first_layer")
patch_statistics = importlib.import_module(f"{FOLDER}.patch_statistics.triton").patch_statistics
residual_end = importlib.import_module(f"{FOLDER}.residual_end.triton").residual_end


def small(operator: str, **conditions: bool) -> dict[str, Case]:
    return {
        case.name: case
        for case in CASES
        if case.operator == operator and not case.large
        if all(getattr(case, name) == value for name, value in conditions.items())
    }


LAYERS = small("conv_block", first_layer=True)
PATCHES = small("patch_statistics")
ENDS = small("residual_end")
# each combines what the table of cases has one by one: an interpreted launch takes a tenth of a second
COMBINED = [
    LAYERS["first_layer"],
    replace(LAYERS["first_layer_strided"], name="odd_relu_strided", height=7, width=9, slope=0.0),
    LAYERS["first_layer_grey"],
    replace(LAYERS["first_layer_48"], name="48_linear_one_task", tasks=1, images=2, height=6, width=10, slope=None),
    replace(LAYERS["first_layer_flat"], tasks=1, images=2),
    LAYERS["first_layer_smooth"],
    replace(LAYERS["first_layer"], name="ties", content="ties", tasks=1),
    replace(LAYERS["first_layer"], name="dead_filter", content="dead", tasks=1, height=4),
    replace(LAYERS["first_layer"], name="many_small_images", layout="channels_last", height=2, width=3, images=101),
    replace(LAYERS["first_layer"], name="five_channels", channels=5, out=65, height=5, width=4, tasks=1),
]
ROUNDED = [
    replace(LAYERS["first_layer"], tasks=8),
    replace(LAYERS["first_layer_smooth"], tasks=8),
]
PATCH_CASES = [*PATCHES.values(), replace(PATCHES["plain"], name="ten_channels", channels=10, tasks=1, images=1)]
FAST = replace(LAYERS["first_layer"], out=16)  # of fast products


class Layer(blocks.LaunchedBlock):
    """A first layer: its images have no gradient."""

    LEAVES = ("weight", "scale", "bias", "eps")

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        super().__init__(case, dtype, device, seed)
        tensors = {name: tensor.detach().to(device) for name, tensor in self.given.tensors.items()}
        affine = [tensors[name].expand(case.tasks, case.out).contiguous() for name in ("scale", "bias")]
        affine[0][:, 0] = 0 if case.content == "ties" else affine[0][:, 0]  # where every window ties
        self.x = self.given.constants["x"].to(device)  # keeps its strides
        self.leaves = (tensors["weight"], *affine, tensors["eps"])
        self.patches = tuple(tensor.to(device) for tensor in self.given.constants["patch_statistics"])

    def derivatives(self, q: Tensor, cotangents: list[Tensor], *, precision: str = "float32") -> dict[str, Tensor]:
        out, _, *saved = first_layer.forward(self.x, *self.leaves, self.slope, *self.patches, precision=precision)
        arguments, options = (q, self.x, *self.leaves, *saved), (self.slope, *self.patches, True)
        first = first_layer.backward(*arguments, *options, precision=precision)
        sums = (first[2], first[3], first[5])
        second = first_layer.double_backward(*cotangents, *arguments, *sums, *options, precision=precision)
        found = {"out": out} | {f"d.{name}": gradient for name, gradient in zip(self.LEAVES, first[1:5], strict=True)}
        return found | {"dd.q": second[0], "dd.weight": second[2], "dd.scale": second[3], "dd.eps": second[4]}

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """A convolution, and the statistics of its result."""
        return self.given.constants | {"x": self.x.cpu().to(dtype), "patch_statistics": None}

    def keep_last_task(self) -> None:
        super().keep_last_task()
        self.x, self.patches = self.x[-1:], tuple(tensor[-1:] for tensor in self.patches)


rounding = partial(blocks.rounding, Layer)
low_precision = partial(blocks.low_precision, Layer, FAST)
different_bits = partial(blocks.different_bits, Layer)


# --- against the C++ operators ---


def contract_errors(
    case: Case,
    device: str = "cpu",
    parts: bool = False,
    dtype: torch.dtype = torch.float64,
    precision: str = "float32",
) -> dict[str, float]:
    """Relative error of every output of the three functions, and of parts of the derivatives."""
    ops = torch.ops.cxgrad_fast
    b = Layer(case, dtype, device)
    host = [tensor.cpu() for tensor in (b.x, *b.leaves)]
    patches = [tensor.cpu() for tensor in b.patches]
    found = first_layer.forward(b.x, *b.leaves, b.slope, *b.patches, precision=precision)
    wanted = ops.conv_block(*host, b.slope, True, *patches, precision)
    errors = compare("forward", OUTPUTS[0], found, wanted)
    saved, saved_host = found[2:], wanted[1:]
    q = b.normal(wanted[0])
    sums = {}
    for need in (False, True):
        arguments = (q.to(device), b.x, *b.leaves, *saved, b.slope, *b.patches, need)
        found = first_layer.backward(*arguments, precision=precision)
        wanted = ops.conv_block_backward(q, None, *host, *saved_host, b.slope, True, *patches, False, need, precision)
        errors |= compare(f"backward {need}", OUTPUTS[1], found, wanted)
        sums[need] = (*wanted[2:4], wanted[5])
    cotangents = [b.normal(tensor) for tensor in wanted[1:5]]
    asked = [((), True, True)]
    if parts:  # without some of the cotangents, without the gradient for the weight, without D
        asked += [((0,), True, True), ((1, 2, 3), False, True), ((0, 1, 2), False, False), ((), True, False)]
    for left_out, need, has_sparse in asked:
        on = [None if index in left_out else tensor for index, tensor in enumerate(cotangents)]
        sent = [None if tensor is None else tensor.to(device) for tensor in on]
        there = [tensor.to(device) for tensor in sums[has_sparse]]
        arguments = (*sent, q.to(device), b.x, *b.leaves, *saved, *there, b.slope, *b.patches, need)
        found = first_layer.double_backward(*arguments, precision=precision)
        wanted = ops.conv_block_double_backward(
            None, *on, q, *host, *saved_host, *sums[has_sparse], b.slope, True, *patches, False, need, precision
        )
        errors |= compare(f"double {left_out} {need} {has_sparse}", OUTPUTS[2], found, wanted)
    return errors


# --- patch statistics, the end of a residual block ---


def patch_errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """Errors of float64 and float32 images' statistics, and whether they are symmetric and repeat to the bit."""
    errors = {}
    for dtype in (torch.float64, torch.float32) if case.name == "plain" else (torch.float32,):
        x = inputs(case, dtype).constants["x"]
        found = patch_statistics(x.to(device))
        again = patch_statistics(x.to(device)) if case.name == "plain" else found
        for name, one, other, exact in zip(
            ("mean", "covariance"), found, again, patch_definition.patch_statistics(x), strict=True
        ):
            same = one.shape == exact.shape and one.dtype == torch.float64 and torch.equal(one, other)
            errors[f"{dtype} {name}"] = relative_error(one, exact) if same else math.inf
        errors[f"{dtype} asymmetry"] = float((found[1] - found[1].mT).abs().sum())
    return errors


def end_errors(case: Case, device: str = "cpu") -> dict[str, float]:
    """Largest differences from the definition, of values, first and second derivatives, by type."""
    errors = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16) if case.name == "padded" else (torch.float32,):
        results = []
        for function, where in ((residual_end, device), (end_definition.residual_end, "cpu")):
            given = inputs(case, dtype)
            leaves = [tensor.detach().to(where).requires_grad_() for tensor in given.tensors.values()]
            generator = torch.Generator().manual_seed(1)
            out = function(*leaves, **given.constants)
            (q,) = (tensor.requires_grad_() for tensor in like([out], generator))
            first = torch.autograd.grad(out, leaves, q, create_graph=True)
            (second,) = torch.autograd.grad(first, q, like(first, generator))
            results.append([tensor.detach().cpu().double() for tensor in (out, *first, second)])
        if case.tasks:
            names = ("out", "d.x", "d.shortcut", "dd.q")
            for name, one, other in zip(names, *results, strict=True):
                errors[f"{dtype} {name}"] = float((one - other).abs().max() if one.shape == other.shape else math.inf)
    return errors


def missing_numbers(device: str = "cpu") -> list[bool]:
    """Whether a NaN wins its window, wherever it stands."""
    x = torch.zeros(1, 1, 4, 2, 2, device=device)
    for channel, position in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        x[0, 0, channel][position] = math.nan
    return [bool(residual_end(x, x, slope=slope, pool=True, padding=0).isnan().all()) for slope in (0.0, 0.1)]


# --- places ---


def beyond_int32() -> dict[str, float]:
    """Errors of sums over values that lie more than 2^31 behind the first: two tasks, the second one's start."""
    torch.use_deterministic_algorithms(False)  # nothing but the ends is touched
    channels, some, count = 16, 16, (1 << 27) + 64
    generator = torch.Generator().manual_seed(0)

    def far(dtype: torch.dtype, values: Tensor) -> Tensor:
        memory = torch.empty((count + some) * channels, dtype=dtype)
        memory[-some * channels :] = values.flatten().to(dtype)
        memory[: some * channels] = 1
        return memory

    dz, unit = (torch.randn(some, channels, generator=generator).bfloat16() for _ in range(2))
    q, selected, corners = far(dz.dtype, dz), far(unit.dtype, unit), far(torch.uint8, torch.zeros(some, channels))
    start = (1 << 31) + 77
    x = torch.empty(start + 4, dtype=torch.bfloat16)
    x[:4], x[start:] = 1, torch.randn(4, generator=generator)
    sums, sparse = torch.zeros(2, 1, 2, channels).double(), torch.zeros(2, 1, channels, 16)
    sizes = {"H": 2, "W": 2, "CIN": 1, "COUT": channels, "KP": 16, "SLOPE": 0.5, "PRODUCTS": "bfloat16"}
    strides = {"CHANNEL_STRIDE": 4, "ROW_STRIDE": 2, "COLUMN_STRIDE": 1}
    first_layer._reduce[(1, 1, 2)](
        q, x, selected, corners, sums, sparse, count, some, start, 0, **strides, **sizes, BLOCK_P=16, BLOCK_C=16
    )
    torch.use_deterministic_algorithms(True)
    dz, unit = dz.double(), unit.double()
    patch = torch.zeros(9).double()
    patch[[4, 5, 7, 8]] = x[start:].double()
    wanted = {"dbias": dz.sum(0), "dscale": (dz * unit).sum(0), "sparse": dz.sum(0)[:, None] * patch}
    found = {"dbias": sums[1, 0, 0], "dscale": sums[1, 0, 1], "sparse": sparse[1, 0, :, :9]}
    return {name: relative_error(found[name], exact) for name, exact in wanted.items()}


CHECKS: dict[str, Any] = {
    "contract": lambda: {case.name: contract_errors(case, parts=case.name == "first_layer") for case in COMBINED},
    "rounding": lambda: {case.name: rounding(case) for case in ROUNDED},
    "cpp": lambda: blocks.fast_contract(contract_errors, LAYERS["first_layer"]),
    "low": lambda: blocks.fast_products(Layer, FAST),
    "patches": lambda: {case.name: patch_errors(case) for case in PATCH_CASES},
    "ends": lambda: {case.name: end_errors(case) for case in ENDS.values()},
    "missing": missing_numbers,
    "bits": lambda: different_bits(replace(LAYERS["first_layer"], height=11, width=9, images=4)),
    "far": beyond_int32,
}


BLOCKS = {"first_layer_forward": 64, "first_layer_reduce": 64, "first_layer_second": 64, "patch_statistics": 128}


def main() -> None:
    with contextlib.ExitStack() as stack:
        for kernel, block in BLOCKS.items():  # few large blocks: the interpreter takes as long for a small one
            stack.enter_context(launch.trying(kernel, {"BLOCK_P": block}))
        blocks.print_checks(CHECKS)


if __name__ == "__main__":
    main()
