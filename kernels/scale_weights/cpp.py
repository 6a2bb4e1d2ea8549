"""scale_weights in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator
from cxgrad_fast.kernels.scale_weights.chain import Chain


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


@operator(fake=lambda weights, gammas: [w.new_empty((gammas.shape[0], *w.shape[1:])) for w in weights])
def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """``gamma * w / |w|``; see :func:`cxgrad_fast.kernels.scale_weights`."""
    return _chain.apply(weights, gammas)


@operator(fake=lambda weights, gammas, v: (_like(weights), _like([gammas])[0]))
def scale_weights_backward(
    weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Cotangents ``v`` of the scaled weights -> gradients of weights and gammas."""
    return _chain.apply_backward(weights, gammas, v)


@operator(fake=lambda weights, gammas, v, a, c: (_like(weights), _like([gammas])[0], _like(v)))
def scale_weights_double_backward(
    weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor], a: Sequence[Tensor], c: Tensor
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Cotangents ``a`` and ``c`` of those gradients -> gradients of weights, gammas and v."""
    return _chain.apply_double_backward(weights, gammas, v, a, c)


_chain = Chain(
    forward=launcher("scale_weights"),
    backward=launcher("scale_weights_backward"),
    double_backward=launcher("scale_weights_double_backward"),
    call_backward=scale_weights_backward,
    call_double_backward=scale_weights_double_backward,
)
