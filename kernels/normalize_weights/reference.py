"""The definition of normalize_weights in plain PyTorch: MATH.md 3."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cxgrad_fast.kernels.scale_weights.reference import norm_of


def normalize_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """``w_l / |w_l|`` and ``|w_l|``; see :func:`cxgrad_fast.kernels.normalize_weights`."""
    tasks, dtype = tasks_of(weights), weights[0].dtype
    norms = [norm_of(weight) for weight in weights]
    units = [
        (weight / norm.view(-1, *[1] * (weight.ndim - 1))).to(dtype)
        for weight, norm in zip(weights, norms, strict=True)
    ]
    return units, torch.stack([norm.expand(tasks) for norm in norms], dim=1).to(dtype)


def tasks_of(weights: Sequence[Tensor]) -> int:
    """How many tasks the weights ``[T or 1, ...]`` are for: 1 where all are shared."""
    return next((weight.shape[0] for weight in weights if weight.ndim and weight.shape[0] != 1), 1)
