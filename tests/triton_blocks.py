"""What the programs of the general block (triton_conv_block_child.py) and of the first layer share.

A block of a case, its derivatives by the launch functions and by the definition, and what is asked of both.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import interpreter_rounding
import torch
from torch import Tensor

from cxgrad_fast.kernels import registration, use_backend
from cxgrad_fast.kernels.case_calls import call
from cxgrad_fast.kernels.cases import Case, Inputs, inputs

OUTPUTS = (
    ("out", "y", "selected", "corners", "moments"),
    ("dx", "dweight", "dscale", "dbias", "deps", "sparse"),
    ("q", "x", "weight", "scale", "eps", "y"),
)
# from ties and kinks: there a precision decides as float64 does
CLEAR = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 0.1}
FAST = ("tf32", "bfloat16")


class LaunchedBlock:
    """A case's arguments as the launch functions take them; ``leaves`` are those with gradients, named ``LEAVES``."""

    LEAVES: tuple[str, ...]
    leaves: tuple[Tensor, ...]

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.given = inputs(case, dtype, seed=seed)
        self.case, self.dtype, self.device = case, dtype, device
        self.slope = 1.0 if case.slope is None else case.slope
        self.generator = torch.Generator().manual_seed(seed + 1)

    def derivatives(self, q: Tensor, cotangents: list[Tensor], *, precision: str = "float32") -> dict[str, Tensor]:
        """By the three functions: ``out``, first derivatives ``d.weight`` and so on, second ``dd.weight``, ``dd.q``."""
        raise NotImplementedError

    def constants(self, dtype: torch.dtype) -> dict[str, Any]:
        """What the definition is given beside the leaves."""
        raise NotImplementedError

    def keep_last_task(self) -> None:
        self.leaves = tuple(tensor[-1:] for tensor in self.leaves)

    def normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device, like.dtype)

    def definition(self, q: Tensor, cotangents: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The derivatives by autograd through the reference, in a type."""
        leaves = {
            name: tensor.detach().cpu().to(dtype).requires_grad_()
            for name, tensor in zip(self.LEAVES, self.leaves, strict=True)
        }
        q = q.detach().cpu().to(dtype).requires_grad_()
        with use_backend("reference"):
            (out,) = call(self.case, Inputs(leaves, self.constants(dtype)))
            first = torch.autograd.grad(out, list(leaves.values()), q, create_graph=True)
            wanted = {name: tensor for name, tensor in leaves.items() if name != "bias"} | {"q": q}
            sent = [tensor.cpu().to(dtype) for tensor in cotangents]
            second = torch.autograd.grad(first, list(wanted.values()), sent, allow_unused=True, materialize_grads=True)
        found = {"out": out.detach()} | {f"d.{name}": grad.detach() for name, grad in zip(leaves, first, strict=True)}
        return found | {f"dd.{name}": gradient for name, gradient in zip(wanted, second, strict=True)}

    def cotangents(self, precision: str = "float32") -> tuple[Tensor, list[Tensor]]:
        """Random ones; that of the output is zero next to ties and kinks, where precisions take different branches."""
        leaves = dict(zip(self.LEAVES, (tensor.cpu().double() for tensor in self.leaves), strict=True))
        with torch.no_grad(), use_backend("reference"):
            constants = self.constants(torch.float64) | {"slope": None, "pool": False}
            (z,) = call(self.case, Inputs(leaves, constants))
        gap = torch.full_like(z, math.inf)
        if self.case.pool:
            two = z.unfold(3, 2, 2).unfold(4, 2, 2).flatten(5).topk(2, dim=5).values
            z, gap = two[..., 0], two[..., 0] - two[..., 1]
        mask = gap.minimum(z.abs() if self.slope != 1 else gap) > CLEAR[precision]
        q = self.normal(mask.to(self.dtype)) * mask
        return q.to(self.device), [self.normal(tensor) for tensor in self.leaves]


def rounding(block: Callable[..., LaunchedBlock], case: Case, device: str = "cpu", seeds: int = 1) -> dict[str, float]:
    """Float32 error of every result over the framework's own, in the geometric mean over tasks and seeds."""
    ratios: dict[str, list[Tensor]] = {}
    for seed in range(seeds):
        b = block(case, torch.float32, device, seed)
        q, cotangents = b.cotangents()
        exact, own = (b.definition(q, cotangents, dtype) for dtype in (torch.float64, torch.float32))
        found = b.derivatives(q, cotangents)
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


def low_precision(
    block: Callable[..., LaunchedBlock], case: Case, dtype: torch.dtype, precision: str, device: str = "cpu"
) -> dict[str, float]:
    """Relative errors of the fast products; of bfloat16 tensors, over those of the definition in bfloat16."""
    b = block(case, dtype, device)
    q, cotangents = b.cotangents(precision if dtype == torch.float32 else "bfloat16")
    exact, own = (b.definition(q, cotangents, of) for of in (torch.float64, dtype))
    found = b.derivatives(q, cotangents, precision=precision)
    assert all(tensor.dtype == dtype for tensor in found.values())
    for result in (exact, own, found):
        result["dd.q"] = result["dd.q"] * (q != 0).to(result["dd.q"].device)
    errors = {name: relative_error(found[name], wanted) for name, wanted in exact.items()}
    if dtype == torch.float32:
        return errors
    return {name: error / relative_error(own[name], exact[name]) for name, error in errors.items()}


def fast_products(block: Callable[..., LaunchedBlock], case: Case) -> dict[str, Any]:
    """:func:`low_precision` of both precisions of products, and of bfloat16 tensors."""
    of_products = {precision: low_precision(block, case, torch.float32, precision) for precision in FAST}
    return of_products | {"tensors": low_precision(block, case, torch.bfloat16, "float32")}


def assert_fast_products(found: Mapping[str, Mapping[str, float]]) -> None:
    """Of :func:`fast_products`: rounded, and no more; bfloat16 tensors at least as good as the framework's."""
    for precision, least, most in (("tf32", 1e-5, 1e-3), ("bfloat16", 2e-4, 1e-2)):
        errors = found[precision]
        assert least < errors["out"], precision
        assert max(errors.values()) < most, (precision, errors)
        assert errors["d.bias"] < 1e-6, precision  # a sum without products
    assert max(found["tensors"].values()) <= 1.5, found["tensors"]


def different_bits(block: Callable[..., LaunchedBlock], case: Case, device: str = "cpu") -> list[str]:
    """Results whose bits change when they are computed again, or of a task without the others."""
    b = block(case, torch.float32, device)
    q, cotangents = b.cotangents()
    found, again = (b.derivatives(q, cotangents) for _ in range(2))
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, again[name])]
    b.keep_last_task()
    alone = b.derivatives(q[-1:], [tensor[-1:] for tensor in cotangents])
    return changed + [f"{name} alone" for name, tensor in found.items() if not torch.equal(tensor[-1:], alone[name])]


def fast_contract(contract_errors: Callable[..., dict[str, float]], case: Case) -> dict[str, Any]:
    """Errors against the C++ operators, which round in software where no unit does, in every precision of products."""
    return {precision: contract_errors(case, dtype=torch.float32, precision=precision) for precision in FAST}


def assert_fast_contract(found: Mapping[str, Mapping[str, float]]) -> None:
    """Of :func:`fast_contract`: the same factors, so that accuracies of the one speak of the other."""
    assert tuple(found) == FAST
    for precision, errors in found.items():
        assert max(errors.values()) < 2e-6, (precision, errors)


def compare(
    label: str, names: tuple[str, ...], found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]
) -> dict[str, float]:
    """Relative errors of outputs; infinite where shape, type or strides differ."""
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


def print_checks(checks: Mapping[str, Callable[[], Any]]) -> None:
    """What each check found, or each that is named on the command line, as one JSON object."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, fresh memory is NaN
    registration.load()
    interpreter_rounding.install()
    print(json.dumps({name: check() for name, check in checks.items() if name in sys.argv[1:] or not sys.argv[1:]}))
