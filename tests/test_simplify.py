"""The passes over traced programs: fewer calls, the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from helpers import require_cpp
from torch import Tensor

from cxgrad_fast.engine.flat import Flat

ops = torch.ops.cxgrad_fast


@pytest.fixture(autouse=True)
def _cpp() -> None:
    require_cpp()


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def check(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], calls: int) -> Flat:
    """A program of so many calls that gives the function's bits."""
    flat = Flat(function, inputs)
    for ours, theirs in zip(flat(*inputs), function(*inputs), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert flat.calls == calls, flat.source
    return flat


def test_views_that_change_nothing_go() -> None:
    def function(a: Tensor) -> list[Tensor]:
        return [a.view_as(a).expand(2, 3).view(6).view(2, 3).exp(), a.t().t().cos()]

    check(function, drawn((2, 3)), 2)


def test_a_view_that_changes_strides_stays() -> None:
    check(lambda a: [a.expand(4, 3) * 2], drawn((1, 3)), 2)


def test_a_chain_of_additions_is_one_call_in_its_order() -> None:
    """(1 + 1e8) - 1e8 is not 1 + (1e8 - 1e8)."""

    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
        return [d + ((a + b) + c)]

    inputs = [torch.full((3,), value) for value in (1.0, 1e8, -1e8, 3.0)]
    check(function, inputs, 1)


def test_sums_that_can_wait_are_one_call() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        first, second = a + b, a * b
        third = second + a
        return [first, third + b, second]

    check(function, drawn((4, 5), (4, 5)), 2)


def test_sums_that_need_each_other_are_calls_of_their_own() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        first = a + b + a
        second = first.exp()
        return [first * 2, second + b + a]

    check(function, drawn((4, 5), (4, 5)), 4)


def test_a_sum_of_sums() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        return [(a + b) + (b + c) + c, (a + a) + (c + c)]

    flat = Flat(function, drawn((7,), (7,), (7,)))
    inputs = drawn((7,), (7,), (7,))
    for ours, theirs in zip(flat(*inputs), function(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert flat.calls == 3  # b + c and c + c are terms, which a result waits for


@pytest.mark.parametrize(
    ("shapes", "calls"),
    [
        ([(2, 3), (3,)], 2),  # broadcast
        ([(600, 600), (600, 600)], 2),  # 1.4 MB: not kept waiting
    ],
)
def test_what_is_not_joined(shapes: list[tuple[int, ...]], calls: int) -> None:
    check(lambda a, b: [(a + b) + b], drawn(*shapes), calls)


def test_other_layouts_are_not_joined() -> None:
    inputs = [torch.randn(3, 4).t(), torch.randn(3, 4).t()]
    check(lambda a, b: [(a + b) + b], inputs, 2)


def test_different_types_are_not_joined() -> None:
    inputs = [torch.randn(3), torch.randn(3).double(), torch.randn(3).double()]
    check(lambda a, b, c: [(a + a) + a, (b + c) + b, (a + b) + b], inputs, 3)


@pytest.mark.parametrize("size", [1, 17, 4096, 100_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator(size: int, dtype: torch.dtype) -> None:
    terms = [torch.randn(size, dtype=dtype) for _ in range(5)]
    found = ops.sums([*terms, terms[0]], [2, 4])
    assert torch.equal(found[0], terms[0] + terms[1])
    assert torch.equal(found[1], ((terms[2] + terms[3]) + terms[4]) + terms[0])


@pytest.mark.parametrize(
    ("terms", "counts", "message"),
    [
        (drawn((2,), (2,)), [1, 1], "counts must be of at least 2"),
        (drawn((2,), (2,)), [3], "counts must be of at least 2 and add up to 2"),
        (drawn((2,), (2,), (2,)), [2], "counts must add up to 3"),
        (drawn((2,), (3,)), [2], r"terms\[1\] must be \[2\]"),
        ([torch.ones(2, 2).t(), torch.ones(3, 2)[:2, :2].t()], [2], "must be contiguous"),
    ],
)
def test_refusals(terms: list[Tensor], counts: list[int], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.sums(terms, counts)
