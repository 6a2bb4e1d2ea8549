"""Steps with the next one under way: the same run as one step at a time, and none done that nobody is told of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import config_of
from test_captured import Rerun, fused

from cxgrad_fast import EpisodeSampler, Learner
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.learner import NonFiniteLossError
from cxgrad_fast.pipeline import StepNumbers, Steps

CONFIG = config_of(inner__steps=1, model__image_size=16, model__filters=2, task__queries=2)


@pytest.fixture(scope="module")
def sampler() -> EpisodeSampler:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 16, 16, 3), dtype=torch.uint8, generator=g)
    pool = ImagePool(images, torch.arange(8).repeat_interleave(6), tuple("abcdefgh"), "train", "noise")
    return EpisodeSampler(pool, CONFIG, torch.float64)


def ahead() -> Learner:
    """A learner whose steps are captured, so that two are under way at once."""
    learner = fused(Learner(CONFIG))
    learner._captured = learner._captured_step(Rerun(warm_ups=1))
    assert learner.steps_ahead == 2
    return learner


def steps_of(learner: Learner, sampler: EpisodeSampler, first: int = 0) -> Steps:
    return Steps(learner, sampler, 2, slice(0, 2), first)


def step(steps: Steps, until: int) -> StepNumbers:
    steps.advance(until)
    return steps.finish()


def assert_same(one: Learner, other: Learner) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_the_numbers_of_one_step_at_a_time(sampler: EpisodeSampler) -> None:
    plain, captured = fused(Learner(CONFIG)), ahead()
    assert plain.steps_ahead == 1
    one, two = steps_of(plain, sampler), steps_of(captured, sampler)
    for number in range(6):
        expected, found = step(one, 6), step(two, 6)
        assert replace(found, seconds=0) == replace(expected, seconds=0)
        assert len(found.support_losses) == 2
        direct = sampler.sample(2 * number, 2)
        assert direct.ways == 5  # whoever draws knows the labels
    assert_same(plain, captured)
    assert not two.is_next_done()


def test_nothing_is_started_beyond_where_the_weights_are_wanted(sampler: EpisodeSampler) -> None:
    plain, captured = fused(Learner(CONFIG)), ahead()
    one, two = steps_of(plain, sampler), steps_of(captured, sampler)
    for until, count in ((3, 3), (5, 2)):
        for _ in range(count):
            step(one, until)
            step(two, until)
        assert_same(plain, captured)


def test_what_is_under_way_is_finished_before_a_checkpoint(sampler: EpisodeSampler) -> None:
    plain, captured = fused(Learner(CONFIG)), ahead()
    one, two = steps_of(plain, sampler, first=3), steps_of(captured, sampler, first=3)
    found = [step(two, 9)]
    while two.is_next_done():
        found.append(two.finish())
    expected = [step(one, 9) for _ in found]
    assert len(found) == 2
    assert [numbers.loss for numbers in found] == [numbers.loss for numbers in expected]
    assert_same(plain, captured)


def test_a_step_changes_nothing_until_it_is_finished(sampler: EpisodeSampler) -> None:
    learner, untouched = Learner(CONFIG), Learner(CONFIG)
    steps = steps_of(learner, sampler)
    steps.advance(9)
    assert steps.is_next_done()
    assert_same(learner, untouched)
    steps.finish()
    expected = steps_of(untouched, sampler)
    step(expected, 9)
    assert_same(learner, untouched)


def test_a_step_that_is_not_finite_is_the_one_told_of(sampler: EpisodeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, plain = ahead(), fused(Learner(CONFIG))
    sample = sampler.sample

    def with_a_hole(start: int, count: int) -> object:
        episodes = sample(start, count)
        return replace(episodes, query_x=episodes.query_x * float("nan")) if start == 4 else episodes

    monkeypatch.setattr(sampler, "sample", with_a_hole)
    one, two = steps_of(plain, sampler), steps_of(captured, sampler)
    for _ in range(2):
        assert step(two, 9).loss == step(one, 9).loss
    with pytest.raises(NonFiniteLossError, match="the loss of this meta-step is not finite"):
        two.advance(9)
    assert_same(plain, captured)  # the weights before it, though the step after it was started
