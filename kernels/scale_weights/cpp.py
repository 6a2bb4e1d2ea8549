"""scale_weights in C++, and its derivatives (MATH.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator, refuse_third

_launch = launcher("scale_weights")
_launch_backward = launcher("scale_weights_backward")
_launch_double_backward = launcher("scale_weights_double_backward")


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: int, gammas: Tensor, c: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        weights, v, a = lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]
        weights_bar, gammas_bar, v_bar = _launch_double_backward(weights, gammas, v, a, c)
        return gammas_bar, *weights_bar, *v_bar

    backward = staticmethod(refuse_third("scale_weights"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: int, gammas: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        ctx.layers = layers
        ctx.save_for_backward(gammas, *lists)
        weights_bar, gammas_bar = _launch_backward(lists[:layers], gammas, lists[layers:])
        return gammas_bar, *weights_bar

    @staticmethod
    def backward(ctx: Any, c: Tensor, *a: Tensor) -> tuple[Tensor | None, ...]:
        gammas, *lists = ctx.saved_tensors
        weights, v = lists[: ctx.layers], lists[ctx.layers :]
        weights_bar, gammas_bar, v_bar = scale_weights_double_backward(weights, gammas, v, a, c)
        return None, gammas_bar, *weights_bar, *v_bar


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gammas: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gammas, *weights)
        return tuple(_launch(weights, gammas))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor, ...]:
        gammas, *weights = ctx.saved_tensors
        weights_bar, gammas_bar = scale_weights_backward(weights, gammas, v)
        return gammas_bar, *weights_bar


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


@operator(fake=lambda weights, gammas: [w.new_empty((gammas.shape[0], *w.shape[1:])) for w in weights])
def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """``gamma * w / |w|``; see :func:`cxgrad_fast.kernels.scale_weights`."""
    return list(_Forward.apply(gammas, *weights))


@operator(fake=lambda weights, gammas, v: (_like(weights), _like([gammas])[0]))
def scale_weights_backward(
    weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Cotangents ``v`` of the scaled weights -> gradients of weights and gammas."""
    gammas_bar, *weights_bar = _Backward.apply(len(weights), gammas, *weights, *v)
    return weights_bar, gammas_bar


@operator(fake=lambda weights, gammas, v, a, c: (_like(weights), _like([gammas])[0], _like(v)))
def scale_weights_double_backward(
    weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor], a: Sequence[Tensor], c: Tensor
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Cotangents ``a`` and ``c`` of those gradients -> gradients of weights, gammas and v."""
    gammas_bar, *lists = _DoubleBackward.apply(len(weights), gammas, c, *weights, *v, *a)
    return lists[: len(weights)], gammas_bar, lists[len(weights) :]
