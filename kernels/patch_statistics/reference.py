"""The definition of patch_statistics in plain PyTorch: MATH.md 2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGES_AT_ONCE = 8  # patches are nine times an image, in float64: keep them in the cache


def patch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the zero-padded 3x3 patches; see :func:`cxgrad_fast.kernels.patch_statistics`."""
    tasks, images, channels, height, width = x.shape
    positions = images * height * width
    # The covariance does not care for a shift; with the images' own mean taken off, nothing cancels.
    shift = x.mean(dim=(1, 3, 4), dtype=torch.float64).repeat_interleave(9, dim=1)[..., None]  # [T, K, 1]
    total = x.new_zeros((tasks, 9 * channels, 1), dtype=torch.float64)
    product = x.new_zeros((tasks, 9 * channels, 9 * channels), dtype=torch.float64)
    for start in range(0, images, IMAGES_AT_ONCE):
        part = x[:, start : start + IMAGES_AT_ONCE]
        patches = F.unfold(part.flatten(0, 1), kernel_size=3, padding=1).double()
        patches = patches.unflatten(0, part.shape[:2]).transpose(1, 2).flatten(2) - shift  # [T, K, images*H*W]
        total += patches.sum(2, keepdim=True)
        product += patches @ patches.mT
    residual = total / positions
    return (shift + residual).squeeze(2), product / positions - residual @ residual.mT
