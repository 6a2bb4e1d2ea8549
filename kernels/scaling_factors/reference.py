"""The definition of scaling_factors in plain PyTorch: docs/math.md, Eq. 8 of the paper."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def scaling_factors(
    context: Tensor, w0: Tensor, b0: Tensor, w2: Tensor, b2: Tensor, *, norm_eps: float, least: float
) -> tuple[Tensor, Tensor]:
    """Factors and epsilons; see :func:`cxgrad_fast.kernels.scaling_factors`."""
    gammas = F.softplus(F.linear(F.relu(F.linear(context, w0, b0)), w2, b2))
    gammas = gammas + (least - gammas.detach()).clamp_min(0)
    # not norm_eps / gammas**2, whose derivative divides by the fourth power
    return gammas, norm_eps * gammas.reciprocal().square()
