"""The definition of normalize_weights in plain PyTorch: MATH.md 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalize_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``w_l / |w_l|`` and ``|w_l|``; see :func:`cxgrad_fast.kernels.normalize_weights`."""
    tasks = max(len(weight) for weight in weights)
    norms = [weight.flatten(1).norm(dim=1) for weight in weights]
    units = [weight / norm.view(-1, *[1] * (weight.ndim - 1)) for weight, norm in zip(weights, norms, strict=True)]
    return units, torch.stack([norm.expand(tasks) for norm in norms], dim=1)
