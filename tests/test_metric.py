"""What algorithms without an inner loop have of their own: running statistics, tasks of other shapes, their scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_engine import config_for
from golden_files import read
from helpers import GOLDEN, config_of, gradients, random_episodes, relative_error
from test_algorithms import VARIANTS, algorithm_of, is_metric, spread, tiny
from test_pool import numbered_pool

from cxgrad_fast import Config, EpisodeSampler, InputError, Learner, reference
from cxgrad_fast.config import ALGORITHMS as CONFIGS
from cxgrad_fast.engine import prediction, static

METRIC = pytest.mark.parametrize("variant", [name for name in VARIANTS if is_metric(name)])


def of_training(config: Config) -> Config:
    """With the tasks of meta-training."""
    task = config.task.of_training()
    return config.override({"task.ways": task.ways, "task.shots": task.shots, "task.queries": task.queries})


# --- tasks of meta-training that differ from those of the test ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if CONFIGS[algorithm_of(name)].any_ways])
def test_training_tasks_of_another_shape_equal_the_oracle(variant: str) -> None:
    config = tiny(variant, task__train_ways=5, task__train_shots=2, task__train_queries=1)
    learner = spread(config)
    episodes = random_episodes(of_training(config))
    ours, theirs = (
        learner.meta_loss(episodes),
        reference.meta_loss(config, learner.meta_parameters, episodes),
    )
    assert ours.query_logits.shape == (2, 5, 5)
    assert relative_error(ours.query_logits, theirs.query_logits) < 1e-10
    learner.meta_step(episodes)
    assert learner.predict(random_episodes(config)).shape == (2, 9, 3)


@METRIC
def test_labels_beyond_the_ways_are_told(variant: str) -> None:
    config = tiny(variant, task__train_ways=4)
    learner, episodes = Learner(config), random_episodes(config.override({"task.ways": 5}))
    with pytest.raises(ValueError, match=r"support_y must hold labels 0 to 3 \(task.train_ways = 4\), got 4"):
        learner.meta_loss(episodes)
    with pytest.raises(ValueError, match=r"support_y must hold labels 0 to 2 \(task.ways = 3\), got 4"):
        learner.predict(episodes)


def test_the_sampler_draws_training_tasks() -> None:
    changes = {"task.ways": 3, "task.train_ways": 5, "task.train_queries": 2, "inner.algorithm": "protonet"}
    config = config_of().override(changes)
    pool = numbered_pool([8] * 6)
    episodes = EpisodeSampler(pool, config, training=True).sample(0, 2)
    assert (episodes.support_x.shape[1], episodes.query_x.shape[1], episodes.ways) == (5, 10, 5)
    episodes = EpisodeSampler(pool, config).sample(0, 2)
    assert (episodes.support_x.shape[1], episodes.query_x.shape[1], episodes.ways) == (3, 9, 3)
    with pytest.raises(InputError, match=r"^task.train_ways \(=5\) is more than the 4 classes"):
        EpisodeSampler(numbered_pool([8] * 4), config, training=True)
    with pytest.raises(InputError, match=r"task.shots \+ task.train_queries \(=1 \+ 2\) needs 3"):
        EpisodeSampler(numbered_pool([2] * 6), config, training=True)


# --- running statistics ---


@METRIC
def test_running_statistics_are_those_of_one_task_after_another(variant: str) -> None:
    """From (0, 1) on, by torch's own BatchNorm2d in the place of the first norm, task after task, pass after pass."""
    learner = spread(tiny(variant, model__conv_bias=True))
    before = {name: tensor.detach().clone() for name, tensor in learner.meta_parameters.items()}
    norm = torch.nn.BatchNorm2d(4, momentum=learner.config.inner.statistics_momentum).double()
    padding = 0 if variant.startswith("relationnet") else 1
    episodes = random_episodes(learner.config, tasks=3)
    for task in range(3):
        learner.meta_step(episodes[task : task + 1])
        learner.load_state_dict(learner.state_dict() | {"parameters": before})
        sets = [episodes.support_x[task], episodes.query_x[task]]
        for x in [torch.cat(sets)] if learner.config.inner.joint else sets:
            norm(F.conv2d(x, before["features.0.weight"], before["features.0.bias"], padding=padding))
    mean, variance = learner.running_statistics["features.0"]
    torch.testing.assert_close((mean, variance), (norm.running_mean, norm.running_var), rtol=1e-12, atol=1e-12)


@METRIC
def test_the_tasks_of_a_meta_step_count_alike(variant: str) -> None:
    learner = spread(tiny(variant))
    episodes = random_episodes(learner.config)
    both = learner.meta_loss(episodes).statistics
    one, other = (learner.meta_loss(episodes[task : task + 1]).statistics for task in range(2))
    for layer, pair in both.items():
        for index, found in enumerate(pair):
            assert relative_error(found, (one[layer][index] + other[layer][index]) / 2) < 1e-12


@pytest.mark.parametrize("momentum", [0.3, 1.0])
@METRIC
def test_the_momentum_is_a_setting(variant: str, momentum: float) -> None:
    """The second of two equal steps: what the first one left, moved by the same again."""
    config = tiny(variant, inner__statistics_momentum=momentum)
    learner, episodes = spread(config), random_episodes(config, tasks=1)
    state = learner.state_dict()["parameters"]
    seen = []
    for _ in range(2):
        learner.meta_step(episodes)
        seen.append(learner.running_statistics["features.1"][0].clone())
        learner.load_state_dict(learner.state_dict() | {"parameters": state})
    kept = (1 - momentum) ** (1 if config.inner.joint else 2)
    torch.testing.assert_close(seen[1], seen[0] * (1 + kept), rtol=1e-10, atol=1e-12)


@METRIC
def test_compiled_answers_under_running_statistics_have_the_eager_bits(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static, "_TRIALS", 0)
    monkeypatch.setattr(prediction, "PATIENCE", 0)
    plain, compiled = spread(tiny(variant)), Learner(tiny(variant, run__compile=True))
    plain.meta_step(random_episodes(plain.config))
    compiled.load_state_dict(plain.state_dict())
    for seed in (1, 2):
        episodes = random_episodes(plain.config, seed=seed)
        assert torch.equal(compiled.predict(episodes, "running"), plain.predict(episodes, "running"))


# --- released checkpoints ---

FAMILIES = ("protonet", "matchingnet", "relationnet")
PROGRAMS = sorted(path.stem for path in GOLDEN.glob("*.npz") if path.stem.startswith(FAMILIES))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_released_checkpoint_brings_its_running_statistics(name: str) -> None:
    file = read(GOLDEN / f"{name}.npz")
    if "eval_query_logits" not in file.arrays:
        pytest.skip("the program keeps none")
    config = config_for(file)
    assert config is not None
    learner = Learner(config)
    content = {file.table[ours]: tensor for ours, tensor in file.parameters.items()}
    learner.load_released(content)
    with pytest.raises(InputError, match="this learner has none"):
        learner.predict(file.episodes, "running")
    prefix = "buffer_after/"
    content |= {key.removeprefix(prefix): array for key, array in file.arrays.items() if key.startswith(prefix)}
    learner.load_released(content)
    assert relative_error(learner.predict(file.episodes, "running"), file.arrays["eval_query_logits"]) < 1e-10
    now, share = (
        learner.meta_loss(file.episodes).statistics["features.0"][0],
        learner.algorithm.running_share("features.0"),
    )
    assert share is not None
    expected = learner.running_statistics["features.0"][0].lerp(now, share)
    learner.meta_step(file.episodes)  # goes on from them, not from 0 and 1
    assert relative_error(learner.running_statistics["features.0"][0], expected) < 1e-12


# --- scores ---


def test_a_distance_of_zero_has_a_gradient() -> None:
    """A query that is its class's only support: the distance is 0, where the root's slope is endless."""
    learner = spread(tiny("protonet", inner__distance="euclidean"))
    episodes = random_episodes(learner.config)
    same = replace(episodes, query_x=episodes.support_x, query_y=episodes.support_y)
    out = learner.meta_loss(same)
    assert out.query_logits.amax() == 0
    assert all(gradient.isfinite().all() for gradient in gradients(out.loss, learner.meta_parameters).values())


def test_a_class_without_supports_has_a_prototype_of_zeros() -> None:
    learner = spread(tiny("protonet"))
    episodes = random_episodes(learner.config)
    without = replace(episodes, support_y=episodes.support_y.clamp_max(1))
    scores = learner.meta_loss(without).query_logits
    assert scores.isfinite().all()
