"""The oracle against the released program's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import config_of, golden, gradients, random_episodes, relative_error

from cxgrad_fast import Learner, reference


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
