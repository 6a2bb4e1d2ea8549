"""Weights and answers that are not finite end a command in words: never are they kept as best, nor reported."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Launched
from tiny_runs import train, words

from cxgrad_fast import Episodes, Learner, load
from cxgrad_fast.checkpoints import read_checkpoint, write_checkpoint
from cxgrad_fast.cli import run_command
from cxgrad_fast.evaluate import main as evaluate
from cxgrad_fast.learner import NonFiniteError
from cxgrad_fast.pipeline import StepNumbers, Steps

pytest_plugins = ("tiny_runs_fixtures",)


def told(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("cxgrad_fast: ")]
    return line


def spoil(file: Path, value: float = math.nan) -> None:
    """One value of one parameter in a checkpoint."""
    saved = read_checkpoint(file)
    saved.state["parameters"]["head.weight"][0, 1] = value
    write_checkpoint(file, saved)


def after_steps(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Learner], None]) -> None:
    """Call ``act`` after each meta-step of a run, with its number, counted from 1, and the learner."""
    finish, numbers = Steps.finish, itertools.count(1)

    def finish_and_act(steps: Steps) -> StepNumbers:
        found = finish(steps)
        act(next(numbers), steps._learner)
        return found

    monkeypatch.setattr(Steps, "finish", finish_and_act)


def spoil_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the update of one meta-step end in a weight that is not finite."""

    def act(number: int, learner: Learner) -> None:
        if number == step:
            with torch.no_grad():
                learner.meta_parameters["head.bias"][1] = math.inf

    after_steps(monkeypatch, act)


# training


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--compile"]])
def test_a_first_step_that_is_too_long_is_not_reported_as_an_accuracy(images, tmp_path, capsys, option) -> None:
    """The weights are finite, 1e300, and the answers are not."""
    run = tmp_path / "run"
    assert train("--out", run, *option, *words(images, outer__learning_rate=1e300, outer__iterations=1)) == 3
    assert told(capsys) == (
        f"error: the logits of task 0 of folder {images}, split 'val', are not finite (after iteration 1); "
        "latest.pt is as it was: start a new run with a lower outer.learning_rate"
    )
    assert read_checkpoint(run / "latest.pt").iteration == 0
    assert not list(run.glob("best-*.pt"))
    assert not (run / "result.json").exists()


def train_too_long(*arguments: object) -> int:
    return train(*arguments, "--outer.learning_rate=1e300", "--outer.iterations=1")


@pytest.mark.slow
def test_ranks_find_the_same_and_one_tells(images, tmp_path) -> None:
    launched = Launched(tmp_path / "ranks", 3, train_too_long, "--out", tmp_path / "run", *words(images))
    assert launched.wait() == [3, 3, 3], launched.err()
    (line,) = launched.err().splitlines()
    assert "split 'val', are not finite (after iteration 1); latest.pt is as it was" in line
    assert read_checkpoint(tmp_path / "run" / "latest.pt").iteration == 0


@pytest.mark.parametrize("step", [3, 4, 9])
def test_weights_are_looked_at_before_they_are_saved_validated_or_tested(
    images, tmp_path, capsys, monkeypatch, step: int
) -> None:
    """After the third step a checkpoint is due, after the fourth a validation, and the ninth is the last."""
    spoil_step(monkeypatch, step)
    run = tmp_path / "run"
    assert train("--out", run, *words(images)) == 3
    line = told(capsys)
    assert line.startswith("error: parameter 'head.bias' of this ")
    assert f"is not finite: the model has diverged (after iteration {step}); latest.pt is as it was" in line
    latest = read_checkpoint(run / "latest.pt")
    assert latest.iteration == {3: 0, 4: 3, 9: 8}[step]
    for file in ["latest.pt", *(best.file for best in latest.best)]:
        for tensor in read_checkpoint(run / file).state["parameters"].values():
            assert tensor.isfinite().all()


def test_a_step_from_weights_that_are_not_finite_names_the_weights(images, tmp_path, capsys, monkeypatch) -> None:
    spoil_step(monkeypatch, 1)
    assert train("--out", tmp_path / "run", *words(images)) == 3
    assert "parameter 'head.bias' of this run is not finite: the model has diverged (after iteration 1)" in told(capsys)
    assert not list(tmp_path.glob("run/nonfinite-*.pt"))


def test_a_signal_does_not_save_them(images, tmp_path, capsys, monkeypatch) -> None:
    spoil_step(monkeypatch, 1)
    after_steps(monkeypatch, lambda number, learner: os.kill(os.getpid(), signal.SIGTERM))
    run = tmp_path / "run"
    assert train("--out", run, *words(images)) == 128 + signal.SIGTERM
    assert f"SIGTERM: the run stands at {run / 'latest.pt'} (iteration 0); go on with: " in capsys.readouterr().out
    assert read_checkpoint(run / "latest.pt").iteration == 0


def test_a_run_is_not_resumed_from_them(copy, capsys) -> None:
    spoil(copy / "latest.pt", math.inf)
    before = (copy / "metrics.csv").read_bytes()
    assert train("--resume", copy, "--outer.iterations=10") == 3
    assert told(capsys) == (
        f"error: parameter 'head.weight' of '{copy / 'latest.pt'}' is not finite: the model has diverged"
    )
    assert (copy / "metrics.csv").read_bytes() == before


# use


def evaluate_on_a_rank(*arguments: object) -> int:
    return run_command(evaluate, [str(argument) for argument in arguments])


def test_evaluate_names_the_model(copy, tmp_path, capsys) -> None:
    best = read_checkpoint(copy / "latest.pt").best[1].file
    spoil(copy / best)
    line = f"error: parameter 'head.weight' of '{best}' is not finite: the model has diverged\n"
    assert evaluate_on_a_rank(copy) == 3
    assert capsys.readouterr().err == line
    launched = Launched(tmp_path / "ranks", 2, evaluate_on_a_rank, copy)
    assert launched.wait() == [3, 3], launched.err()
    assert launched.err() == line


def test_evaluate_names_the_task_that_a_finite_model_cannot_answer(copy, images, capsys) -> None:
    best = read_checkpoint(copy / "latest.pt").best[0].file
    spoil(copy / best, 1e308)
    assert evaluate_on_a_rank(copy / best) == 3
    out, err = capsys.readouterr()
    assert err == f"error: the logits of task 0 of folder {images}, split 'test', are not finite\n"
    assert "accuracy" not in out


def test_the_test_at_the_end_names_the_model(copy, capsys) -> None:
    best = read_checkpoint(copy / "latest.pt").best[0].file
    spoil(copy / best)
    (copy / "result.json").unlink()
    assert train("--resume", copy) == 3
    assert f"error: parameter 'head.weight' of '{best}' is not finite: the model has diverged" in told(capsys)
    assert not (copy / "result.json").exists()


def test_adapt_and_predict_refuse_them(copy) -> None:
    best = read_checkpoint(copy / "latest.pt").best[0].file
    spoil(copy / best)
    learner = load(copy)
    message = "parameter 'head.weight' of this learner is not finite"
    x, y = torch.rand(3, 3, 16, 16), torch.arange(3)
    with pytest.raises(NonFiniteError, match=message):
        learner.adapt(x, y)
    with pytest.raises(NonFiniteError, match=message):
        learner.predict(Episodes(x[None], y[None], x[None], y[None]))
