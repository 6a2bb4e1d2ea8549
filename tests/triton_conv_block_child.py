"""What tests/test_conv_block_triton.py asks of the general block's kernels, on CUDA or in the interpreter.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: for each of ``CHECKS`` what it found, by case.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from typing import Any

import interpreter_rounding
import torch
from torch import Tensor

from cxgrad_fast.kernels import registration, use_backend
from cxgrad_fast.kernels.case_calls import call
from cxgrad_fast.kernels.cases import CASES, Case, Inputs, inputs

FOLDER = "cxgrad_fast.kernels.conv_block"
forward = importlib.import_module(f"{FOLDER}.forward").forward
backward = importlib.import_module(f"{FOLDER}.backward").backward
double_backward = importlib.import_module(f"{FOLDER}.double_backward").double_backward
convolution = importlib.import_module(f"{FOLDER}.convolution")

OUTPUTS = (
    ("out", "y", "selected", "corners", "moments"),
    ("dx", "dweight", "dscale", "dbias", "deps", "sparse"),
    ("q", "x", "weight", "scale", "eps", "y"),
)
LEAVES = ("x", "weight", "scale", "bias", "eps")
# from ties and kinks: there a precision decides as float64 does
CLEAR = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}

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


class Block:
    """A case's arguments as the launch functions take them."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.given = inputs(case, dtype, seed=seed)
        tensors = {name: tensor.detach().to(device) for name, tensor in self.given.tensors.items()}
        self.case, self.slope = case, 1.0 if case.slope is None else case.slope
        affine = [tensors[name].expand(case.tasks, case.out) for name in ("scale", "bias")]
        eps = tensors.get("eps", torch.full((case.tasks,), case.eps, dtype=dtype, device=device))
        self.leaves = (tensors["x"], tensors["weight"], *affine, eps)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device, like.dtype)


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
    errors = _compare("forward", OUTPUTS[0], found, wanted)
    saved, saved_host = found[1:], wanted[1:]
    q, more = b.normal(wanted[0]), b.normal(wanted[1])
    for name, other in (("backward", None), ("backward+", more)) if parts else (("backward+", more),):
        sent = None if other is None else other.to(device)
        found = backward(q.to(device), sent, *b.leaves, *saved, *options, True, True, precision=precision)
        wanted = ops.conv_block_backward(q, other, *host, *saved_host, *options, *patches, True, True, precision)
        errors |= _compare(name, OUTPUTS[1], found, wanted)
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
            errors |= _compare(f"double{left_out}{needs}", OUTPUTS[2], found, wanted)
    return errors


def _compare(
    label: str, names: tuple[str, ...], found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]
) -> dict[str, float]:
    errors = {}
    for name, one, other in zip(names, found, wanted, strict=True):
        same = (one.shape, one.dtype) == (other.shape, other.dtype) and (
            not one.numel() or one.stride() == other.stride()
        )
        errors[f"{label} {name}"] = relative_error(one, other) if same else math.inf
    return errors


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what is wanted; absolute where that is nothing but rounding."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    if not wanted.numel():
        return 0.0
    if not (found.isfinite().all() and wanted.isfinite().all()):
        return math.inf
    size = float(wanted.norm())
    return float((found - wanted).norm()) / (size if size > 1e-9 else 1.0)


# --- against the definition ---


def derivatives(b: Block, q: Tensor, cotangents: list[Tensor], *, precision: str = "float32") -> dict[str, Tensor]:
    """Output, first and whole second derivatives, put together from the three functions as the chain does."""
    options = (b.slope, b.case.pool)
    out, *saved = forward(*b.leaves, *options, precision=precision)
    first = backward(q, None, *b.leaves, *saved, *options, True, True, precision=precision)
    second = double_backward(*cotangents, q, *b.leaves, *saved, *first[2:4], *options, True, True, precision=precision)
    nothing = torch.zeros_like(q)
    pushed = backward(nothing, second[5], *b.leaves, *saved, *options, True, True, precision=precision)
    found = {"out": out} | {f"d.{name}": gradient for name, gradient in zip(LEAVES, first, strict=False)}
    found |= {"dd.q": second[0], "dd.scale": second[3], "dd.eps": second[4]}
    return found | {"dd.x": second[1] + pushed[0], "dd.weight": second[2] + pushed[1]}


def definition(b: Block, q: Tensor, cotangents: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by autograd through the reference, in a precision."""
    leaves = [tensor.detach().cpu().to(dtype).requires_grad_() for tensor in b.leaves]
    q = q.detach().cpu().to(dtype).requires_grad_()
    with use_backend("reference"):
        (out,) = call(b.case, Inputs(dict(zip(LEAVES, leaves, strict=True)), _constants(b)))
        first = torch.autograd.grad(out, leaves, q, create_graph=True)
        wanted = [leaves[0], leaves[1], leaves[2], leaves[4], q]
        sent = [tensor.cpu().to(dtype) for tensor in cotangents]
        second = torch.autograd.grad(first, wanted, sent, allow_unused=True, materialize_grads=True)
    found = {"out": out.detach()} | {f"d.{name}": tensor.detach() for name, tensor in zip(LEAVES, first, strict=True)}
    return found | dict(zip(("dd.x", "dd.weight", "dd.scale", "dd.eps", "dd.q"), second, strict=True))


def _constants(b: Block) -> dict[str, Any]:
    return {name: value for name, value in b.given.constants.items() if name != "eps"}


def _decided(b: Block, precision: str) -> Tensor:
    """Which outputs are away from ties and kinks in float64: there every precision takes the same branches."""
    leaves = dict(zip(LEAVES, (tensor.cpu().double() for tensor in b.leaves), strict=True))
    with torch.no_grad(), use_backend("reference"):
        (z,) = call(b.case, Inputs(leaves, _constants(b) | {"slope": None, "pool": False}))
    gap = torch.full_like(z, math.inf)
    if b.case.pool:
        two = z.unfold(3, 2, 2).unfold(4, 2, 2).flatten(5).topk(2, dim=5).values
        z, gap = two[..., 0], two[..., 0] - two[..., 1]
    return gap.minimum(z.abs() if b.slope != 1 else gap) > CLEAR[precision]


def _cotangents(b: Block, precision: str = "float32") -> tuple[Tensor, list[Tensor]]:
    mask = _decided(b, precision)
    q = b.normal(mask.to(b.leaves[0].dtype)) * mask
    device = b.leaves[0].device
    return q.to(device), [b.normal(tensor) for tensor in b.leaves]


def rounding(case: Case, device: str = "cpu", seeds: int = 1) -> dict[str, float]:
    """Float32 error of every result over the framework's own, in the geometric mean over tasks and seeds."""
    ratios: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        b = Block(case, torch.float32, device, seed)
        q, cotangents = _cotangents(b)
        exact, own = (definition(b, q, cotangents, dtype) for dtype in (torch.float64, torch.float32))
        found = derivatives(b, q, cotangents)
        for name, wanted in exact.items():
            if wanted.norm() > 1e-9:
                one, other = (_by_task(result[name], wanted) for result in (found, own))
                ratios.setdefault(name, []).append(one / other)
    return {name: math.exp(float(torch.cat(found).log().mean())) for name, found in ratios.items()}


def _by_task(found: Tensor, wanted: Tensor) -> Tensor:
    tasks = len(wanted)
    difference = (found.cpu().double() - wanted).reshape(tasks, -1).norm(dim=1)
    # below half a place, being right is luck
    return (difference / wanted.reshape(tasks, -1).norm(dim=1)).clamp_min(2**-24)


def low_precision(dtype: torch.dtype, precision: str, device: str = "cpu") -> dict[str, float]:
    """Relative errors of the fast products; of bfloat16 tensors, over those of the definition in bfloat16."""
    b = Block(replace(SMALL["plain"], channels=8), dtype, device)
    q, cotangents = _cotangents(b, precision if dtype == torch.float32 else "bfloat16")
    exact = definition(b, q, cotangents, torch.float64)
    found = derivatives(b, q, cotangents, precision=precision)
    assert all(tensor.dtype == dtype for tensor in found.values())
    for result in (exact, found):
        result["dd.q"] = result["dd.q"] * (q != 0).to(result["dd.q"].device)
    errors = {name: relative_error(found[name], wanted) for name, wanted in exact.items()}
    if dtype == torch.float32:
        return errors
    own = definition(b, q, cotangents, dtype)
    own["dd.q"] = own["dd.q"] * (q != 0).cpu()
    return {name: error / relative_error(own[name], exact[name]) for name, error in errors.items()}


# --- bits, places ---


def different_bits(case: Case, device: str = "cpu") -> list[str]:
    """Results whose bits change when they are computed again, or of a task without the others."""
    b = Block(case, torch.float32, device)
    q, cotangents = _cotangents(b)
    found, again = (derivatives(b, q, cotangents) for _ in range(2))
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, again[name])]
    b.leaves = tuple(tensor[-1:] for tensor in b.leaves)
    alone = derivatives(b, q[-1:], [tensor[-1:] for tensor in cotangents])
    return changed + [f"{name} alone" for name, tensor in found.items() if not torch.equal(tensor[-1:], alone[name])]


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
    "low": lambda: {
        "tf32": low_precision(torch.float32, "tf32"),
        "bfloat16": low_precision(torch.float32, "bfloat16"),
        "tensors": low_precision(torch.bfloat16, "float32"),
    },
    "cpp": lambda: {
        precision: contract_errors(SMALL["plain"], dtype=torch.float32, precision=precision)
        for precision in ("tf32", "bfloat16")
    },
    "bits": lambda: different_bits(replace(SMALL["no_pool"], images=6, height=5, width=5)),
    "far": beyond_int32,
}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, fresh memory is NaN
    registration.load()
    interpreter_rounding.install()
    print(json.dumps({name: check() for name, check in CHECKS.items() if name in sys.argv[1:] or not sys.argv[1:]}))


if __name__ == "__main__":
    main()
