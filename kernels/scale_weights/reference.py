"""The definition of scale_weights in plain PyTorch: MATH.md 3, Eq. 6 and Algorithm 2 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """``w_l <- gamma_l * w_l / |w_l|``; see :func:`cxgrad_fast.kernels.scale_weights`."""
    scaled = []
    for layer, weight in enumerate(weights):
        flat = weight.flatten(1)
        factor = gammas[:, layer, None] / flat.norm(dim=1, keepdim=True)
        scaled.append((factor * flat).unflatten(1, weight.shape[1:]))
    return scaled
