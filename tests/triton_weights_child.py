"""What tests/test_weights_triton.py asks of the operators on weights, on CUDA or in the interpreter.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: for each of ``CHECKS`` what it found, by case.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cxgrad_fast.kernels import launch, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives
from cxgrad_fast.kernels.cases import CASES, Case, Inputs, inputs

OPERATORS = ("scale_weights", "normalize_weights")
SMALL = [case for case in CASES if case.operator in OPERATORS and not case.large]
OWN = Case("scale_weights", "", "a case of the Triton kernels' own")
SHAPES = {
    "one_launch": replace(OWN, weights=((48, 48, 3, 1), (27,), (2048,), (2049,))),
    "two_launches": replace(OWN, tasks=1, weights=((7, 3), (41000,))),  # the second is more than a program sums alone
    # the rest in blocks of 64, to be quick
    "blocks": replace(OWN, weights=((150,), (64,), (65,), (1, 2))),
    "summed_blocks": replace(OWN, weights=((150,), (64,), (65,), (1, 2))),
    "summed_blocks_shared": replace(OWN, tasks=3, shared_affine=True, weights=((150,), (64,))),
    "17_layers": replace(OWN, tasks=1, weights=tuple((size, 2) for size in range(1, 18))),
    "spans": replace(OWN, tasks=3, weights=((150,), (40,))),  # a program makes more than one block
    "many_tasks_shared": replace(OWN, tasks=9, shared_affine=True, weights=((3, 9), (25,))),
}
SMALL_BLOCKS = {"BLOCK": 64, "num_warps": 1}
NORMALIZED = ("blocks", "summed_blocks", "summed_blocks_shared")  # by the same kernels
COMBINED = [
    *(replace(case, name=key) for key, case in SHAPES.items()),
    *(replace(SHAPES[key], operator="normalize_weights", name=key) for key in NORMALIZED),
]
STEPS = [case for case in CASES if case.operator == "gradient_step" and not case.large]
BY_NAME = {f"{case.operator}-{case.name}": case for case in (*SMALL, *COMBINED, *STEPS)}
ROUNDED = ("scale_weights-two_layers", "normalize_weights-summed_blocks", "gradient_step-scaled")
CHANGED = ("scale_weights-spans", "scale_weights-summed_blocks", "gradient_step-long_rows")


@contextmanager
def in_triton(case: Case) -> Iterator[None]:
    """Compute on Triton, in the blocks that the case is for."""
    settings = {} if case.name in ("one_launch", "two_launches") else SMALL_BLOCKS
    if case.name.startswith("summed"):
        settings = settings | {"LAUNCHES": 2}
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.enter_context(launch.trying("weights", settings))
        if case.name == "spans":
            stack.enter_context(patch("cxgrad_fast.kernels.scale_weights.triton._PROGRAMS", 4))
        yield


def errors(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, float]:
    """Relative errors of outputs, first and second derivatives against the definition in float64."""
    given = inputs(case, dtype)
    with in_triton(case):
        found = derivatives(case, on(given, device))
    with use_backend("reference"):
        wanted = derivatives(case, given.to(torch.float64))
    assert set(found) == set(wanted)
    return {name: relative_error(found[name], exact, dtype) for name, exact in wanted.items()}


def relative_error(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """Norm of the difference over that of what is wanted; absolute where that is nothing but rounding."""
    if (found.shape, found.dtype) != (wanted.shape, dtype) or not found.is_contiguous():
        return math.inf
    if not wanted.numel():
        return 0.0
    size = float(wanted.norm())
    error = float((found.cpu().double() - wanted).norm()) / (size if size > 1e-14 else 1.0)
    return error if math.isfinite(error) else math.inf


def on(given: Inputs, device: str) -> Inputs:
    tensors = {name: tensor.detach().to(device).requires_grad_() for name, tensor in given.tensors.items()}
    return Inputs(tensors, given.constants)


def rounding(case: Case, device: str = "cpu") -> dict[str, float]:
    """Float32 error of every result over twice the framework's own and half a last place."""
    single = inputs(case, torch.float32)
    with in_triton(case):
        found = derivatives(case, on(single, device))
    with use_backend("reference"):
        own, exact = derivatives(case, single), derivatives(case, single.to(torch.float64))
    ratios = {}
    for name, wanted in exact.items():
        error, allowed = (float((result[name].cpu().double() - wanted).norm()) for result in (found, own))
        ratios[name] = error / (2 * allowed + 3e-8 * float(wanted.norm()) + 1e-30)
    return ratios


def different_bits(case: Case, device: str = "cpu") -> list[str]:
    """Results whose bits change when they are computed again, or of the last task without the others."""

    def last(tensor: Tensor) -> Tensor:
        return tensor.detach()[-1:].clone().requires_grad_()

    given = on(inputs(case, torch.float32), device)
    alone = Inputs({name: last(tensor) for name, tensor in given.tensors.items()}, given.constants)
    runs = []
    with in_triton(case):
        for arguments in (given, given, alone):
            outputs = call(case, arguments)
            leaves = list(arguments.tensors.values())
            first = torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs], create_graph=True)
            second = torch.autograd.grad(first, leaves, [tensor.detach() for tensor in leaves])
            runs.append([*outputs, *first, *second])
    again, rows = zip(*runs[:2], strict=True), zip(*runs[::2], strict=True)
    changed = [f"{place} again" for place, (one, other) in enumerate(again) if one.ne(other).any()]
    return changed + [f"{place} alone" for place, (one, other) in enumerate(rows) if one[-1:].ne(other).any()]


def zero_weight(device: str = "cpu") -> list[bool]:
    """Where the results of a weight of zeros, and of another beside it, are no numbers: as the definition has it."""
    weights, gammas = [torch.zeros(2, 3), torch.ones(2, 3)], torch.ones(2, 2)
    given = Inputs({"weights.0": weights[0], "weights.1": weights[1], "gammas": gammas}, {})
    found = []
    for operator in OPERATORS:
        outputs = []
        for backend in ("triton", "reference"):
            with use_backend(backend):
                outputs.append(call(replace(OWN, operator=operator), on(given, device)))
        found += [bool((one.isnan() == other.isnan()).all()) for one, other in zip(*outputs, strict=True)]
    return found


CHECKS: dict[str, Any] = {
    "float64": lambda: {name: errors(case) for name, case in BY_NAME.items()},
    "rounding": lambda: {name: rounding(BY_NAME[name]) for name in ROUNDED},
    "bits": lambda: {name: different_bits(BY_NAME[name]) for name in CHANGED},
    "bfloat16": lambda: errors(BY_NAME["scale_weights-odd_ranks"], dtype=torch.bfloat16),
    "zero": zero_weight,
}


def quicken() -> None:
    """Take a third of the interpreter's time: a launch prepares Triton's language, and our calls in it do so again."""
    from triton.runtime.interpreter import InterpretedFunction

    whole = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__module__.startswith("cxgrad_fast")
        return self.rewrite()(*args, **kwargs) if ours else whole(self, *args, **kwargs)

    InterpretedFunction.__call__ = call


def main() -> None:
    quicken()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, fresh memory is NaN
    print(json.dumps({name: check() for name, check in CHECKS.items()}))


if __name__ == "__main__":
    main()
