"""Statistics of the first layer's input patches, from which its BatchNorm follows for any weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_images
from cxgrad_fast.kernels.patch_statistics import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.patch_statistics,
    "cpp": cpp.patch_statistics,
    "triton": backends.lazy("cxgrad_fast.kernels.patch_statistics.triton", "patch_statistics"),
}


class PatchStatistics(NamedTuple):
    """Mean ``[T, K]`` and covariance ``[T, K, K]`` (biased) of zero-padded 3x3 patches, ``K = 9 C``, float64."""

    mean: Tensor
    covariance: Tensor


def patch_statistics(x: Tensor) -> PatchStatistics:
    """Mean and covariance of the zero-padded 3x3 patches of each task's images (MATH.md 2).

    With them the BatchNorm statistics of a 3x3 convolution of ``x`` are ``w . mean`` and ``w' covariance w``, whatever
    the weights: compute them once per image set, use them in every pass (``conv_block(..., patch_statistics=...)``).

    Args:
        x: ``[T, S, C, H, W]`` floating point, not requiring a gradient. T may be 0, no other size.

    Returns:
        float64 whatever ``x`` is: the variance of a high-pass filter on a smooth image is a thousandth of the
        covariance's scale. A patch is ordered (C, row, column), as a flattened weight is.

    Raises:
        ValueError: wrong shape or dtype, or ``x`` requires a gradient (the statistics carry none).
    """
    check_images("x", x)
    if x.requires_grad:
        raise ValueError("x must not require a gradient: patch statistics are constants of an image set")
    return PatchStatistics(*_IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, x)](x))
