"""The block of a few-shot backbone: convolution, normalisation, activation, pooling, for all tasks at once."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_images, check_like, check_shape, check_slope
from cxgrad_fast.kernels.conv_block import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.conv_block,
    "cpp": cpp.block,
    "triton": backends.lazy("cxgrad_fast.kernels.conv_block.triton", "block"),
}
_valid = partial(reference.conv_block, padded=False)


@overload
def conv_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor | float,
    *,
    slope: float | None,
    pool: bool,
    patch_statistics: tuple[Tensor, Tensor] | None = None,
    norm: str = "batch",
    groups: int = 1,
    statistics: tuple[Tensor, Tensor] | None = None,
    padded: bool = True,
    return_statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def conv_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor | float,
    *,
    slope: float | None,
    pool: bool,
    patch_statistics: tuple[Tensor, Tensor] | None = None,
    norm: str = "batch",
    groups: int = 1,
    statistics: tuple[Tensor, Tensor] | None = None,
    padded: bool = True,
    return_statistics: Literal[True],
) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...


def conv_block(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor | float,
    *,
    slope: float | None,
    pool: bool,
    patch_statistics: tuple[Tensor, Tensor] | None = None,
    norm: str = "batch",
    groups: int = 1,
    statistics: tuple[Tensor, Tensor] | None = None,
    padded: bool = True,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Convolution (stride 1, no bias) -> norm -> LeakyReLU -> 2x2 max-pool (MATH.md 1).

    Args:
        x: ``[T, S, Cin, H, W]``, the images of each task. T may be 0, no other size.
        weight: ``[T, Cout, Cin, k, k]``, k 1 or 3.
        scale: ``[T or 1, Cout]``, of the norm's affine part.
        bias: ``[T or 1, Cout]``.
        eps: ``[T]``, the norm's epsilon, differentiable; or one number for all tasks, a constant.
        slope: of LeakyReLU, finite and not negative; 0 is ReLU, None no activation.
        pool: whether to pool, for H and W of at least 2; ties go to the first position in row-major order.
        patch_statistics: of ``x`` (:func:`patch_statistics`), for the first layer: batch norm without reading the
            convolution back. Needs 3x3, pool, batch norm, and an ``x`` that requires no gradient; is a constant itself.
        norm: ``batch`` takes mean and biased variance over (S, H, W) of each task and channel; ``group`` over
            (channels of a group, H, W) of each image.
        groups: of ``norm="group"``; 1 is LayerNorm over (C, H, W) with an affine part a channel.
        statistics: ``(mean, variance)``, each ``[T or 1, Cout]``, to normalise with instead of the batch's own.
        padded: whether the convolution pads, so that its output has the size of its input; without it (a valid
            convolution) all backends compute by the definition, in plain operations.
        return_statistics: also return ``(mean, variance)``, ``[T, Cout]``, that were used, without their gradients
            (batch norm only).

    Returns:
        ``[T, S, Cout, H // 2, W // 2]``, or ``[T, S, Cout, H, W]`` without pool; H and W less k - 1 without padding.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit together (name, expected, got).
    """
    check_images("x", x, channels="Cin", pool=pool)
    tasks, _, channels = x.shape[:3]
    check_shape("weight", weight, [tasks, "Cout", channels, (1, 3), (1, 3)], "T and Cin from x")
    out, size = weight.shape[1], weight.shape[3]
    if weight.shape[4] != size:
        raise ValueError(f"weight must have a square kernel, got {list(weight.shape)}")
    if not out:
        raise ValueError(f"weight must have at least one output channel, got {list(weight.shape)}")
    for name, tensor in (("scale", scale), ("bias", bias), *zip(("mean", "variance"), statistics or (), strict=False)):
        check_shape(name, tensor, [(tasks, 1), out], "T from x or 1, Cout from weight")
        check_like(name, tensor, "x", x)
    check_like("weight", weight, "x", x)
    if isinstance(eps, Tensor):
        check_shape("eps", eps, [tasks], "T from x")
        check_like("eps", eps, "x", x)
    if slope is not None:
        check_slope(slope)
    if norm not in ("batch", "group"):
        raise ValueError(f"norm must be 'batch' or 'group', got '{norm}'")
    if norm == "group" and (groups < 1 or out % groups):
        raise ValueError(f"groups (={groups}) must divide the output channels (={out})")
    if norm == "group" and (statistics is not None or return_statistics):
        raise ValueError("statistics belong to norm='batch': a group norm takes its own from each image")
    if patch_statistics is not None:
        _check_first_layer(x, size, pool, norm, patch_statistics, statistics)
    if not padded:
        _check_valid(x, size, pool, patch_statistics)
    y, mean, variance = (_IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, x)] if padded else _valid)(
        x,
        weight,
        scale,
        bias,
        eps,
        slope=slope,
        pool=pool,
        patch_statistics=patch_statistics,
        norm=norm,
        groups=groups,
        statistics=statistics,
    )
    return (y, (mean.detach(), variance.detach())) if return_statistics else y


def _check_valid(x: Tensor, size: int, pool: bool, patches: tuple[Tensor, Tensor] | None) -> None:
    if patches is not None:
        raise ValueError("patch_statistics needs padding")
    least = size + pool
    if min(x.shape[3:]) < least:
        raise ValueError(f"x must have H and W of at least {least} without padding, got {list(x.shape)}")


def _check_first_layer(
    x: Tensor,
    size: int,
    pool: bool,
    norm: str,
    patches: tuple[Tensor, Tensor],
    statistics: tuple[Tensor, Tensor] | None,
) -> None:
    refusals = {
        "x requires no gradient (it is the images)": x.requires_grad,
        "pool=True": not pool,
        "norm='batch'": norm != "batch",
        "a 3x3 kernel": size != 3,
        "no given statistics": statistics is not None,
    }
    needs = [what for what, missing in refusals.items() if missing]
    if needs:
        raise ValueError(f"patch_statistics needs {needs[0]}")
    mean, covariance = patches
    length = 9 * x.shape[2]
    check_shape("patch mean", mean, [len(x), length], "T from x, 9 Cin")
    check_shape("patch covariance", covariance, [len(x), length, length], "T from x, 9 Cin")
    if mean.dtype != torch.float64 or covariance.dtype != torch.float64:
        raise ValueError(f"patch statistics must be float64, got {mean.dtype} and {covariance.dtype}")
    if mean.device != x.device or covariance.device != x.device:
        raise ValueError(f"patch statistics must be on {x.device} like x, got {mean.device} and {covariance.device}")
    if mean.requires_grad or covariance.requires_grad:
        raise ValueError("patch statistics must not require a gradient: they are constants of an image set")
