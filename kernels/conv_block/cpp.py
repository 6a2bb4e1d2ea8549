"""conv_block in C++, and its derivatives (MATH.md 1 and 2).

The forward operator gives the convolution's output ``y`` too, and the backward reads it as an input of its own. The
double backward can then return y's gradient as it is; autograd adds it to what the outer pass sends to the same block,
and the backward turns both into the gradients of input and weight at once: six units of convolution in the outer pass
instead of eight. The first layer has no ``y``: its derivatives are closed forms of the patch statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.conv_block import reference
from cxgrad_fast.kernels.registration import launcher, operator, refuse_third, wanted

_launch = launcher("conv_block")
_launch_backward = launcher("conv_block_backward")
_launch_double_backward = launcher("conv_block_double_backward")


def block(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, with its options; group norm and given statistics are left to it."""
    if options["norm"] != "batch" or options["statistics"] is not None:
        return reference.conv_block(x, weight, scale, bias, eps, **options)
    slope, pool = options["slope"], options["pool"]
    tasks, channels = weight.shape[:2]
    if not isinstance(eps, Tensor):
        eps = x.new_full((tasks,), eps)
    mean, covariance = options["patch_statistics"] or (None, None)
    affine = (scale.expand(tasks, channels), bias.expand(tasks, channels))
    # LeakyReLU of slope 1 is no activation
    out, _, _, _, moments = conv_block(x, weight, *affine, eps, 1.0 if slope is None else slope, pool, mean, covariance)
    return out, moments[:, 0].to(x.dtype), moments[:, 1].to(x.dtype)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _launch_double_backward(*arguments)

    backward = staticmethod(refuse_third("conv_block"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *tensors, slope, pool, patch_mean, patch_covariance, need_x, need_weight, y_gradient = rest
        outputs = _launch_backward(q, y_gradient, *rest[:-1])
        dx, dweight, dscale, dbias, _, sparse = outputs
        ctx.save_for_backward(q, *tensors, dscale, dbias, sparse, patch_mean, patch_covariance)
        ctx.options, ctx.with_y = (slope, pool), y_gradient is not None
        unwanted = [] if need_weight else [dweight]
        if not need_x or patch_mean is not None:
            unwanted.append(dx)
        ctx.mark_non_differentiable(sparse, *unwanted)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.with_y:  # a derivative of a second derivative's sum
            refuse_third("conv_block")(ctx)
        *saved, patch_mean, patch_covariance = ctx.saved_tensors
        patches = (patch_mean, patch_covariance)
        arguments: list[Any] = [*cotangents[:5], *saved, *ctx.options, *patches, wanted(ctx, 1), wanted(ctx, 2)]
        q, x, weight, scale, eps, y = conv_block_double_backward(*arguments)
        return q, _or_none(x), _or_none(weight), scale, None, eps, _or_none(y), *[None] * 10


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        x, weight, scale, bias, eps, slope, pool, patch_mean, patch_covariance = arguments
        outputs = _launch(*arguments)
        out, y, selected, corners, moments = outputs
        ctx.save_for_backward(x, weight, scale, bias, eps, y, selected, corners, moments, patch_mean, patch_covariance)
        ctx.options, ctx.shape = (slope, pool), out.shape
        ctx.mark_non_differentiable(selected, corners, moments, *([] if patch_mean is None else [y]))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, q: Tensor | None, y_gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *saved, patch_mean, patch_covariance = ctx.saved_tensors
        if q is None:
            q = saved[0].new_zeros(ctx.shape)
        patches = (patch_mean, patch_covariance)
        arguments: list[Any] = [q, y_gradient, *saved, *ctx.options, *patches, wanted(ctx, 0), wanted(ctx, 1)]
        dx, dweight, dscale, dbias, deps, _sparse = conv_block_backward(*arguments)
        return _or_none(dx), _or_none(dweight), dscale, dbias, deps, None, None, None, None


def _or_none(tensor: Tensor) -> Tensor | None:
    """Operators return an empty vector for a gradient that nobody wanted."""
    return None if tensor.shape == (0,) else tensor


def _images(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Images of ``x``'s tasks, channels last."""
    return x.new_empty((*x.shape[:2], height, width, channels), dtype=dtype).permute(0, 1, 4, 2, 3)


def _fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    slope: float,
    pool: bool,
    patch_mean: Tensor | None,
    patch_covariance: Tensor | None,
) -> tuple[Tensor, ...]:
    (height, width), channels = x.shape[3:], weight.shape[1]
    size = (height // 2, width // 2) if pool else (height, width)
    y = _images(x, channels, height, width) if patch_mean is None else x.new_empty(0)
    selected = _images(x, channels, *size) if pool else x.new_empty(0)
    corners = _images(x, channels, *size, torch.uint8) if pool else x.new_empty(0, dtype=torch.uint8)
    moments = x.new_empty((len(x), 2, channels), dtype=torch.float64)
    return _images(x, channels, *size), y, selected, corners, moments


def _like_images(tensor: Tensor) -> Tensor:
    return _images(tensor, *tensor.shape[2:])


def _fake_backward(q: Tensor, y_gradient: Tensor | None, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    patch_mean, need_x, need_weight = rest[-4], rest[-2], rest[-1]
    tasks, channels = weight.shape[:2]
    dx = _like_images(x) if need_x and patch_mean is None else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else x.new_empty(0)
    sparse_shape = (tasks, 9 * x.shape[2], channels) if need_weight and patch_mean is not None else (0,)
    sparse = x.new_empty(sparse_shape, dtype=torch.float64)
    return dx, dweight, x.new_empty((tasks, channels)), x.new_empty((tasks, channels)), x.new_empty(tasks), sparse


def _fake_double_backward(*arguments: Any) -> tuple[Tensor, ...]:
    on_x, on_weight = arguments[:2]
    q, x, weight = arguments[5:8]
    patch_mean, need_x, need_weight = arguments[-4], arguments[-2], arguments[-1]
    tasks, channels = weight.shape[:2]
    first_layer = patch_mean is not None
    x_gradient = _like_images(x) if need_x and on_weight is not None and not first_layer else x.new_empty(0)
    any_weight = need_weight and (first_layer or on_x is not None)
    y_gradient = x.new_empty(0) if first_layer else _images(x, channels, *x.shape[3:])
    weight_gradient = weight.new_empty(weight.shape) if any_weight else x.new_empty(0)
    affine = x.new_empty((tasks, channels)), x.new_empty(tasks)
    return _like_images(q), x_gradient, weight_gradient, *affine, y_gradient


@operator(fake=_fake)
def conv_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    slope: float,
    pool: bool,
    patch_mean: Tensor | None,
    patch_covariance: Tensor | None,
) -> tuple[Tensor, ...]:
    """(out, y, selected, corners, moments), see csrc/conv_block.h; scale and bias ``[T, C]``."""
    return _Forward.apply(x, weight, scale, bias, eps, slope, pool, patch_mean, patch_covariance)


@operator(fake=_fake_backward)
def conv_block_backward(
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
) -> tuple[Tensor, ...]:
    """Cotangents ``q`` of out and ``y_gradient`` of y -> (dx, dweight, dscale, dbias, deps, sparse)."""
    arguments = (x, weight, scale, bias, eps, y, selected, corners, moments)
    options = (slope, pool, patch_mean, patch_covariance, need_x, need_weight)
    return _Backward.apply(q, *arguments, *options, y_gradient)


@operator(fake=_fake_double_backward)
def conv_block_double_backward(
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
) -> tuple[Tensor, ...]:
    """Cotangents of the five gradients -> gradients of (q, x, weight, scale, eps, y)."""
    cotangents = (on_x, on_weight, on_scale, on_bias, on_eps)
    arguments = (q, x, weight, scale, bias, eps, y, selected, corners, moments, dscale, dbias, sparse)
    options = (slope, pool, patch_mean, patch_covariance, need_x, need_weight)
    return _DoubleBackward.apply(*cotangents, *arguments, *options)
