"""The definition of linear_cross_entropy against one task at a time, and what C++ refuses alike."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, require_cpp
from torch import Tensor

from cxgrad_fast.kernels import linear_cross_entropy, use_backend
from cxgrad_fast.kernels.case_calls import like

BACKENDS = ["reference", "cpp"]
nan, inf = math.nan, math.inf


@pytest.fixture(autouse=True)
def _cpp() -> None:
    require_cpp()


def head(*shape: int, ways: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """x of a shape, weight, bias and labels that fit."""
    g = torch.Generator().manual_seed(seed)
    tasks, images, features = *shape[:2], math.prod(shape[2:])
    x, weight, bias = (torch.randn(*size, generator=g) for size in (shape, (tasks, ways, features), (tasks, ways)))
    labels = torch.randint(ways, (tasks, images), generator=g)
    return *(t.to(dtype).requires_grad_() for t in (x, weight / features**0.5, bias)), labels


@pytest.mark.parametrize("shape", [(2, 3, 7), (1, 4, 2, 3), (3, 1, 2, 3, 4), (2, 2, 2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_framework_task_by_task(backend: str, shape: tuple[int, ...]) -> None:
    """Values, first and second gradients."""
    x, weight, bias, labels = head(*shape)
    with use_backend(backend):
        found = linear_cross_entropy(x, weight, bias, labels)
    logits = [F.linear(images.flatten(1), *affine) for images, *affine in zip(x, weight, bias, strict=True)]
    wanted = torch.stack(list(map(F.cross_entropy, logits, labels))), torch.stack(logits)
    results = []
    for outputs in (found, wanted):
        u = [t.requires_grad_() for t in like(outputs, torch.Generator().manual_seed(1))]
        first = torch.autograd.grad(outputs, (x, weight, bias), u, create_graph=True)
        second = torch.autograd.grad(first, (x, weight, bias, *u), like(first, torch.Generator().manual_seed(2)))
        assert [t.shape for t in (*first, *second)] == [t.shape for t in (x, weight, bias) * 2] + [t.shape for t in u]
        results.append((*outputs, *first, *second))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-14


def test_the_reference_has_third_derivatives() -> None:
    x, weight, bias, labels = head(1, 2, 3, ways=2)

    def second(*leaves: Tensor) -> tuple[Tensor, ...]:
        losses, _ = linear_cross_entropy(*leaves, labels)
        return torch.autograd.grad(losses.sum(), leaves, create_graph=True)

    with use_backend("reference"):
        assert torch.autograd.gradgradcheck(second, (x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_any_integer_type(backend: str, dtype: torch.dtype) -> None:
    *leaves, labels = head(2, 6, 4)
    with use_backend(backend):
        one, other = (linear_cross_entropy(*leaves, given)[0] for given in (labels, labels.to(dtype)))
        assert torch.equal(one, other)
        first, second = (torch.autograd.grad(losses.sum(), leaves) for losses in (one, other))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("label", [-1, 5, -100, 2**40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_no_class_are_refused(backend: str, label: int) -> None:
    """Also the one that the framework leaves out of a mean."""
    x, weight, bias, labels = head(2, 3, 4)
    labels[1, 2] = label
    with use_backend(backend), pytest.raises(ValueError, match=rf"^labels must be from 0 to 4, got {label}$"):
        linear_cross_entropy(x, weight, bias, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x must be [T, S, ...], of which T alone may be 0, got [2, 3]"),
        ({"x": torch.zeros(2, 0, 4)}, "x must be [T, S, ...], of which T alone may be 0, got [2, 0, 4]"),
        ({"x": torch.zeros(2, 3, 2, 2).long()}, "x must be floating point, got torch.int64"),
        ({"weight": torch.zeros(1, 5, 4)}, "weight must be [2, N, 4] (T and D from x), got [1, 5, 4]"),
        ({"weight": torch.zeros(2, 5, 3)}, "weight must be [2, N, 4] (T and D from x), got [2, 5, 3]"),
        ({"weight": torch.zeros(2, 0, 4)}, "weight must have at least one output, got [2, 0, 4]"),
        ({"weight": torch.zeros(2, 5, 4).double()}, "weight must be torch.float32 on cpu like x, got torch.float64"),
        ({"bias": torch.zeros(2, 4)}, "bias must be [2, 5] (T from x, N from weight), got [2, 4]"),
        ({"bias": torch.zeros(2, 5).double()}, "bias must be torch.float32 on cpu like x, got torch.float64 on cpu"),
        ({"labels": torch.zeros(3, 2).long()}, "labels must be [2, 3] (T and S from x), got [3, 2]"),
        ({"labels": torch.zeros(2, 3)}, "labels must be whole numbers, got torch.float32"),
        ({"labels": torch.zeros(2, 3).bool()}, "labels must be whole numbers, got torch.bool"),
        ({"labels": torch.zeros(2, 3, device="meta").long()}, "labels must be on cpu like x, got meta"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals(backend: str, change: dict[str, Tensor], message: str) -> None:
    given = dict(zip(("x", "weight", "bias", "labels"), head(2, 3, 2, 2, dtype=torch.float32), strict=True))
    with use_backend(backend), pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(**given | change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_tasks(backend: str) -> None:
    x, weight, bias, labels = head(0, 3, 2, 2)
    with use_backend(backend):
        losses, logits = linear_cross_entropy(x, weight, bias, labels)
        assert losses.shape == (0,)
        assert logits.shape == (0, 3, 5)
        first = torch.autograd.grad(losses.sum() + logits.sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(sum((t**2).sum() for t in first), (x, weight, bias), allow_unused=True)
    assert [t.shape for t in first] == [t.shape for t in second if t is not None] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_shows_in_its_task(backend: str, value: float) -> None:
    """An infinite logit has no loss, and minus infinity only that of its label: as in the framework."""
    for way, label in itertools.product(range(3), repeat=2):
        x, weight, bias, labels = head(2, 2, 3, ways=3)
        labels[0] = label
        with torch.no_grad():
            bias[0, way] = value
        with use_backend(backend):
            losses, found = linear_cross_entropy(x, weight, bias, labels)
        wanted = F.cross_entropy(found.flatten(0, 1), labels.flatten(), reduction="none").view(2, 2).mean(1)
        torch.testing.assert_close(losses, wanted, equal_nan=True)
        assert losses[1].isfinite()
        (gradient,) = torch.autograd.grad(losses[0], bias)
        assert gradient[0].isfinite().all() == (not losses[0].isnan())
        assert not gradient[1].any()
