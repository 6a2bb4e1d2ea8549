"""conv_block in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.conv_block.chain import Chain, Kernel
from cxgrad_fast.kernels.registration import launcher, operator


def _images(x: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Images of ``x``'s tasks, channels last."""
    return x.new_empty((*x.shape[:2], height, width, channels), dtype=dtype).permute(0, 1, 4, 2, 3)


def _fake_convolution(x: Tensor, weight: Tensor, precision: str = "float32") -> Tensor:
    return _images(x, weight.shape[1], *x.shape[3:])


def _fake_activation(y: Tensor, *_: Any) -> Tensor:
    return _images(y, *y.shape[2:])


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
    precision: str = "float32",
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


def _fake_backward(
    q: Tensor, y_gradient: Tensor | None, x: Tensor, weight: Tensor, *rest: Any, precision: str = "float32"
) -> tuple[Tensor, ...]:
    patch_mean, _, need_x, need_weight = rest[9:13]
    tasks, channels = weight.shape[:2]
    dx = _like_images(x) if need_x and patch_mean is None else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if need_weight else x.new_empty(0)
    sparse_shape = (tasks, 9 * x.shape[2], channels) if need_weight and patch_mean is not None else (0,)
    sparse = x.new_empty(sparse_shape, dtype=torch.float64)
    return dx, dweight, x.new_empty((tasks, channels)), x.new_empty((tasks, channels)), x.new_empty(tasks), sparse


def _fake_double_backward(*arguments: Any, precision: str = "float32") -> tuple[Tensor, ...]:
    on_x, on_weight = arguments[:2]
    q, x, weight = arguments[5:8]
    patch_mean, _, need_x, need_weight = arguments[20:24]
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
    precision: str = "float32",
) -> tuple[Tensor, ...]:
    """(out, y, selected, corners, moments), see csrc/conv_block.h; scale and bias ``[T, C]``."""
    return _chain(precision).apply(x, weight, scale, bias, eps, slope, pool, patch_mean, patch_covariance)


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
    precision: str = "float32",
) -> tuple[Tensor, ...]:
    """Cotangents ``q`` of out and ``y_gradient`` of y -> (dx, dweight, dscale, dbias, deps, sparse)."""
    arguments = (x, weight, scale, bias, eps, y, selected, corners, moments)
    options = (slope, pool, patch_mean, patch_covariance, need_x, need_weight)
    return _chain(precision).apply_backward(q, y_gradient, *arguments, *options)


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
    precision: str = "float32",
) -> tuple[Tensor, ...]:
    """Cotangents of the five gradients -> gradients of (q, x, weight, scale, eps, y)."""
    cotangents = (on_x, on_weight, on_scale, on_bias, on_eps)
    arguments = (q, x, weight, scale, bias, eps, y, selected, corners, moments, dscale, dbias, sparse)
    options = (slope, pool, patch_mean, patch_covariance, need_x, need_weight)
    return _chain(precision).apply_double_backward(*cotangents, *arguments, *options)


def block(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As the definition, with its options; group norm and given statistics are left to it."""
    return _chain(backends.precision()).block(x, weight, scale, bias, eps, **options)


_forward = launcher("conv_block")
_backward = launcher("conv_block_backward")
_double_backward = launcher("conv_block_double_backward")
_convolution = launcher("conv_block_convolution", fake=_fake_convolution)
_activation = launcher("conv_block_activation", fake=_fake_activation)


@functools.cache
def _chain(precision: str) -> Chain:
    """The operators with their products in one precision: float32, tf32 or bfloat16."""

    def of(kernel: Kernel) -> Kernel:
        return lambda *arguments: kernel(*arguments, precision)

    return Chain(
        forward=of(_forward),
        backward=of(_backward),
        double_backward=of(_double_backward),
        convolution=of(_convolution),
        activation=_activation,
        call=of(conv_block),
        call_backward=of(conv_block_backward),
        call_double_backward=of(conv_block_double_backward),
    )
