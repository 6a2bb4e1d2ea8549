"""The definition of linear_cross_entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_LABEL = torch.iinfo(torch.int64).min  # the framework leaves out images of one label, which is -100 unless told


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logits; see :func:`cxgrad_fast.kernels.linear_cross_entropy`."""
    logits = torch.baddbmm(bias[:, None], x.flatten(2), weight.mT)
    whole = labels.flatten().long()
    try:
        losses = F.cross_entropy(logits.flatten(0, 1), whole, reduction="none", ignore_index=_NO_LABEL)
    except IndexError:  # which the framework raises on the CPU, without waiting for a device
        ways = weight.shape[1]
        wrong = int(whole[(whole < 0) | (whole >= ways)][0])
        raise ValueError(f"labels must be from 0 to {ways - 1}, got {wrong}") from None
    return losses.view(labels.shape).mean(1), logits
