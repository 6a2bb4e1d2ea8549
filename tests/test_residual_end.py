from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, require_cpp
from torch import Tensor

from cxgrad_fast.kernels import residual_end, use_backend


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize(("pool", "padding"), [(True, 0), (True, 1), (False, 0)])
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_equals_framework(backend: str, slope: float, pool: bool, padding: int, size: tuple[int, int]) -> None:
    """Values, first and second gradients, activation before pooling, one task at a time."""
    g = torch.Generator().manual_seed(0)
    x, shortcut = (torch.randn(2, 3, 4, *size, generator=g).double().requires_grad_() for _ in range(2))
    with use_backend(backend):
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


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_zero_tasks(backend: str) -> None:
    x = torch.zeros(0, 2, 3, 5, 4, requires_grad=True)
    with use_backend(backend):
        y = residual_end(x, torch.zeros_like(x), slope=0.0, pool=True, padding=1)
    assert y.shape == (0, 2, 3, 3, 3)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_what_is_not_a_number_wins_its_window(backend: str) -> None:
    """As in the framework's pooling: a NaN must show."""
    x = torch.zeros(1, 1, 4, 2, 2)
    for channel, position in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        x[0, 0, channel][position] = float("nan")
    with use_backend(backend):
        assert residual_end(x, x, slope=0.1, pool=True).isnan().all()


def test_its_graph_keeps_one_byte_an_output() -> None:
    require_cpp()
    x, shortcut = (torch.randn(2, 3, 16, 8, 8).requires_grad_() for _ in range(2))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with use_backend("cpp"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = residual_end(x, shortcut, slope=0.1, pool=True)
        q = torch.ones_like(out, requires_grad=True)
        torch.autograd.grad(out, x, q, create_graph=True)
    assert {(tensor.dtype, tensor.numel()) for tensor in saved} == {(torch.uint8, out.numel())}


def test_refusals() -> None:
    x = torch.zeros(1, 2, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"shortcut must be \[1, 2, 3, 4, 4\] \(the shape of x\), got \[1, 2, 3, 4, 5\]"
    ):
        residual_end(x, torch.zeros(1, 2, 3, 4, 5), slope=0.0, pool=True)
