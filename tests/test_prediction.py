"""Compiled predictions: the uncompiled ones' bits, one program for all learners of a Config."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from helpers import config_of, random_episodes, spread_parameters
from test_captured import Rerun
from torch import Tensor

from cxgrad_fast import Learner
from cxgrad_fast.engine import prediction, static
from cxgrad_fast.engine.prediction import Predictions, captured_predictions

KINDS = ("transductive", "support", "running")
CONFIG = config_of(inner__steps=1, model__image_size=16)


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs from the first call on, without trials."""
    monkeypatch.setattr(static, "_TRIALS", 0)
    monkeypatch.setattr(prediction, "PATIENCE", 0)


def trained() -> Learner:
    """With running statistics, and parameters that are nothing special."""
    learner = Learner(CONFIG)
    learner.meta_step(random_episodes(CONFIG))
    spread_parameters(learner)
    return learner


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_predictions_are_the_same_to_the_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_once(monkeypatch)
    plain, compiled = trained(), Learner(CONFIG.override({"run.compile": True}))
    compiled.load_state_dict(plain.state_dict())
    for tasks, seed in ((2, 1), (2, 2), (1, 3)):
        episodes = random_episodes(CONFIG, tasks, seed)
        assert torch.equal(compiled.predict(episodes, kind), plain.predict(episodes, kind))
    told = capsys.readouterr().err.splitlines()
    assert ["again, for another shape of episodes" in line for line in told] == [False, True]


@pytest.mark.slow
def test_an_ensemble_compiles_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    at_once(monkeypatch)
    gc.collect()  # what other tests left
    config = CONFIG.override({"run.compile": True})
    members = [Learner(config) for _ in range(3)]
    for seed, member in enumerate(members):
        spread_parameters(member, seed)
    episodes = random_episodes(CONFIG)
    answers = [member.predict(episodes) for member in members]
    assert not torch.equal(answers[0], answers[1])
    assert capsys.readouterr().err.count("prediction compiled") == 1
    assert len(prediction._shared) == 1
    del members, member
    gc.collect()
    assert len(prediction._shared) == 0  # and goes with the last of them


@pytest.mark.parametrize("kind", KINDS)
def test_captured_predictions(kind: str) -> None:
    """As on a device: parameters and images are copied to where they were recorded."""
    first, second = trained(), trained()
    spread_parameters(second, 5)
    graphs = Rerun(warm_ups=1)
    shared = captured_predictions(first.engine, graphs, patience=0)
    for learner in (first, second, first):
        for seed in (1, 2):
            episodes = random_episodes(CONFIG, 2, seed)
            found = shared(learner.meta_parameters, episodes, kind, learner.running_statistics)
            assert torch.equal(found, learner.predict(episodes, kind))
    assert graphs.recorded == 1


def test_a_batch_that_comes_seldom_is_not_worth_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch)
    learner, compiled = trained(), []

    def compiler(function: static.Function, inputs: Sequence[Tensor]) -> static.Function:
        compiled.append(len(inputs[-1]))
        return function

    predictions = Predictions(learner.engine, compiler, patience=3)
    for tasks in (2, 2, 1, 2, 2, 2, 1, 2):
        predictions(learner.meta_parameters, random_episodes(CONFIG, tasks), "transductive", {})
    assert compiled == [2]
