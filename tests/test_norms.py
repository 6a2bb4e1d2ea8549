"""Eq. 4 and 5 of the paper for batch, group and layer norm: the loss forgets the weight's scale, its gradient does not.

Exact for the epsilon that scales along, eps / a^2 (Clarification 7).
"""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error

from cxgrad_fast.kernels import conv_block

NORMS = {"batch": {}, "group": {"norm": "group", "groups": 3}, "layer": {"norm": "group", "groups": 1}}


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_scaling_the_weight(norm: str, pool: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 7, 6, generator=g).double(), torch.randn(2, 6, 4, 3, 3, generator=g).double()
    scale, bias = torch.randn(1, 6, generator=g).double(), torch.randn(1, 6, generator=g).double()
    eps = torch.tensor([1e-2, 1e-5], dtype=torch.float64)
    a = torch.tensor([0.3, 7.0], dtype=torch.float64)

    def block(weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return conv_block(x, weight, scale, bias, eps, slope=0.01, pool=pool, **NORMS[norm])  # type: ignore[call-overload]

    plain = weight.clone().requires_grad_()
    scaled = (a.view(2, 1, 1, 1, 1) * weight).requires_grad_()
    z, z_hat = block(plain, eps / a.square()), block(scaled, eps)
    assert relative_error(z_hat, z) < 1e-13  # Eq. 4
    cotangent = torch.randn(z.shape, generator=g).double()
    (gradient,) = torch.autograd.grad(z, plain, cotangent)
    (gradient_hat,) = torch.autograd.grad(z_hat, scaled, cotangent)
    assert relative_error(gradient_hat, gradient / a.view(2, 1, 1, 1, 1)) < 1e-12  # Eq. 5
    # and at one epsilon the two differ, by the epsilon: the test can fail
    assert relative_error(block(scaled, eps), block(plain, eps)) > 1e-8


def test_closed_form_of_the_factor_gradient() -> None:
    """dL/dgamma = (eps / gamma^3) * sum_c r^2 g dg for batch statistics (MATH.md 3)."""
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 3, 4, 6, 6, generator=g).double(), torch.randn(2, 5, 4, 3, 3, generator=g).double()
    unit = weight / weight.flatten(1).norm(dim=1).view(2, 1, 1, 1, 1)
    scale = torch.randn(2, 5, generator=g).double().requires_grad_()
    bias = torch.randn(2, 5, generator=g).double()
    gamma = torch.tensor([0.7, 0.1], dtype=torch.float64, requires_grad=True)
    eps = 1e-3
    y, (_, variance) = conv_block(
        x, unit, scale, bias, eps / gamma.square(), slope=0.01, pool=True, return_statistics=True
    )
    cotangent = torch.randn(y.shape, generator=g).double()
    dg, dgamma = torch.autograd.grad(y, (scale, gamma), cotangent)
    r_squared = 1 / (variance + eps / gamma[:, None].square())
    expected = eps / gamma**3 * (r_squared * scale * dg).sum(1)
    assert relative_error(dgamma, expected) < 1e-12
