"""scale_weights and normalize_weights against the closed forms of MATH.md 3, first and second order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers import relative_error
from torch import Tensor

from cxgrad_fast.kernels import normalize_weights, scale_weights, use_backend


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("shape", [(3, 4, 2, 3, 3), (1, 5, 1, 3, 3), (2, 1, 1, 1, 1)])
def test_closed_forms(shape: tuple[int, ...]) -> None:
    w, gamma = draw(*shape).requires_grad_(), (draw(len(draw(*shape)), 1, seed=1).abs() + 0.1).requires_grad_()
    v, big_a, c = draw(*shape, seed=2).requires_grad_(), draw(*shape, seed=3), draw(len(gamma), 1, seed=4)

    (scaled,) = scale_weights([w], gamma)
    first = torch.autograd.grad(scaled, (w, gamma), v, create_graph=True)
    second = torch.autograd.grad(first, (v, gamma, w), (big_a, c))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).view(-1, *[1] * (w.ndim - 1))

    g, factor, n = gamma.detach().view(-1, 1, 1, 1, 1), c.view(-1, 1, 1, 1, 1), dot(w, w).sqrt()
    unit, h = w / n, g / n
    s, t, q = dot(unit, v), dot(unit, big_a), dot(big_a, v)
    expected = {
        "value": (scaled, g * unit),
        "w_bar": (first[0], h * (v - unit * s)),
        "gamma_bar": (first[1], s.view(-1, 1)),
        "v": (second[0], h * (big_a - unit * t) + factor * unit),
        "gamma": (second[1], ((q - s * t) / n).view(-1, 1)),
        "w": (
            second[2],
            -(h / n) * (q - s * t) * unit
            + (-h * (t * v + s * big_a) + factor * v - unit * (-2 * h * s * t + factor * s)) / n,
        ),
    }
    for name, (actual, wanted) in expected.items():
        assert relative_error(actual, wanted) < 1e-12 or wanted.norm() < 1e-14, name


def test_layers_tasks_and_shared_weights() -> None:
    """Several layers of several shapes; a weight shared by the tasks gets the sum of their gradients."""
    shared, own = draw(1, 3, 2, 3, 3).requires_grad_(), draw(4, 2, 3, 3, 3, seed=1).requires_grad_()
    gammas = draw(4, 2, seed=2).abs() + 0.1
    a, b = scale_weights([shared, own], gammas)
    assert a.shape == (4, 3, 2, 3, 3)
    assert b.shape == own.shape
    for task in range(4):
        assert relative_error(a[task], gammas[task, 0] * shared[0] / shared.norm()) < 1e-14
        assert relative_error(b[task], gammas[task, 1] * own[task] / own[task].norm()) < 1e-14
    v = draw(4, 3, 2, 3, 3, seed=5)
    (together,) = torch.autograd.grad(a, shared, v)
    apart = draw(1, 3, 2, 3, 3).expand(4, -1, -1, -1, -1).clone().requires_grad_()
    (each,) = torch.autograd.grad(scale_weights([apart, own], gammas)[0], apart, v)
    assert relative_error(together, each.sum(0, keepdim=True)) < 1e-13


def test_normalize_weights() -> None:
    shared, own = draw(1, 3, 2, 3, 3), draw(4, 2, 3, 3, 3, seed=1)
    units, norms = normalize_weights([shared, own])
    assert [unit.shape for unit in units] == [shared.shape, own.shape]
    assert norms.shape == (4, 2)
    torch.testing.assert_close(norms[:, 1], own.flatten(1).norm(dim=1))
    torch.testing.assert_close(norms[:, 0], shared.norm().expand(4))
    gammas = draw(4, 2, seed=2).abs() + 0.1
    for layer, (unit, scaled) in enumerate(zip(units, scale_weights([shared, own], gammas), strict=True)):
        torch.testing.assert_close(gammas[:, layer].view(4, 1, 1, 1, 1) * unit, scaled, rtol=1e-14, atol=0)
    small = [draw(2, 2, 1, 3, 3).requires_grad_(), draw(1, 1, 2, 3, 3, seed=1).requires_grad_()]

    def flat(*weights: Tensor) -> tuple[Tensor, ...]:
        units, norms = normalize_weights(weights)
        return (*units, norms)

    assert torch.autograd.gradcheck(flat, small)
    assert torch.autograd.gradgradcheck(flat, small)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"gammas must be \[T, 2\] \(one factor a weight\), got \[3, 1\]"):
        scale_weights([draw(3, 1), draw(3, 1)], draw(3, 1))
    with pytest.raises(ValueError, match=r"weights\[0\] must be \[3 or 1, 7\]"):
        scale_weights([draw(2, 7)], draw(3, 1))
    with pytest.raises(ValueError, match=r"gammas must be torch.float32 on cpu like weights\[0\], got torch.float64"):
        scale_weights([draw(3, 7).float()], draw(3, 1))
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[2 or 1, 7\]"):
        normalize_weights([draw(2, 3), draw(3, 7)])
    with pytest.raises(ValueError, match="at least one tensor"):
        normalize_weights([])
