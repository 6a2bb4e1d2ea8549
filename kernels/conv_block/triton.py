"""conv_block in Triton: the general block, or the first layer from its patch statistics.

The kernels stand in forward.py, backward.py, double_backward.py (over convolution.py) and first_layer.py; what they
take and give is csrc/conv_block.h's.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.conv_block import backward, double_backward, first_layer, forward, reference, ways
from cxgrad_fast.kernels.conv_block import tuning as tuning  # declares what can be measured
from cxgrad_fast.kernels.conv_block.chain import Chain
from cxgrad_fast.kernels.conv_block.convolution import channels_last


def block(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, with its options; no task, group norm and given statistics are left to it."""
    if not len(x):
        return reference.conv_block(x, weight, scale, bias, eps, **options)
    return chain(backends.precision()).block(x, weight, scale, bias, eps, **options)


@functools.cache
def chain(precision: str) -> Chain:
    """The kernels with their products in one precision: float32, tf32 or bfloat16."""
    return Chain(
        forward=functools.partial(_forward, precision),
        backward=functools.partial(_backward, precision),
        double_backward=functools.partial(_double_backward, precision),
        convolution=functools.partial(_convolution, precision),
        activation=forward.activation,
    )


def _convolution(precision: str, x: Tensor, weight: Tensor) -> Tensor:
    """The forward pass's convolution again, to the bit: with the sums that it made then."""
    return ways.convolution(channels_last(x), weight, precision=precision)[0]


def _forward(precision: str, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scale, bias, eps, slope, pool, patch_mean, patch_covariance = rest
    affine = scale.contiguous(), bias.contiguous(), eps.contiguous()
    if patch_mean is None:
        return forward.forward(x, weight, *affine, slope, pool, precision=precision)
    return first_layer.forward(x, weight, *affine, slope, patch_mean, patch_covariance, precision=precision)


def _backward(precision: str, q: Tensor, y_gradient: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    x, weight, scale, bias, eps, y, *saved, slope, pool, patch_mean, patch_covariance, need_x, need_weight = rest
    block: tuple[Any, ...] = (x, weight, scale.contiguous(), bias.contiguous(), eps.contiguous())
    if patch_mean is None:
        given: tuple[Any, ...] = (q, y_gradient, *block, y, *saved, slope, pool, need_x, need_weight)
        return backward.backward(*given, precision=precision)
    given = (q, *block, *saved, slope, patch_mean, patch_covariance, need_weight)
    return first_layer.backward(*given, precision=precision)


def _double_backward(precision: str, on_x: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *cotangents, q, x, weight, scale, bias, eps, y = rest[:11]
    *saved, sparse, slope, pool, patch_mean, patch_covariance, need_x, need_weight = rest[11:]
    block: tuple[Any, ...] = (q, x, weight, scale.contiguous(), bias.contiguous(), eps.contiguous())
    if patch_mean is None:
        given: tuple[Any, ...] = (on_x, *cotangents, *block, y, *saved, slope, pool, need_x, need_weight)
        return double_backward.double_backward(*given, precision=precision)
    given = (*cotangents, *block, *saved, sparse, slope, patch_mean, patch_covariance, need_weight)
    return first_layer.double_backward(*given, precision=precision)
