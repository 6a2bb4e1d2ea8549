"""The definition of residual_end in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def residual_end(x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int) -> Tensor:
    """``max_pool(leaky_relu(x + shortcut))``; see :func:`cxgrad_fast.kernels.residual_end`."""
    if not len(x):  # the framework does not pool nothing
        height, width = ((size + 2 * padding) // 2 if pool else size for size in x.shape[3:])
        return (x.sum() + shortcut.sum()).expand(*x.shape[:3], height, width)
    total = (x + shortcut).transpose(0, 1).flatten(1, 2)  # image-major, as conv_block has it: no copy
    if pool:  # before the activation, which is monotone: the same values, a quarter of the work
        total = F.max_pool2d(total, 2, padding=padding)
    y = F.leaky_relu(total, slope) if slope else F.relu(total)
    return y.unflatten(1, (len(x), -1)).transpose(0, 1)
