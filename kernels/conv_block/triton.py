"""conv_block in Triton: the general block, or the first layer from its patch statistics.

The kernels stand in forward.py, backward.py, double_backward.py (over convolution.py) and first_layer.py.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.conv_block import backward, convolution, double_backward, first_layer, forward, reference
from cxgrad_fast.kernels.conv_block.chain import Chain


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
    bound = {"precision": precision}
    return Chain(
        forward=functools.partial(_forward, **bound),
        backward=functools.partial(_backward, **bound),
        double_backward=functools.partial(_double_backward, **bound),
        convolution=functools.partial(convolution.convolution, **bound),
        activation=forward.activation,
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    slope: float,
    pool: bool,
    patch_mean: Tensor | None,
    patch_covariance: Tensor | None,
    *,
    precision: str,
) -> tuple[Tensor, ...]:
    affine = (scale.contiguous(), bias.contiguous(), eps.contiguous())
    if patch_mean is not None:
        patches = (patch_mean, patch_covariance)
        return first_layer.forward(x, weight, *affine, slope, *patches, precision=precision)
    return forward.forward(x, weight, *affine, slope, pool, precision=precision)


def _backward(
    q: Tensor,
    y_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    y: Tensor,
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    slope: float,
    pool: bool,
    patch_mean: Tensor | None,
    patch_covariance: Tensor | None,
    need_x: bool,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, ...]:
    affine = (scale.contiguous(), bias.contiguous(), eps.contiguous())
    if patch_mean is not None:
        saved, patches = (selected, corners, moments), (patch_mean, patch_covariance)
        return first_layer.backward(q, x, weight, *affine, *saved, slope, *patches, need_weight, precision=precision)
    saved = (y, selected, corners, moments)
    needs = (need_x, need_weight)
    return backward.backward(q, y_gradient, x, weight, *affine, *saved, slope, pool, *needs, precision=precision)


def _double_backward(
    on_x: Tensor | None,
    on_weight: Tensor | None,
    on_scale: Tensor | None,
    on_bias: Tensor | None,
    on_eps: Tensor | None,
    q: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    y: Tensor,
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    sparse: Tensor,
    slope: float,
    pool: bool,
    patch_mean: Tensor | None,
    patch_covariance: Tensor | None,
    need_x: bool,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, ...]:
    affine = (scale.contiguous(), bias.contiguous(), eps.contiguous())
    if patch_mean is not None:
        cotangents = (on_weight, on_scale, on_bias, on_eps)
        saved, sums = (selected, corners, moments), (dscale, dbias, sparse)
        patches = (patch_mean, patch_covariance)
        return first_layer.double_backward(
            *cotangents, q, x, weight, *affine, *saved, *sums, slope, *patches, need_weight, precision=precision
        )
    cotangents = (on_x, on_weight, on_scale, on_bias, on_eps)
    saved, sums = (y, selected, corners, moments), (dscale, dbias)
    return double_backward.double_backward(
        *cotangents, q, x, weight, *affine, *saved, *sums, slope, pool, need_x, need_weight, precision=precision
    )
