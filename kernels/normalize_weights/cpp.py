"""normalize_weights in C++, and its derivatives (MATH.md 3 with a factor of 1, and the norms as outputs)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator, refuse_third

_launch = launcher("normalize_weights")
_launch_backward = launcher("normalize_weights_backward")
_launch_double_backward = launcher("normalize_weights_double_backward")


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: int, n: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        weights, v, a = lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]
        weights_bar, v_bar, n_bar = _launch_double_backward(weights, v, n, a)
        return n_bar, *weights_bar, *v_bar

    backward = staticmethod(refuse_third("normalize_weights"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: int, n: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        ctx.layers = layers
        ctx.save_for_backward(n, *lists)
        return tuple(_launch_backward(lists[:layers], lists[layers:], n))

    @staticmethod
    def backward(ctx: Any, *a: Tensor) -> tuple[Tensor | None, ...]:
        n, *lists = ctx.saved_tensors
        weights, v = lists[: ctx.layers], lists[ctx.layers :]
        weights_bar, v_bar, n_bar = normalize_weights_double_backward(weights, v, n, a)
        return None, n_bar, *weights_bar, *v_bar


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*weights)
        units, norms = _launch(weights)
        return norms, *units

    @staticmethod
    def backward(ctx: Any, n: Tensor, *v: Tensor) -> tuple[Tensor, ...]:
        return tuple(normalize_weights_backward(ctx.saved_tensors, v, n))


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _fake(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    tasks = next((weight.shape[0] for weight in weights if weight.shape[0] != 1), 1)
    return _like(weights), weights[0].new_empty((tasks, len(weights)))


@operator(fake=_fake)
def normalize_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``w / |w|`` and ``|w|``; see :func:`cxgrad_fast.kernels.normalize_weights`."""
    norms, *units = _Forward.apply(*weights)
    return units, norms


@operator(fake=lambda weights, v, n: _like(weights))
def normalize_weights_backward(weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor) -> list[Tensor]:
    """Cotangents ``v`` of the units and ``n`` of the norms -> gradients of the weights."""
    return list(_Backward.apply(len(weights), n, *weights, *v))


@operator(fake=lambda weights, v, n, a: (_like(weights), _like(v), _like([n])[0]))
def normalize_weights_double_backward(
    weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor, a: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Cotangents ``a`` of those gradients -> gradients of weights, v and n."""
    n_bar, *lists = _DoubleBackward.apply(len(weights), n, *weights, *v, *a)
    return lists[: len(weights)], lists[len(weights) :], n_bar
