"""The definition of scale_weights in plain PyTorch: MATH.md 3, Eq. 6 and Algorithm 2 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """``w_l <- gamma_l * w_l / |w_l|``; see :func:`cxgrad_fast.kernels.scale_weights`."""
    scaled = []
    for layer, weight in enumerate(weights):
        factor = gammas[:, layer] / norm_of(weight)  # float64, as the norm
        scaled.append((factor.view(-1, *[1] * (weight.ndim - 1)) * weight).to(weight.dtype))
    return scaled


def norm_of(weight: Tensor) -> Tensor:
    """``|w|`` of a weight ``[T or 1, ...]``: ``[T or 1]``, float64, in which squares of float32 numbers are exact."""
    return torch.linalg.vector_norm(weight.unsqueeze(-1).flatten(1), dim=1, dtype=torch.float64)
