"""The definition of residual_end in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def residual_end(x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int) -> Tensor:
    """``max_pool(leaky_relu(x + shortcut))``; see :func:`cxgrad_fast.kernels.residual_end`."""
    if not len(x):  # the framework does not pool nothing
        height, width = ((size + 2 * padding) // 2 if pool else size for size in x.shape[3:])
        return (x.sum() + shortcut.sum()).expand(*x.shape[:3], height, width)
    total = x + shortcut
    # one batch of images, in whichever order they lie in memory (conv_block's backends differ): no copy
    image_major = total.stride(1) > total.stride(0)
    merged = total.transpose(0, 1).flatten(1, 2) if image_major else total.flatten(0, 1)
    if pool:  # before the activation, which is monotone: the same values, a quarter of the work
        merged = F.max_pool2d(merged, 2, padding=padding)
    y = F.leaky_relu(merged, slope) if slope else F.relu(merged)
    return y.unflatten(1, (len(x), -1)).transpose(0, 1) if image_major else y.unflatten(0, (len(x), -1))
