"""Reptile: its minibatches, its moments from task to task and from run to run, its meta-update, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import config_of, random_episodes, relative_error, spread_parameters
from test_static import pair
from tiny_runs import train, words
from torch import Tensor

from cxgrad_fast import Config, Episodes, EpisodeSampler, InputError, Learner
from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.engine import static
from cxgrad_fast.minibatches import draw_batches
from cxgrad_fast.reference.reptile import meta_step, reptile

pytest_plugins = ("tiny_runs_fixtures",)

TINY = {"inner.algorithm": "reptile", "inner.steps": 3, "inner.batch": 4, "task.shots": 2, "model.image_size": 16}


def tiny(**changes: Any) -> Config:
    return config_of().override(TINY, {name.replace("__", "."): value for name, value in changes.items()})


def spread(config: Config) -> Learner:
    learner = Learner(config)
    spread_parameters(learner)
    return learner


def values(learner: Learner) -> dict[str, Tensor]:
    return learner.state_dict()["parameters"]


def adam(learner: Learner) -> dict[str, Any]:
    """Keywords of the oracle's Adam and network."""
    inner, model = learner.config.inner, learner.config.model
    return {"learning_rate": inner.learning_rate, "slope": model.slope, "eps": model.norm_eps}


def of_network(named: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    names = [name for name in named if name.startswith((f"{prefix}features.", f"{prefix}head."))]
    return {name.removeprefix(prefix): named[name].clone() for name in names}


# --- minibatches ---


def sampler(config: Config, split: str = "train", training: bool = True) -> EpisodeSampler:
    images = torch.randint(256, (6 * 20, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pool = ImagePool(images, torch.arange(6).repeat_interleave(20), tuple("abcdef"), split, "noise")
    return EpisodeSampler(pool, config, torch.float64, training=training)


def test_a_set_is_shuffled_and_gone_through_again_and_again() -> None:
    drawn = draw_batches((0, 0, 7, 1), images=15, steps=8, size=10)
    assert drawn.shape == (8, 10)
    places = drawn.reshape(-1)
    for start in range(0, 75, 15):  # whole shuffles; batches span them
        assert sorted(places[start : start + 15]) == list(range(15))
    assert not np.array_equal(places[:15], places[15:30])
    assert np.array_equal(draw_batches((0, 0, 7, 1), 15, 3, 10), drawn[:3])
    assert not np.array_equal(draw_batches((0, 0, 8, 1), 15, 8, 10), drawn)
    # more than there are, and as many as there are
    assert sorted(draw_batches((1,), 3, 2, 6).reshape(-1)) == sorted(4 * list(range(3)))
    assert [sorted(batch) for batch in draw_batches((1,), 5, 4, 0)] == 4 * [list(range(5))]
    assert draw_batches((1,), 5, 0, 2).shape == (0, 2)


def test_the_numbers_of_a_draw_stay_what_they_are() -> None:
    """A run that was begun on another machine, or with an older version, goes on with the same batches."""
    assert draw_batches((0, 0, 0, 1), 10, 2, 4).tolist() == [[0, 9, 5, 8], [3, 7, 1, 2]]


def test_a_task_s_batches_are_its_own_whoever_draws_it() -> None:
    whole = sampler(tiny()).sample(3, 4)
    assert whole.batches is not None
    assert whole.batches.shape == (4, 3, 4)
    for task in range(4):
        assert torch.equal(sampler(tiny()).sample(3 + task, 1).batches[0], whole.batches[task])
    assert len({tuple(task.flatten().tolist()) for task in whole.batches}) == 4
    assert not torch.equal(sampler(tiny(), "val").sample(3, 4).batches, whole.batches)
    assert not torch.equal(sampler(tiny(run__seed=1)).sample(3, 4).batches, whole.batches)
    assert sampler(tiny(inner__algorithm="maml", inner__steps=1)).sample(0, 1).batches is None


def test_training_and_evaluation_have_their_own_sizes() -> None:
    config = tiny(task__train_shots=5, evaluation__steps=6, inner__evaluation_batch=7)
    trained, evaluated = (sampler(config, training=training).sample(0, 1) for training in (True, False))
    assert (trained.support_y.shape[1], tuple(trained.batches.shape)) == (25, (1, 3, 4))
    assert (evaluated.support_y.shape[1], tuple(evaluated.batches.shape)) == (10, (1, 6, 7))
    assert int(trained.batches.max()) > 10
    learner = Learner(config)
    learner.meta_step(trained)
    learner.predict(evaluated)
    with pytest.raises(ValueError, match=r"batches must be \[1, 6, images\], got \[1, 3, 4\]"):
        learner.predict(trained)


def test_batches_that_nobody_drew_are_the_seed_s() -> None:
    config = tiny()
    learner, given = spread(config), random_episodes(config)
    bare = Episodes(given.support_x, given.support_y, given.query_x, given.query_y)
    drawn = torch.from_numpy(draw_batches((config.run.seed, 3, 0, 1), 10, 3, 4)).expand(2, -1, -1)
    expected = Episodes(given.support_x, given.support_y, given.query_x, given.query_y, batches=drawn)
    assert torch.equal(learner.predict(bare), learner.predict(expected))
    assert not torch.equal(learner.predict(bare), learner.predict(given))
    assert relative_error(learner.adapt(bare.support_x, bare.support_y)(bare.query_x), learner.predict(bare)) < 1e-12


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (torch.zeros(2, 3, 4), r"batches must hold integers, got torch.float32"),
        (torch.zeros(2, 3, dtype=torch.long), r"batches must be \[2, steps, images\], got \[2, 3\]"),
        (torch.zeros(3, 3, 4, dtype=torch.long), r"batches must be \[2, steps, images\], got \[3, 3, 4\]"),
        (torch.zeros(2, 2, 4, dtype=torch.long), r"batches must be \[2, 3, images\], got \[2, 2, 4\]"),
        (torch.zeros(2, 3, 0, dtype=torch.long), r"batches must be \[2, 3, images\], got \[2, 3, 0\]"),
        (torch.full((2, 3, 4), 10), "batches must hold places in support_x, 0 to 9"),
        (torch.full((2, 3, 4), -1), "batches must hold places in support_x, 0 to 9"),
    ],
)
def test_batches_that_do_not_fit(batches: Tensor, told: str) -> None:
    learner, given = Learner(tiny()), random_episodes(tiny())
    with pytest.raises(ValueError, match=told):
        learner.meta_step(Episodes(given.support_x, given.support_y, given.query_x, given.query_y, batches=batches))


# --- what goes on from task to task ---


def test_a_meta_step_is_the_interpolation_and_moments_go_on() -> None:
    """Against the oracle's literal form, over two meta-steps: the second starts from the first's moments."""
    learner = spread(tiny(outer__optimizer="sgd", outer__learning_rate=0.5))
    theta, moments = of_network(values(learner)), of_network(values(learner), "moments.")
    count = values(learner)["count"].item()
    for seed in range(2):
        episodes = random_episodes(learner.config, tasks=3, seed=seed)
        leaves = {name: tensor.requires_grad_() for name, tensor in theta.items()}
        sets = (episodes.support_x, episodes.support_y, episodes.batches)
        found = meta_step(leaves, *sets, moments, count, meta_rate=0.5, **adam(learner))
        theta, moments, count = found["parameters"], found["moments"], found["count"]
        out = learner.meta_step(episodes)
        assert relative_error(out.support_losses, found["losses"]) < 1e-12
        after = values(learner)
        assert after["count"] == pytest.approx(count, rel=1e-14)
        for name, tensor in theta.items():
            assert relative_error(after[name], tensor) < 1e-12, name
            assert relative_error(after[f"moments.{name}"], moments[name]) < 1e-10, name


def test_the_rate_goes_on_a_line() -> None:
    """At iteration i of I: (1 - i / I) start + (i / I) final."""
    rates = {"outer.learning_rate": 1.0, "outer.final_learning_rate": 0.2, "outer.schedule": "linear"}
    config = tiny(outer__optimizer="sgd", outer__iterations=10).override(rates)
    starts = [spread(config), spread(config.override({"outer.schedule": "constant", "outer.learning_rate": 0.76}))]
    for learner in starts:
        learner.meta_step(random_episodes(config), iteration=3)
    torch.testing.assert_close(values(starts[0]), values(starts[1]), rtol=1e-13, atol=0)


def test_tasks_that_follow_each_other_are_not_those_that_do_not() -> None:
    """With moments carried, the second task is another than the same task alone; with new ones it is not."""
    for moments, is_same in (("carried", False), ("new", True)):
        learner = spread(tiny(inner__moments=moments))
        episodes = random_episodes(learner.config)
        both, alone = learner.meta_loss(episodes), learner.meta_loss(episodes[1:])
        assert torch.equal(both.query_logits[1], alone.query_logits[0]) == is_same
        assert bool(both.carried) != is_same


def test_evaluation_starts_each_task_from_the_same_moments_and_leaves_them() -> None:
    learner = spread(tiny(evaluation__steps=5))
    before = values(learner)
    given = random_episodes(learner.config)
    batches = torch.randint(10, (2, 5, 3), generator=torch.Generator().manual_seed(5))
    found = learner.adapt(given.support_x, given.support_y, batches=batches).state.fast
    for task in range(2):
        leaves = {name: tensor.requires_grad_() for name, tensor in of_network(before).items()}
        sets = (given.support_x[task], given.support_y[task], batches[task])
        moments = of_network(before, "moments.")
        expected = reptile(leaves, *sets, moments, before["count"].item(), **adam(learner))["adapted"]
        for name, tensor in expected.items():
            assert relative_error(found[name][task], tensor) < 1e-12, name
    torch.testing.assert_close(values(learner), before, rtol=0, atol=0)


def test_a_step_that_is_not_finite_leaves_the_moments() -> None:
    learner = spread(tiny())
    before, episodes = values(learner), random_episodes(tiny())
    episodes.support_x[1, 0, 0, 0, 0] = float("nan")
    episodes.batches[1, 2, 0] = 0
    with pytest.raises(ArithmeticError, match="of this meta-step is not finite"):
        learner.meta_step(episodes)
    torch.testing.assert_close(values(learner), before, rtol=0, atol=0)


def test_a_stopped_run_ends_as_one_that_was_not(images: Path, tmp_path: Path) -> None:
    """The batches of each task, and the moments, are those of the run that goes through."""
    changes = {"inner__algorithm": "reptile", "inner__batch": 2, "outer__validate_every": 9, "run__checkpoint_every": 1}
    changes |= {"evaluation__validation_tasks": 1, "evaluation__test_tasks": 1, "outer__optimizer": "sgd"}
    assert train("--out", tmp_path / "one", *words(images, **changes, outer__iterations=4)) == 0
    assert train("--out", tmp_path / "two", *words(images, **changes, outer__iterations=2)) == 0
    middle = read_checkpoint(tmp_path / "two" / "latest.pt").state["parameters"]
    assert middle["count"] == 2 * 2 * 2  # meta-steps, tasks, inner steps
    assert all((middle[name] > 0).any() for name in middle if name.startswith("moments."))
    assert train("--resume", tmp_path / "two", "--outer.iterations=4") == 0
    ends = [read_checkpoint(tmp_path / name / "latest.pt").state for name in ("one", "two")]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


# --- all tasks as one program; learning; settings ---


@pytest.mark.parametrize("settings", [{"inner__moments": "new"}, {"inner__optimizer": "sgd"}])
def test_tasks_that_do_not_follow_each_other_are_one_program(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many operator calls for three tasks as for two."""
    monkeypatch.setattr(static, "_TRIALS", 0)
    config = tiny(run__backend="cpp", **settings)
    calls = []
    for tasks in (2, 3):
        compiled, _, told = pair(config)
        compiled.meta_step(random_episodes(config, tasks))
        calls.append(told[0].rpartition(":")[2])
    assert calls[0] == calls[1]
    assert "operator calls" in calls[0]


@pytest.mark.parametrize("settings", [{}, {"inner__moments": "new"}, {"inner__optimizer": "sgd"}])
def test_meta_training_learns(settings: dict[str, Any]) -> None:
    """On a few tasks again and again, the loss before the inner steps falls, and that after them."""
    config = tiny(inner__learning_rate=0.01, outer__optimizer="sgd", outer__learning_rate=0.5, **settings)
    learner, episodes = Learner(config), random_episodes(config, tasks=3)
    labels = torch.arange(5).repeat(2).expand(3, -1)  # the same classes in all tasks: there is something to learn
    x = episodes.support_x[:1].expand(3, -1, -1, -1, -1).contiguous()
    episodes = Episodes(x, labels.contiguous(), x, labels.contiguous(), batches=episodes.batches)
    losses = [learner.meta_step(episodes) for _ in range(25)]
    assert losses[-1].support_losses[:, 0].mean() < 0.5 * losses[0].support_losses[:, 0].mean()
    assert losses[-1].loss < 0.5 * losses[0].loss


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"inner.order": 2}, "setting 'inner.order' takes one of 1, got 2"),
        ({"inner.first_order_iterations": 5}, "setting 'inner.first_order_iterations' takes one of 0, got 5"),
        (
            {"run.recompute": True},
            "setting 'run.recompute' has nothing to recompute: reptile keeps no graph of its inner steps",
        ),
        ({"inner.moments": "kept"}, "setting 'inner.moments' takes one of 'carried', 'new', got 'kept'"),
        ({"inner.beta2": 1.5}, "setting 'inner.beta2' must be at most 1, got 1.5"),
        (
            {"inner.algorithm": "mamlpp", "inner.steps": 2, "evaluation.steps": 3},
            "setting 'evaluation.steps' (=3) must be at most inner.steps (=2): each step of mamlpp has parameters of "
            "its own",
        ),
        (
            {"inner.algorithm": "protonet", "evaluation.steps": 3},
            "setting 'evaluation.steps' (=3) is of an inner loop, which protonet has not",
        ),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, object], told: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of().override({"inner.algorithm": "reptile"}, settings)
    assert str(caught.value) == told


@pytest.mark.parametrize("algorithm", ["maml", "cxgrad", "anil"])
def test_more_steps_in_evaluation_than_in_training(algorithm: str) -> None:
    config = config_of(inner__algorithm=algorithm, inner__steps=1)
    short, long = Learner(config.override({"evaluation.steps": 3})), Learner(config.override({"inner.steps": 3}))
    episodes = random_episodes(config)
    assert torch.equal(short.predict(episodes), long.predict(episodes))
    assert torch.equal(short.adapt(episodes.support_x, episodes.support_y)(episodes.query_x), long.predict(episodes))
    assert torch.equal(short.meta_loss(episodes).loss, Learner(config).meta_loss(episodes).loss)
