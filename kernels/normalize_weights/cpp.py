"""normalize_weights in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxgrad_fast.kernels.normalize_weights.chain import Chain
from cxgrad_fast.kernels.normalize_weights.reference import tasks_of
from cxgrad_fast.kernels.registration import launcher, operator


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _fake(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    return _like(weights), weights[0].new_empty((tasks_of(weights), len(weights)))


@operator(fake=_fake)
def normalize_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``w / |w|`` and ``|w|``; see :func:`cxgrad_fast.kernels.normalize_weights`."""
    return _chain.apply(weights)


@operator(fake=lambda weights, v, n: _like(weights))
def normalize_weights_backward(weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor) -> list[Tensor]:
    """Cotangents ``v`` of the units and ``n`` of the norms -> gradients of the weights."""
    return _chain.apply_backward(weights, v, n)


@operator(fake=lambda weights, v, n, a: (_like(weights), _like(v), _like([n])[0]))
def normalize_weights_double_backward(
    weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor, a: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Cotangents ``a`` of those gradients -> gradients of weights, v and n."""
    return _chain.apply_double_backward(weights, v, n, a)


_chain = Chain(
    forward=launcher("normalize_weights"),
    backward=launcher("normalize_weights_backward"),
    double_backward=launcher("normalize_weights_double_backward"),
    call_backward=normalize_weights_backward,
    call_double_backward=normalize_weights_double_backward,
)
