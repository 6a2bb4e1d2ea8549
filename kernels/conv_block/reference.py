"""The definition of conv_block in plain PyTorch: MATH.md 1, any dtype, any order of derivative.

Inside, tensors are image-major, ``[S, T, C, H, W]``, and channels-last in memory: there the tasks are the groups of one
grouped convolution, pooling and statistics run along contiguous channels (the framework's pooling is 8 times as fast
as on planes), and a chain of blocks needs no transposing copy, only views.

The norms are plain arithmetic: the framework's batch norm has wrong gradients for one image in some memory layouts
(docs/traps.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor | float,
    *,
    slope: float | None,
    pool: bool,
    patch_statistics: tuple[Tensor, Tensor] | None,
    norm: str,
    groups: int,
    statistics: tuple[Tensor, Tensor] | None,
    padded: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and mean and variance ``[T, C]`` used; see :func:`cxgrad_fast.kernels.conv_block`.

    With ``norm="group"`` mean and variance are those of each image and group, ``[T, S, groups]``.
    """
    if not len(x):
        return _no_tasks(x, weight, scale, bias, eps, pool, padded)
    if patch_statistics is not None:
        z, mean, variance = _first_layer(x, weight, scale, bias, _column(eps), *patch_statistics)
    elif norm == "group":
        z, mean, variance = _group_norm(_convolve(x, weight, padded=padded), scale, bias, _column(eps), groups)
    else:
        z, mean, variance = _batch_norm(_convolve(x, weight, padded=padded), scale, bias, _column(eps), statistics)
    return _activate(z, slope, pool).transpose(0, 1), mean, variance


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, padded: bool = True) -> Tensor:
    """``x`` [T, S, Cin, H, W], ``weight`` [T, Cout, Cin, k, k], ``bias`` [T, Cout] -> [S, T, Cout, H, W]."""
    y = F.conv2d(
        x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        padding=weight.shape[3] // 2 if padded else 0,
        groups=len(x),
    )
    return y.unflatten(1, (len(x), -1))


def _column(eps: Tensor | float) -> Tensor | float:
    """Epsilon to be added to a ``[..., T, C]`` variance."""
    return eps[:, None] if isinstance(eps, Tensor) else eps


def _batch_norm(
    y: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, statistics: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` [S, T, C, H, W] normalised by its own statistics or by given ones, and those, [T, C]."""
    mean = y.mean((0, 3, 4)) if statistics is None else statistics[0]
    centred = y - mean[..., None, None]
    variance = centred.square().mean((0, 3, 4)) if statistics is None else statistics[1]
    k = torch.rsqrt(variance + eps) * scale
    return torch.addcmul(bias[..., None, None], centred, k[..., None, None]), mean, variance


def _group_norm(
    y: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``y`` [S, T, C, H, W] normalised by the statistics of each image's groups, and those, [T, S, groups]."""
    spread = y.shape[2] // groups
    variance, mean = torch.var_mean(y.unflatten(2, (groups, -1)), (3, 4, 5), correction=0)  # [S, T, groups]
    k = torch.rsqrt(variance + eps).repeat_interleave(spread, 2) * scale  # [S, T, C]
    centred = y - mean.repeat_interleave(spread, 2)[..., None, None]
    z = torch.addcmul(bias[..., None, None], centred, k[..., None, None])
    return z, mean.transpose(0, 1), variance.transpose(0, 1)


def _first_layer(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor | float,
    patch_mean: Tensor,
    patch_covariance: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised convolution, with its statistics from the patches' (MATH.md 2): nothing reads it back."""
    rows = weight.flatten(2).double()  # [T, Cout, K]
    mean = (rows @ patch_mean[..., None]).squeeze(2)
    variance = ((rows @ patch_covariance) * rows).sum(2)
    k = torch.rsqrt(variance + eps) * scale
    shift = bias - mean * k
    z = _convolve(x, (weight * k[..., None, None, None]).to(x.dtype), shift.to(x.dtype))
    return z, mean.to(x.dtype), variance.to(x.dtype)


def _activate(z: Tensor, slope: float | None, pool: bool) -> Tensor:
    """LeakyReLU and 2x2 max-pool of [S, T, C, H, W].

    Pooling comes first: the activation is monotone, so the values and, away from z = 0, the gradients are the same,
    for a quarter of the work.
    """
    if pool:
        z = F.max_pool2d(z.flatten(1, 2), 2).unflatten(1, z.shape[1:3])
    if slope is None:
        return z
    return F.leaky_relu(z, slope) if slope else F.relu(z)


def _no_tasks(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, pool: bool, padded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The empty output of no task; the framework has no convolution of no group.

    A product of sums of nothing: a function of all inputs, and so is its gradient in each of them.
    """
    (_, images, _, height, width), out = x.shape, weight.shape[1]
    if not padded:
        height, width = height - weight.shape[3] + 1, width - weight.shape[3] + 1
    nothing = x.sum() * weight.sum() * scale.expand(0, out).sum() * bias.expand(0, out).sum()
    nothing = nothing * eps.sum() if isinstance(eps, Tensor) else nothing
    size = (height // 2, width // 2) if pool else (height, width)
    return nothing.expand(0, images, out, *size), nothing.expand(0, out), nothing.expand(0, out)
