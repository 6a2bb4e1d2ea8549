"""Every C++ operator over the table of cases: right, as the registered operator too, deterministic, twice derivable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import OperatorCalls, assert_bits_repeat, opcheck, relative_error
from torch import Tensor

from cxgrad_fast.kernels import backends, registration, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, margin
from cxgrad_fast.kernels.cases import CASES, Case, Inputs, inputs
from cxgrad_fast.kernels.scale_weights.cpp import scale_weights

OPERATORS = (
    "scale_weights",
    "normalize_weights",
    "patch_statistics",
    "residual_end",
    "scaling_factors",
    "linear_cross_entropy",
)
SMALL = [case for case in CASES if case.operator in OPERATORS and not case.large]
PRODUCTION = [case for case in CASES if case.operator in OPERATORS and case.large and "5w1s" in case.name]
DIFFERENTIABLE = [case for case in SMALL if case.operator != "patch_statistics" and case.tasks]
# no window of equal values, where a derivative is a choice
SMOOTH = [case for case in DIFFERENTIABLE if case.content != "ties"]
CHECKED = [case for case in SMOOTH if case.name not in ("odd_ranks", "many_features")]  # few enough numbers
# of torch's own: twice, and half a last place where torch happens to be exact
FACTOR, ROUNDING = 2, 3e-8


def name_of(case: Case) -> str:
    return f"{case.operator}-{case.name}"


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    with use_backend("cpp"):
        yield


@pytest.fixture(params=["eager", "registered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Functions, and through the operators in torch.ops."""
    if request.param == "registered":
        monkeypatch.setattr(registration, "_traced", lambda: True)


def test_the_extension_is_what_is_tested() -> None:
    assert backends.availability()["cpp"] == ""
    with OperatorCalls() as calls:
        for case in SMALL:
            derivatives(case, inputs(case))
    orders = ("", "_backward", "_double_backward")
    derivable = [name for name in OPERATORS if name != "patch_statistics"]
    assert set(calls.last) == {"patch_statistics", *(name + order for name in derivable for order in orders)}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_float64_equals_the_reference(case: Case) -> None:
    given = inputs(case)
    found = derivatives(case, given)
    with use_backend("reference"):
        wanted = derivatives(case, given)
    assert set(found) == set(wanted)
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype, name
        assert relative_error(found[name], expected) < 1e-13 or expected.norm() < 1e-14, name


@pytest.mark.parametrize(
    "case",
    SMOOTH + [case for case in PRODUCTION if case.operator.endswith(("weights", "factors"))],
    ids=name_of,
)
def test_float32_error_is_at_most_twice_the_reference_s(case: Case) -> None:
    seed = next(seed for seed in range(20) if margin(case, inputs(case, seed=seed)) > 1e-4)
    single = inputs(case, torch.float32, seed=seed)
    found = derivatives(case, single)
    with use_backend("reference"):
        own, wanted = derivatives(case, single), derivatives(case, single.to(torch.float64))
    for name, exact in wanted.items():
        error, allowed = ((result[name].double() - exact).norm() for result in (found, own))
        assert error <= FACTOR * allowed + ROUNDING * exact.norm(), f"{name}: {error:.2e}, the reference {allowed:.2e}"


@pytest.mark.slow
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", CHECKED, ids=name_of)
def test_gradcheck(case: Case) -> None:
    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call(small, Inputs(dict(zip(given.tensors, tensors, strict=True)), given.constants))

    small = replace(case, weights=tuple((min(2, shape[0]), *shape[1:]) for shape in case.weights))
    given = inputs(small)
    leaves = tuple(given.tensors.values())
    assert torch.autograd.gradcheck(flat, leaves)
    assert torch.autograd.gradgradcheck(flat, leaves)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: str) -> None:
    (case,) = [case for case in SMALL if case.operator == operator and case.name in ("shared", "plain")]
    with OperatorCalls() as calls:
        derivatives(case, inputs(case))
    assert len(calls.last) == (1 if operator == "patch_statistics" else 3)
    for name, (function, args) in calls.last.items():
        # the last one has no derivative to compare
        prepare = torch.Tensor.detach if name.endswith("double_backward") or operator == "patch_statistics" else leaf
        opcheck(function, mapped(prepare, args))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def mapped(prepare: Callable[[Tensor], Tensor], args: Any) -> Any:
    if isinstance(args, Tensor):
        return prepare(args)
    return type(args)(mapped(prepare, arg) for arg in args) if isinstance(args, list | tuple) else args


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", [case for case in DIFFERENTIABLE if case.name in ("shared", "plain")], ids=name_of)
def test_third_derivatives_are_refused(case: Case) -> None:
    given = inputs(case)
    leaves = list(given.tensors.values())
    outputs = call(case, given)
    first = torch.autograd.grad([(output**2).sum() for output in outputs], leaves, create_graph=True)
    second = torch.autograd.grad([(gradient**2).sum() for gradient in first], leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"third derivatives of cxgrad_fast::{case.operator} are not there"):
        torch.autograd.grad([gradient.sum() for gradient in second], leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PRODUCTION, ids=name_of)
def test_bits_repeat_on_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    assert_bits_repeat(case, inputs(case, dtype))


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_every_number_is_written(case: Case) -> None:
    """Fresh memory is NaN here: torch's in its deterministic mode, the buffers that are used again by their switch."""
    given = inputs(case)
    plain = derivatives(case, given)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.ops.cxgrad_fast.poison_buffers(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = derivatives(case, given)
    finally:
        torch.ops.cxgrad_fast.poison_buffers(False)
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(poisoned[name], expected) for name, expected in plain.items())


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=name_of)
def test_strides_do_not_matter(case: Case) -> None:
    given = inputs(case)
    scattered = Inputs({name: scatter(tensor) for name, tensor in given.tensors.items()}, given.constants)
    assert not any(tensor.is_contiguous() for tensor in scattered.tensors.values() if tensor.numel() > 1)
    found, wanted = derivatives(case, scattered), derivatives(case, given)
    assert all(torch.equal(found[name], expected) for name, expected in wanted.items())


def scatter(tensor: Tensor) -> Tensor:
    """The same values as every second one of a wider tensor of NaN."""
    wide = tensor.detach().new_full((*tensor.shape, 2), float("nan"))
    wide[..., 0] = tensor.detach()
    return wide[..., 0].requires_grad_()


def test_readable_refusals() -> None:
    ops = torch.ops.cxgrad_fast
    w, gammas = [torch.ones(2, 3), torch.ones(1, 4, 5)], torch.ones(2, 2)
    x = torch.ones(1, 1, 1, 2, 2)

    def end(x: Tensor, shortcut: Tensor) -> Any:
        return ops.residual_end(x, shortcut, 0.1, True, 0)

    refusals: dict[str, Callable[[], Any]] = {
        "weights must hold at least one tensor, got none": lambda: ops.scale_weights([], gammas),
        "gammas must be [T, L], got [2]": lambda: ops.scale_weights(w, torch.ones(2)),
        "gammas must be [T, 2] (one a task and weight), got [2, 3]": lambda: ops.scale_weights(w, torch.ones(2, 3)),
        "weights[0] must be [3 or 1, ...] (T tasks), got [2, 3]": lambda: ops.scale_weights(w, torch.ones(3, 2)),
        "gammas must be Float on cpu like weights[0], got Double": lambda: ops.scale_weights(w, gammas.double()),
        "weights[0] must be Float or Double, got Half": lambda: ops.scale_weights([v.half() for v in w], gammas),
        "weights[0] must hold at least one value a task, got [2, 0]": lambda: ops.normalize_weights([torch.ones(2, 0)]),
        "v[1] must be [2, 4, 5] (a scaled weight), got [1, 4, 5]": lambda: ops.scale_weights_backward(w, gammas, w),
        "v must hold 2 tensors (one a weight), got 1": lambda: ops.scale_weights_backward(w, gammas, w[:1]),
        "n must be [T, 2] (one a task and weight), got [2]": lambda: ops.normalize_weights_backward(w, w, gammas[0]),
        "x must be [T, S, C, H, W], got [2, 3]": lambda: ops.patch_statistics(w[0]),
        "x must be Float or Double, got Half": lambda: ops.patch_statistics(torch.ones(1, 1, 1, 2, 2).half()),
        "shortcut must be [1, 1, 1, 2, 2] (like x), got [1, 1, 1, 2, 3]": lambda: end(x, torch.ones(1, 1, 1, 2, 3)),
        "shortcut must be Float on cpu like x, got Double": lambda: end(x, x.double()),
        "padding must be 0 or 1, got 2": lambda: ops.residual_end(x, x, 0.1, True, 2),
        "slope must be finite and not negative, got -1": lambda: ops.residual_end(x, x, -1.0, True, 0),
        "codes must be [1, 1, 1, 1, 1] (the forward operator's output), got [1, 1, 1, 2, 2]": lambda: (
            ops.residual_end_backward(x[..., :1, :1], x.byte(), 2, 2, 0.1, True, 0)
        ),
    }
    for message, refused in refusals.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()


def test_one_opaque_node_while_tracing() -> None:
    nodes: list[Any] = []

    def compiler(module: torch.fx.GraphModule, examples: Any) -> Any:
        nodes.extend(node.target for node in module.graph.nodes if node.op == "call_function")
        return module

    weight, gammas = torch.randn(2, 3, 4, requires_grad=True), torch.rand(2, 1)
    compiled = torch.compile(lambda w, g: scale_weights([w], g)[0] * 2, backend=compiler, fullgraph=True)
    found = compiled(weight, gammas)
    assert torch.ops.cxgrad_fast.scale_weights in nodes
    assert len(nodes) == 3  # it, the entry of its list, the product
    torch.testing.assert_close(found, scale_weights([weight], gammas)[0] * 2)
