"""gradient_step over the table of cases: against the definition in float64, to the second derivative; registration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import OperatorCalls, assert_bits_repeat, opcheck, relative_error, require_cpp
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cxgrad_fast.kernels import gradient_step, registration, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives
from cxgrad_fast.kernels.cases import CASES, Case, inputs

SMALL = [case for case in CASES if case.operator == "gradient_step" and not case.large]
FEW = [case for case in SMALL if case.name in ("plain", "scaled", "factors", "divisors", "shared")]
BY_NAME = {case.name: case for case in SMALL}


def name_of(case: Case) -> str:
    return case.name


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    require_cpp()
    with use_backend("cpp"):
        yield


@pytest.mark.parametrize("case", FEW, ids=name_of)
@pytest.mark.parametrize("way", ["eager", "registered"])
def test_gradcheck(case: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "registered":
        monkeypatch.setattr(registration, "_traced", lambda: True)
    given = inputs(case)
    names, tensors = list(given.tensors), tuple(given.tensors.values())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return call(case, type(given)(dict(zip(names, values, strict=True)), given.constants))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", SMALL, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(case: Case, dtype: torch.dtype) -> None:
    """Not further from float64 than twice the definition's own rounding, and in float64 to the last places."""
    given = inputs(case, dtype)
    with use_backend("reference"):
        exact = derivatives(case, given.to(torch.float64))
        theirs = derivatives(case, given)
    ours = derivatives(case, given)
    for name, value in exact.items():
        if value.numel():
            rounding = relative_error(theirs[name].double(), value) if dtype == torch.float32 else 0.0
            least = {torch.float32: 1e-7, torch.float64: 1e-14}[dtype]
            assert relative_error(ours[name].double(), value) <= max(2 * rounding, least), name


@pytest.mark.parametrize("case", [BY_NAME["scaled"], BY_NAME["divisors"]], ids=name_of)
def test_bits_repeat(case: Case) -> None:
    assert_bits_repeat(case, inputs(case))


def test_one_call_an_order_and_one_weight_for_all_tasks_is_not_copied() -> None:
    case = BY_NAME["shared"]
    given = inputs(case)
    with OperatorCalls() as calls:
        outputs = call(case, given)
        torch.autograd.grad(outputs, list(given.tensors.values()), [torch.ones_like(each) for each in outputs])
    assert calls.names() == ["gradient_step", "gradient_step_backward"]


@pytest.mark.parametrize("case", FEW, ids=name_of)
def test_opcheck(case: Case) -> None:
    given = inputs(case, torch.float32)
    with OperatorCalls() as calls:
        outputs = call(case, given)
        torch.autograd.grad(outputs, list(given.tensors.values()), [torch.ones_like(each) for each in outputs])
    for operator, arguments in calls.calls:
        opcheck(operator, arguments)


def test_what_is_not_wanted_is_not_computed() -> None:
    """First order: the gradients are constants."""
    case = BY_NAME["scaled"]
    given = inputs(case).tensors
    weights, gradients = ([given[f"{kind}.{k}"] for k in range(3)] for kind in ("weights", "gradients"))
    constants = [gradient.detach() for gradient in gradients]
    with OperatorCalls() as calls:
        outputs = gradient_step(weights, constants, 0.1, factors=given["factors"], divisors=given["divisors"].detach())
        found = torch.autograd.grad(outputs, [*weights, given["factors"]], [torch.ones_like(each) for each in outputs])
    _, arguments = calls.last["gradient_step_backward"]
    assert list(arguments[-1]) == [True, False, False, True, False]
    with use_backend("reference"):
        outputs = gradient_step(weights, constants, 0.1, factors=given["factors"], divisors=given["divisors"])
        expected = torch.autograd.grad(
            outputs, [*weights, given["factors"]], [torch.ones_like(each) for each in outputs]
        )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_traced() -> None:
    case = BY_NAME["scaled"]
    given = inputs(case)
    names = list(given.tensors)

    def function(*values: Tensor) -> list[Tensor]:
        named = type(given)(dict(zip(names, values, strict=True)), given.constants)
        return list(call(case, named))

    graph = make_fx(function)(*given.tensors.values()).graph
    assert sum("gradient_step" in str(node.target) for node in graph.nodes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradients": []}, r"gradients must hold 2 tensors \(one a weight\), got 0"),
        (
            {"gradients": [torch.ones(2, 3), torch.ones(2, 5)]},
            r"gradients\[1\] must be \[2, 4\] \(T from weights\[0\]\)",
        ),
        ({"weights": [torch.ones(2, 3), torch.ones(1, 4)]}, r"weights\[1\] must be \[2, 4\]"),
        ({"weights": []}, "weights must hold at least one tensor, got none"),
        ({"rates": torch.ones(2, 3)}, r"rates must be \[2 or 1, 2\]"),
        ({"factors": torch.ones(2, 3)}, r"factors must be of 1 to 2 weights, got \[2, 3\]"),
        ({"divisors": torch.ones(1, 2)}, r"divisors must be \[2, L\]"),
        ({"divisors": torch.ones(2, 2, dtype=torch.float64)}, "divisors must be torch.float32 on cpu like weights"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_refusals(change: dict[str, object], message: str, backend: str) -> None:
    tensors = [torch.ones(2, 3), torch.ones(2, 4)]
    arguments: dict[str, object] = {"weights": tensors, "gradients": tensors, "rates": 0.1} | change
    numbers = {name: arguments.pop(name, None) for name in ("factors", "divisors")}
    with use_backend(backend), pytest.raises(ValueError, match=message):
        gradient_step(*arguments.values(), **numbers)  # type: ignore[arg-type]
