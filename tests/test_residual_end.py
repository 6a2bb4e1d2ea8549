from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

from cxgrad_fast.kernels import residual_end


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize(("pool", "padding"), [(True, 0), (True, 1), (False, 0)])
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
def test_equals_framework(slope: float, pool: bool, padding: int, size: tuple[int, int]) -> None:
    """Values, first and second gradients, activation before pooling, one task at a time."""
    g = torch.Generator().manual_seed(0)
    x, shortcut = (torch.randn(2, 3, 4, *size, generator=g).double().requires_grad_() for _ in range(2))
    ours = residual_end(x, shortcut, slope=slope, pool=pool, padding=padding)
    total = [torch.where(s > 0, s, slope * s) for s in x + shortcut]
    theirs = torch.stack([F.max_pool2d(t, 2, padding=padding) for t in total] if pool else total)
    assert relative_error(ours, theirs) < 1e-15
    cotangent = torch.randn(ours.shape, generator=g).double().requires_grad_()
    for actual, expected in zip(
        torch.autograd.grad(ours, (x, shortcut), cotangent, create_graph=True),
        torch.autograd.grad(theirs, (x, shortcut), cotangent, create_graph=True),
        strict=True,
    ):
        assert relative_error(actual, expected) < 1e-15
        mixed = torch.randn(actual.shape, generator=g).double()
        second = [torch.autograd.grad(v, cotangent, mixed, retain_graph=True)[0] for v in (actual, expected)]
        assert relative_error(*second) < 1e-15


def test_zero_tasks() -> None:
    x = torch.zeros(0, 2, 3, 5, 4, requires_grad=True)
    y = residual_end(x, torch.zeros_like(x), slope=0.0, pool=True, padding=1)
    assert y.shape == (0, 2, 3, 3, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_refusals() -> None:
    x = torch.zeros(1, 2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"shortcut must be \[1, 2, 3, 4, 4\] \(the shape of x\), got \[1, 2, 3, 4, 5\]"
    ):
        residual_end(x, torch.zeros(1, 2, 3, 4, 5), slope=0.0, pool=True)
    with pytest.raises(ValueError, match="slope must not be negative and padding must be 0 or 1"):
        residual_end(x, x, slope=0.0, pool=True, padding=2)
