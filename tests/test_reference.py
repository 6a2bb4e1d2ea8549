"""The oracle against the released program's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, golden, gradients, random_episodes, relative_error

from cxgrad_fast import Learner, reference
from cxgrad_fast.reference.network import conv_norm


@pytest.mark.parametrize("name", ["cxgrad_5w1s_a", "maml_5w1s"])
def test_golden(name: str) -> None:
    arrays, config, episodes = golden(name)
    names = Learner(config).released_names()
    parameters = {ours: torch.from_numpy(arrays[f"param/{theirs}"]).requires_grad_() for ours, theirs in names.items()}
    out = reference.meta_loss(config, parameters, episodes)
    trace = torch.cat([out.support_losses, out.query_losses[:, None].detach()], 1)
    np.testing.assert_allclose(trace.numpy(), arrays["trace_loss"], rtol=1e-12)
    np.testing.assert_allclose(out.loss.item(), arrays["outer_loss"], rtol=1e-12)
    for ours, gradient in gradients(out.loss, parameters).items():
        assert relative_error(gradient, torch.from_numpy(arrays[f"grad/{names[ours]}"])) < 1e-9, ours


def test_golden_can_fail() -> None:
    """The released mixture of orders is visible: the paper's other reading of line 10 has other gradients."""
    arrays, config, episodes = golden("cxgrad_5w1s_a")
    names = Learner(config).released_names()
    parameters = {ours: torch.from_numpy(arrays[f"param/{theirs}"]).requires_grad_() for ours, theirs in names.items()}
    other = config.override({"inner.initial_context_order": 2})
    found = gradients(reference.meta_loss(other, parameters, episodes).loss, parameters)
    errors = [relative_error(found[name], torch.from_numpy(arrays[f"grad/{names[name]}"])) for name in found]
    assert max(errors) > 1e-6


def test_context_moves_by_its_gradient() -> None:
    """beta = 0 leaves nu at zero: the factors are those of nu = 0 in every step."""
    config = config_of(inner__context_learning_rate=0.0, inner__steps=2)
    learner, episodes = Learner(config), random_episodes(config, 1)
    out = reference.meta_loss(config, learner.meta_parameters, episodes)
    first = gradients(out.loss, learner.meta_parameters)["scaler.0.weight"]
    assert first.abs().max() == 0  # nu = 0 is all that this matrix ever sees
    moving = reference.meta_loss(
        config.override({"inner.context_learning_rate": 1.0}), learner.meta_parameters, episodes
    )
    assert gradients(moving.loss, learner.meta_parameters)["scaler.0.weight"].abs().max() > 0


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_norms_and_their_two_derivatives(norm: str, images: int) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(images, 4, 4, 4, generator=g, dtype=torch.float64)
    theta = {
        "features.0.weight": torch.randn(4, 4, 1, 1, generator=g, dtype=torch.float64),
        "features.0.bias": torch.randn(4, generator=g, dtype=torch.float64),
        "features.0.norm.weight": torch.randn(4, generator=g, dtype=torch.float64),
        "features.0.norm.bias": torch.randn(4, generator=g, dtype=torch.float64),
    }

    def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        named = dict(zip(theta, weights, strict=True))
        return conv_norm(named, "features.0", x, eps=0.1, norm=norm, norm_groups=2)

    given = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in theta.values())]
    assert torch.autograd.gradcheck(block, given)
    assert torch.autograd.gradgradcheck(block, given)
    y = F.conv2d(x, theta["features.0.weight"], theta["features.0.bias"])
    scale, shift = theta["features.0.norm.weight"], theta["features.0.norm.bias"]
    if norm == "batch":
        expected = F.batch_norm(y, None, None, scale, shift, training=True, eps=0.1)
    else:
        expected = F.group_norm(y, 2 if norm == "group" else 1, scale, shift, 0.1)
    torch.testing.assert_close(block(*given), expected, rtol=1e-12, atol=1e-12)
    # of one image, a pooling's backward has such strides: torch's own batch norm then has wrong gradients
    cotangent = torch.randn(images * 64, generator=g, dtype=torch.float64).view(4, 4, images, 4).permute(2, 3, 0, 1)
    strided = torch.autograd.grad(block(*given), given, cotangent)
    plain = torch.autograd.grad(block(*given), given, cotangent.contiguous())
    for found, expected in zip(strided, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_statistics_of_a_pass() -> None:
    """Found: the batch's mean and unbiased variance; given: what normalises instead."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64)
    theta = {"c.weight": torch.randn(5, 2, 3, 3, generator=g, dtype=torch.float64)}
    theta |= {"c.norm.weight": torch.ones(5).double(), "c.norm.bias": torch.zeros(5).double()}
    y, found = F.conv2d(x, theta["c.weight"], padding=1), dict[str, tuple[torch.Tensor, torch.Tensor]]()
    conv_norm(theta, "c", x, eps=1e-5, found=found)
    running = (torch.zeros(5).double(), torch.ones(5).double())
    F.batch_norm(y, *running, training=True, momentum=1.0)
    torch.testing.assert_close(found["c"], running, rtol=1e-12, atol=1e-12)
    scored = conv_norm(theta, "c", x, eps=1e-5, given={"c": running})
    torch.testing.assert_close(scored, F.batch_norm(y, *running), rtol=1e-12, atol=1e-12)
