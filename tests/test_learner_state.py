"""A learner's state is taken over by another of the same settings, whatever the algorithm, norm and backbone."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, random_episodes

from cxgrad_fast.algorithms import ALGORITHMS
from cxgrad_fast.learner import Learner
from cxgrad_fast.learner_state import check_state

SETTINGS = [
    *({"inner__algorithm": algorithm} for algorithm in ALGORITHMS if algorithm != "relationnet"),
    {"inner__algorithm": "relationnet", "inner__relation_padding": 1, "model__image_size": 22},
    {"model__norm": "layer"},
    {"outer__optimizer": "sgd"},
    {"model__conv_bias": True},
    {"model__backbone": "resnet12", "model__filters": 2, "model__image_size": 16},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_is_taken_over(settings: dict[str, object], steps: int) -> None:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    config = config_of(inner__steps=1).override(changes)
    one, other = Learner(config), Learner(config.override({"run.seed": 1}))
    episodes = random_episodes(config)
    for _ in range(steps):
        one.meta_step(episodes)
    check_state(config, one.state_dict())
    other.load_state_dict(one.state_dict())
    for learner in (one, other):
        learner.meta_step(episodes)
    for name, tensor in one.meta_parameters.items():
        assert torch.equal(tensor, other.meta_parameters[name]), name


def test_nothing_of_a_wrong_state_is_taken_over() -> None:
    config = config_of(inner__steps=1)
    learner = Learner(config)
    learner.meta_step(random_episodes(config))
    before, state = learner.state_dict(), Learner(config.override({"run.seed": 1})).state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = "fast"
    with pytest.raises(ValueError, match=r"^state.optimizer.param_groups\[0\].lr must be a number from 0 to 1e\+300"):
        learner.load_state_dict(state)
    for name, tensor in learner.state_dict()["parameters"].items():
        assert torch.equal(tensor, before["parameters"][name]), name
    for wrong in (None, [], {"parameters": {}}):
        with pytest.raises(ValueError, match=r"^state"):
            learner.load_state_dict(wrong)


def test_a_state_of_another_optimizer_is_told() -> None:
    sgd = config_of(outer__optimizer="sgd")
    for config, other, odd in ((sgd, config_of(), "betas"), (config_of(), sgd, "")):
        state = Learner(config).state_dict()
        if odd:
            with pytest.raises(ValueError, match=rf"^state.optimizer.param_groups\[0\] has no '{odd}'"):
                check_state(other, state)
        state["optimizer"]["param_groups"][0]["params"] = [0]
        with pytest.raises(ValueError, match=r"^state.optimizer.param_groups\[0\].params must be the 18 parameters"):
            check_state(config, state)


def test_a_rate_that_was_changed_by_hand_comes_with_the_state() -> None:
    config = config_of(inner__steps=1)
    one, other = Learner(config), Learner(config)
    one.optimizer.param_groups[0]["lr"] = 0.125
    other.load_state_dict(one.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 0.125
