"""patch_statistics in C++; it has no derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator

_launch = launcher("patch_statistics")


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    tasks, length = x.shape[0], 9 * x.shape[2]
    mean = x.new_empty((tasks, length), dtype=torch.float64)
    return mean, x.new_empty((tasks, length, length), dtype=torch.float64)


@operator(fake=_fake)
def patch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the zero-padded 3x3 patches; see :func:`cxgrad_fast.kernels.patch_statistics`."""
    mean, covariance = _launch(x)
    return mean, covariance
