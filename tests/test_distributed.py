"""Several ranks train as one process does; one that dies is named, and nothing is lost with it."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from helpers import config_of, random_episodes, relative_error
from ranks import Launched
from same_runs import assert_same_run
from test_captured import Rerun, fused
from tiny_runs import train, words
from torch import Tensor

from cxgrad_fast import EpisodeSampler, InputError, Learner
from cxgrad_fast import train as train_module
from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.cli import run_command
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.engine import ALONE, Ranks, join_ranks
from cxgrad_fast.evaluate import main as evaluate
from cxgrad_fast.evaluate import predict_tasks

pytest_plugins = ("tiny_runs_fixtures",)

# the numbers, in ranks


CASES = [
    {"outer.meta_batch": 4},
    {"outer.meta_batch": 3},
    {"outer.meta_batch": 2, "outer.reduction": "sum"},  # fewer tasks than three ranks
    {"outer.meta_batch": 5, "inner.algorithm": "maml", "run.tasks_per_chunk": 1, "run.precision": "float32"},
]
SMALL = {"task.ways": 3, "model.image_size": 16, "inner.steps": 2}


def check_numbers() -> None:
    """In each rank: gradients, twenty steps, validation, against a learner that is alone."""
    with join_ranks() as ranks:
        for case in CASES:
            config = config_of(**SMALL, **case)
            many, one = Learner(config, ranks), Learner(config)
            tolerance = 1e-12 if many.dtype == torch.float64 else 1e-3
            check_gradients(ranks, many, one, tolerance)
            check_steps(ranks, many, one, 100 * tolerance)
        check_captured(ranks)
        check_predictions(ranks)


def check_gradients(ranks: Ranks, many: Learner, one: Learner, tolerance: float) -> None:
    tasks = many.config.outer.meta_batch
    episodes = random_episodes(many.config, tasks).to(dtype=many.dtype)
    parameters, own = list(many.meta_parameters.values()), episodes[ranks.shard(tasks)]
    out, found = many._sharing(many._gradients, parameters, own, many.algorithm.phase(None))
    assert_same_on_all(ranks, found)
    if ranks.is_first:
        wanted, expected = one._gradients(list(one.meta_parameters.values()), episodes, one.algorithm.phase(None))
        assert relative_error(flat(found), flat(expected)) < tolerance
        for field in ("loss", "query_logits", "support_losses", "query_losses", "accuracy", "statistics"):
            torch.testing.assert_close(getattr(out, field), getattr(wanted, field), rtol=tolerance, atol=tolerance)


def check_steps(ranks: Ranks, many: Learner, one: Learner, tolerance: float) -> None:
    tasks = many.config.outer.meta_batch
    for step in range(20 if tasks > 2 and many.dtype == torch.float64 else 2):
        episodes = random_episodes(many.config, tasks, seed=step)
        many.meta_step(episodes[ranks.shard(tasks)])
        if ranks.is_first:
            one.meta_step(episodes)
    assert_same_on_all(ranks, list(many.meta_parameters.values()))
    if ranks.is_first:
        torch.testing.assert_close(many.state_dict(), one.state_dict(), rtol=tolerance, atol=tolerance)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same_on_all(ranks: Ranks, tensors: Sequence[Tensor]) -> None:
    """To the bit."""
    assert torch.equal(ranks.from_first(lambda: flat(tensors)), flat(tensors))


def check_captured(ranks: Ranks) -> None:
    """A captured step holds the sum, on ranks without tasks too: all record and replay it alike."""
    for tasks in (2, 4):
        config = config_of(**SMALL, **{"outer.meta_batch": tasks})
        captured, plain = fused(Learner(config, ranks)), fused(Learner(config, ranks))
        # on CPUs the sums bring words, which the host reads; on devices it asks for them beside the graph
        captured._captured = captured._captured_step(Rerun(may_wait=True))
        captured._captured._report = lambda message: None
        for step in range(3):
            episodes = random_episodes(config, tasks, seed=step)[ranks.shard(tasks)]
            ours, expected = captured.meta_step(episodes), plain.meta_step(episodes)
            assert torch.equal(ours.query_logits, expected.query_logits)
        assert captured._captured is not None
        torch.testing.assert_close(captured.state_dict(), plain.state_dict(), rtol=0, atol=0)


def check_predictions(ranks: Ranks) -> None:
    """A batch a rank in turn, some without any: one process's answers to the bit."""
    config = config_of(**SMALL)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5 * 8, 16, 16, 3), generator=g, dtype=torch.uint8)
    pool = ImagePool(images, torch.arange(5).repeat_interleave(8), tuple("abcde"), "val", "noise")
    sampler = EpisodeSampler(pool, config, torch.float64)
    learner = Learner(config, ranks)
    for tasks, batch in ((7, 2), (2, 4)):
        done: list[int] = []
        actual = predict_tasks([learner], sampler, tasks, tasks_per_batch=batch, report=done.append, ranks=ranks)
        expected = predict_tasks([learner], sampler, tasks, tasks_per_batch=batch)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        assert actual[1].dtype == expected[1].dtype
        assert done[-1] == tasks


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_compute_what_one_process_does(tmp_path, size: int) -> None:
    launched = Launched(tmp_path / "ranks", size, check_numbers)
    assert launched.wait() == [0] * size, launched.err()


def test_parts_of_a_meta_batch() -> None:
    for size in range(1, 6):
        for tasks in range(1, 12):
            parts = [Ranks(rank, size).shard(tasks) for rank in range(size)]
            assert [task for part in parts for task in range(tasks)[part]] == list(range(tasks))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert sizes[0] >= 1
    assert ALONE.shard(7) == slice(0, 7)


def test_another_number_of_tasks_than_this_ranks_is_told() -> None:
    learner = Learner(config_of(outer__meta_batch=3), Ranks(1, 2))
    with pytest.raises(ValueError, match=r"rank 1 of 2's part .*\(outer.meta_batch = 3\), 1 tasks, got 3"):
        learner.meta_step(random_episodes(learner.config, 3))


def test_devices_of_ranks(monkeypatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda = torch.device("cuda")
    assert Ranks(3, 4, local_rank=1, local_size=2).place(cuda) == torch.device("cuda:1")
    assert chosen == [1]
    assert Ranks(1, 2, 1, 2).place(torch.device("cpu")) == torch.device("cpu")
    assert ALONE.place(cuda) == cuda
    with pytest.raises(
        InputError, match="3 ranks on this machine need as many CUDA devices, torch sees 2: use --nproc-"
    ):
        Ranks(0, 3, 0, 3).place(cuda)
    with pytest.raises(InputError, match=r"'run.device' \(=cuda:1\) names one device for 2 ranks: use cuda"):
        Ranks(0, 2, 0, 2).place(torch.device("cuda:1"))


# the command


@pytest.mark.slow
def test_a_run_on_three_ranks_is_the_run_of_one(finished, images, tmp_path) -> None:
    launched = Launched(tmp_path / "ranks", 3, train, "--compile", "--out", tmp_path / "run", *words(images))
    assert launched.wait() == [0, 0, 0], launched.err()
    assert_same_run(tmp_path / "run", finished)
    assert "cxgrad on cpu, float64, 3 ranks, from iteration 0" in launched.out(0)
    assert launched.out(1) == launched.out(2) == ""
    lines = launched.err().splitlines()
    assert sum("meta-step compiled in " in line for line in lines) == 1  # rank 0's
    assert all(line.startswith("cxgrad_fast: ") for line in lines), lines


def test_evaluation_on_ranks_prints_what_one_process_does(finished, tmp_path, capsys) -> None:
    words = [str(finished), "--json", "--tasks", "7"]
    launched = Launched(tmp_path / "ranks", 2, run_command, evaluate, words)
    assert run_command(evaluate, words) == 0
    assert launched.wait() == [0, 0], launched.err()
    assert launched.out(0) == capsys.readouterr().out
    assert launched.out(1) + launched.err() == ""


def train_without_images(*arguments: object) -> int:
    """They are on the first rank's machine only."""
    if int(os.environ["RANK"]):

        def open_pool(*arguments: object) -> None:
            raise InputError("no images here")

        train_module.open_pool = open_pool
    return train(*arguments)


def test_bad_input_is_told_once(finished, images, tmp_path) -> None:
    cases = [
        (train, ("--out", finished, *words(images)), "holds a run already: continue it with --resume"),
        (
            train,
            ("--out", tmp_path / "run", *words(images, outer__meta_batch=0)),
            "'outer.meta_batch' must be at least",
        ),
        (train, ("--outt", tmp_path / "run"), "unknown option '--outt'"),
        (train_without_images, ("--out", tmp_path / "run", *words(images)), "no images here"),
    ]
    launched = [
        Launched(tmp_path / str(index), 2, target, *arguments) for index, (target, arguments, _) in enumerate(cases)
    ]
    for ranks, (_, _, told) in zip(launched, cases, strict=True):
        assert ranks.wait() == [2, 2], ranks.err()
        (line,) = ranks.err().splitlines()
        assert line.startswith("error: ")
        assert told in line
        assert ranks.out(0) + ranks.out(1) == ""
    assert not (tmp_path / "run").exists()


def train_with_a_bad_task(*arguments: object) -> int:
    """The third rank's task of the second step is not a number."""
    sample = EpisodeSampler.sample

    def spoilt(sampler, start, count):
        episodes = sample(sampler, start, count)
        if sampler.pool.split == "train" and start <= 5 < start + count:
            episodes.query_x[5 - start] = float("nan")
        return episodes

    EpisodeSampler.sample = spoilt
    return train(*arguments)


@pytest.mark.slow
def test_a_bad_task_of_one_rank_stops_all(images, tmp_path) -> None:
    run = tmp_path / "run"
    changes = words(images, outer__meta_batch=3, run__checkpoint_every=1)
    launched = Launched(tmp_path / "ranks", 3, train_with_a_bad_task, "--out", run, *changes)
    assert launched.wait() == [3, 3, 3], launched.err()
    (line,) = launched.err().splitlines()
    assert "is not finite: iteration 2, tasks 3 to 5; the weights before it and its episodes are in" in line
    assert len(read_checkpoint(run / "nonfinite-2.pt").episode["query_y"]) == 3
