"""What stands between the meta-gradient and the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import config_of, gradients, random_episodes

from cxgrad_fast import Learner
from cxgrad_fast.engine.updates import clipped, learning_rate
from cxgrad_fast.models import OWN


def outer(**settings: object):
    return config_of(**{f"outer__{name}": value for name, value in settings.items()}).outer


def test_schedules() -> None:
    assert learning_rate(outer(schedule="step", schedule_every=10, schedule_factor=0.5), 25) == 1e-3 / 4
    linear = outer(schedule="linear", iterations=10, final_learning_rate=1e-4)
    assert [learning_rate(linear, i) for i in (0, 5, 10, 11)] == pytest.approx([1e-3, 5.5e-4, 1e-4, 1e-4], rel=1e-12)
    cosine = outer(schedule="cosine", iterations=4)
    expected = [1e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)]
    assert [learning_rate(cosine, i) for i in range(5)] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    for schedule in ("constant", "step", "linear", "cosine"):
        assert learning_rate(outer(schedule=schedule), None) == 1e-3


def test_networks_are_clipped_apart() -> None:
    """RelationNet's program: encoder and relation module, each to a norm of its own."""
    settings = {"inner.algorithm": "relationnet", "inner.relation_padding": 1, "model.image_size": 22}
    learner = Learner(config_of().override(settings | {"outer.clip_norm": 1e-3, "outer.clip": "apart"}))
    episodes = random_episodes(learner.config)
    found = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    learner.meta_step(episodes)
    moments = [state["exp_avg"] / 0.1 for state in learner.state_dict()["optimizer"]["state"].values()]
    for start in ("features.", "relation."):
        names = [name for name in found if name.startswith(start)]
        norm = torch.cat([found[name].flatten() for name in names]).norm()
        assert norm > 1e-3
        for name, moment in zip(found, moments, strict=True):
            if name in names:
                torch.testing.assert_close(moment, found[name] * (1e-3 / norm), rtol=1e-9, atol=1e-15)
    without = config_of().override({"inner.algorithm": "protonet", "outer.clip_norm": 1e-3, "outer.clip": "apart"})
    Learner(without).meta_step(random_episodes(without))  # which has the backbone alone


def test_clipping() -> None:
    found = [torch.tensor([3.0, -30.0]), torch.tensor([40.0])]
    values = clipped(outer(clip_value=10), found, [True, False])
    assert [value.tolist() for value in values] == [[3, -10], [40]]
    norms = clipped(outer(clip_norm=5), found, [True, True])
    assert torch.stack([value.norm() for value in norms]).norm().item() == pytest.approx(5)
    assert torch.allclose(norms[1] / norms[0][0], torch.tensor(40 / 3))
    small = clipped(outer(clip_norm=100), found, [True, True])
    assert all(torch.equal(a, b) for a, b in zip(small, found, strict=True))
    for settings in ({"clip_value": 10.0}, {"clip_norm": 1.0}):
        broken = clipped(outer(**settings), [torch.tensor([math.inf, 1.0]), torch.tensor([math.nan])], [True, True])
        assert not any(value.isfinite().all() for value in broken)


def test_a_meta_step_goes_by_them() -> None:
    """Adam's first step moves every element by its rate; a clipped gradient is what Adam's moments hold."""
    settings = {"outer.schedule": "step", "outer.schedule_every": 2, "outer.clip_value": 1e-4, "outer.clip": "network"}
    learner = Learner(config_of(inner__algorithm="l2f", inner__steps=1).override(settings))
    episodes = random_episodes(learner.config)
    expected = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    learner.meta_step(episodes, iteration=3)
    assert learner.optimizer.param_groups[0]["lr"] == 5e-4
    for name, parameter in learner.meta_parameters.items():
        gradient = expected[name]
        if learner.algorithm.declared[name].role != OWN:
            gradient = gradient.clamp(-1e-4, 1e-4)
        torch.testing.assert_close(learner.optimizer.state[parameter]["exp_avg"], 0.1 * gradient, rtol=1e-9, atol=0)
    assert any((gradient.abs() > 1e-4).any() for gradient in expected.values())


def test_gradient_descent() -> None:
    learner = Learner(config_of(inner__steps=1, outer__optimizer="sgd", outer__learning_rate=0.25))
    episodes = random_episodes(learner.config)
    gradient = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    expected = {name: tensor.detach() - 0.25 * gradient[name] for name, tensor in learner.meta_parameters.items()}
    learner.meta_step(episodes)
    torch.testing.assert_close(dict(learner.state_dict()["parameters"]), expected, rtol=1e-14, atol=0)


def test_adam_starts_anew() -> None:
    learner = Learner(config_of(inner__steps=1, outer__restart_every=2))
    episodes = random_episodes(learner.config)
    counts = []
    for iteration in range(5):
        learner.meta_step(episodes, iteration)
        counts.append(int(next(iter(learner.optimizer.state.values()))["step"]))
    assert counts == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("algorithm", ["l2f", "mamlpp"])
def test_first_order_at_first(algorithm: str) -> None:
    config = config_of(inner__algorithm=algorithm, inner__steps=2, inner__first_order_iterations=5)
    changing, first, second = (
        Learner(config.override(settings)) for settings in ({}, {"inner.order": 1}, {"inner.first_order_iterations": 0})
    )
    episodes = random_episodes(config)

    def found(learner: Learner, iteration: int) -> dict[str, torch.Tensor]:
        return gradients(learner.meta_loss(episodes, iteration).loss, learner.meta_parameters)

    for iteration, other in ((4, first), (5, second)):
        expected = found(other, iteration)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found(changing, iteration).items())
    assert not torch.equal(found(first, 5)["features.0.weight"], found(second, 5)["features.0.weight"])


@pytest.mark.parametrize("epoch", [0, 7, 14, 15])
def test_multi_step_loss(epoch: int) -> None:
    settings = {"inner.multi_step_iterations": 30, "inner.multi_step_epoch": 2}
    learner = Learner(config_of(inner__algorithm="mamlpp", inner__steps=3).override(settings))
    out = learner.meta_loss(random_episodes(learner.config), 2 * epoch)
    early = max(1 / 3 - epoch / 45, 0.01)
    weights = [early, early, 1 - 2 * early] if epoch < 15 else [1.0]
    assert out.asked_losses.shape == (2, len(weights))
    expected = (out.asked_losses * torch.tensor(weights, dtype=torch.float64)).sum(1).mean()
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(out.asked_losses[:, -1], out.query_losses.detach())


@pytest.mark.slow
def test_compiled_phases_have_their_own_programs() -> None:
    """The same bits as uncompiled on both sides of the change, with weights as an input of the program."""
    settings = {"inner.multi_step_iterations": 4, "inner.multi_step_epoch": 1}
    config = config_of(inner__algorithm="mamlpp", inner__steps=2).override(settings)
    plain, compiled = Learner(config), Learner(config.override({"run.compile": True}))
    episodes = random_episodes(config)
    for iteration in range(6):
        ours, theirs = compiled.meta_step(episodes, iteration), plain.meta_step(episodes, iteration)
        assert torch.equal(ours.loss, theirs.loss), iteration
    assert len(compiled._gradients.statics) == 2
    for name, tensor in compiled.meta_parameters.items():
        assert torch.equal(tensor, plain.meta_parameters[name]), name
