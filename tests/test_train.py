import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import train, words

from cxgrad_fast import train as train_module
from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.episodes import Episodes
from cxgrad_fast.evaluate import predict_tasks
from cxgrad_fast.learner import Learner, NonFiniteLossError
from cxgrad_fast.runs import Run, load
from cxgrad_fast.train import Interrupted, Signals

pytest_plugins = ("tiny_runs_fixtures",)

FOREVER = 1_000_000


def same_state(one, other) -> None:
    """Two checkpoints hold the same run to the bit: weights, statistics, Adam, best models, RNG, position."""
    one, other = read_checkpoint(one), read_checkpoint(other)
    assert (one.iteration, one.validated, one.best) == (other.iteration, other.validated, other.best)
    torch.testing.assert_close(
        [one.state, dict(one.rng)], [other.state, dict(other.rng)], rtol=0, atol=0, equal_nan=True
    )


def same_run(one, other) -> None:
    same_state(one / "latest.pt", other / "latest.pt")
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    best = sorted(path.name for path in one.glob("best-*.pt"))
    assert best == sorted(path.name for path in other.glob("best-*.pt"))
    for name in best:
        same_state(one / name, other / name)
    assert (one / "result.json").read_bytes() == (other / "result.json").read_bytes()


def start_child(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cxgrad_fast.train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_rows(child: subprocess.Popen[str], folder, rows: int) -> None:
    """Until metrics.csv has that many rows of the training split."""
    metrics, deadline = folder / "metrics.csv", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count(",train,") < rows:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "the child writes no metrics"
        time.sleep(0.005)


# a whole run


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(images, finished, tmp_path, capsys) -> None:
    assert train("--compile", "--out", tmp_path / "compiled", *words(images)) == 0
    assert "meta-step compiled in " in capsys.readouterr().err
    same_run(tmp_path / "compiled", finished)


def test_a_run_leaves_everything_in_its_folder(finished, images) -> None:
    names = {path.name for path in finished.iterdir()}
    best = read_checkpoint(finished / "latest.pt").best
    assert len(best) == 2
    assert names == {
        "config.toml", "source.txt", "metrics.csv", "curves.png", "tensorboard", "latest.pt", "result.json",
        best[0].file, best[1].file,
    }  # fmt: skip
    lines = (finished / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [
        *(["1", "train"], ["2", "train"], ["3", "train"], ["4", "train"], ["4", "val"], ["5", "train"]),
        *(["6", "train"], ["7", "train"], ["8", "train"], ["8", "val"], ["9", "train"], ["9", "val"]),
    ]
    result = json.loads((finished / "result.json").read_text())
    assert result["models"] == [model.file for model in best]
    assert result["test"]["tasks"] == 6
    assert 0 <= result["test"]["accuracy"] <= 1


def test_the_rows_of_metrics_are_what_the_learner_says(finished, images) -> None:
    saved = read_checkpoint(finished / "latest.pt")
    learner = Learner(saved.config)
    sampler = train_module.EpisodeSampler(train_module.open_pool(saved.config, "train"), saved.config, learner.dtype)
    out = learner.meta_step(sampler.sample(0, 2))
    out = learner.meta_step(sampler.sample(2, 2))
    row = (finished / "metrics.csv").read_text().splitlines()[2].split(",")
    assert row[:2] == ["2", "train"]
    support = out.support_losses.detach().mean(0)
    numbers = [out.loss.item(), out.accuracy.item(), support[0].item(), support[-1].item()]
    assert [float(cell) for cell in row[2:] if cell] == numbers


@pytest.mark.slow
def test_two_runs_with_one_seed_are_the_same_to_the_byte_and_another_seed_is_not(finished, images, tmp_path) -> None:
    assert train("--out", tmp_path / "again", *words(images)) == 0
    same_run(finished, tmp_path / "again")
    assert train("--out", tmp_path / "other", *words(images, run__seed=1)) == 0
    assert (finished / "metrics.csv").read_bytes() != (tmp_path / "other" / "metrics.csv").read_bytes()


def test_both_intervals_and_the_cross_domain_set_are_printed(images, tmp_path, capsys) -> None:
    changes = words(images, data__cross_domain="digits", outer__iterations=1)
    assert train("--out", tmp_path / "run", *changes) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for part, source in (("test", f"folder {images}"), ("cross-domain", "digits")):
        told = out.split(f"{part} on {source}\n")[1].splitlines()
        accuracy, tasks, binomial = (
            100 * result[part][name] for name in ("accuracy", "tasks_interval", "images_interval")
        )
        assert told[0].split() == ["accuracy", f"{accuracy:.2f}", "%"]
        assert told[1].split()[:5] == ["95", "%", "interval", "over", "tasks"]
        assert f"± {tasks:.2f} %   (6 tasks)" in told[1]
        assert f"binomial interval over images  ± {binomial:.2f} %   (54 images; the released program's)" in told[2]
    assert "an answer depends on the other queries of its task (transductive)" in out


def test_maml_trains_too(images, tmp_path) -> None:
    changes = words(images, inner__algorithm="maml", outer__iterations=2, inner__steps=0)
    changes = [word for word in changes if not word.startswith("--inner.context_dim")]  # MAML has none
    assert train("--out", tmp_path / "run", *changes) == 0
    row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1]
    assert row.endswith(",,,")  # no steps, no support losses


def test_the_default_folder_is_named_after_preset_and_time(images, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(*words(images, outer__iterations=1)) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("glyphs-5w1s-2")


# nothing is lost


@pytest.mark.slow
def test_a_killed_and_a_stopped_run_end_as_one_that_was_not(images, tmp_path) -> None:
    run = tmp_path / "run"
    child = start_child("--out", run, *words(images, outer__iterations=FOREVER))
    wait_for_rows(child, run, 5 + os.getpid() % 11)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.communicate()
    killed_at = read_checkpoint(run / "latest.pt").iteration
    rows = (run / "metrics.csv").read_text().count(",train,")
    assert 3 <= killed_at <= rows

    child = start_child("--resume", run)
    wait_for_rows(child, run, rows + 5)
    child.terminate()
    out, err = child.communicate()
    assert child.returncode == 128 + signal.SIGTERM, err
    stopped_at = read_checkpoint(run / "latest.pt").iteration
    assert f"SIGTERM: saved after iteration {stopped_at}; go on with: python -m cxgrad_fast.train --resume {run}" in out
    assert f"from iteration {killed_at}" in out
    assert stopped_at >= rows + 5

    iterations = stopped_at + 6
    assert train("--resume", run, f"--outer.iterations={iterations}") == 0
    assert train("--out", tmp_path / "straight", *words(images, outer__iterations=iterations)) == 0
    same_run(run, tmp_path / "straight")


def test_checkpoints_come_at_their_interval_at_validations_and_at_the_end(images, tmp_path, monkeypatch) -> None:
    saved = []
    save = Run.save

    def record(run, checkpoint):
        saved.append((checkpoint.iteration, checkpoint.validated))
        save(run, checkpoint)

    monkeypatch.setattr(Run, "save", record)
    changes = words(images, outer__iterations=10, outer__validate_every=4, run__checkpoint_every=3)
    assert train("--out", tmp_path / "run", *changes) == 0
    assert saved == [(3, 0), (4, 4), (6, 4), (8, 8), (9, 8), (10, 10)]


def test_the_best_models_are_kept_and_of_equals_the_earlier(images, tmp_path, monkeypatch) -> None:
    labels = torch.zeros(1, 10, dtype=torch.int64)
    right = iter([3, 5, 3, 7, 5, 5])  # of ten, at each validation

    def answers(learners, *args, **options):
        wrong = torch.arange(10) >= (next(right) if len(learners) == 1 else 10)
        return torch.nn.functional.one_hot(wrong[None].long(), 3).double(), labels

    monkeypatch.setattr(train_module, "predict_tasks", answers)
    changes = words(images, outer__iterations=6, outer__validate_every=1, evaluation__ensemble=3)
    assert train("--out", tmp_path / "run", *changes) == 0
    best = read_checkpoint(tmp_path / "run" / "latest.pt").best
    assert best == ((4, 0.7), (2, 0.5), (5, 0.5))
    assert {path.name for path in tmp_path.glob("run/best-*.pt")} == {"best-4.pt", "best-2.pt", "best-5.pt"}
    assert [read_checkpoint(tmp_path / "run" / model.file).iteration for model in best] == [4, 2, 5]


@pytest.mark.slow
def test_a_signal_during_validation_leaves_the_validation_for_later(finished, images, tmp_path, monkeypatch) -> None:
    seen = []

    def stopping(*args, **options):
        seen.append(len(seen))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_tasks(*args, **options)

    monkeypatch.setattr(train_module, "predict_tasks", stopping)
    assert train("--out", tmp_path / "run", *words(images)) == 128 + signal.SIGTERM
    saved = read_checkpoint(tmp_path / "run" / "latest.pt")
    assert (saved.iteration, saved.validated, len(saved.best)) == (8, 4, 1)
    assert (tmp_path / "run" / "curves.png").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    torch.manual_seed(99)  # another process would be in another state
    assert train("--resume", tmp_path / "run") == 0
    same_run(finished, tmp_path / "run")


def test_a_signal_during_the_test_exits_and_the_test_is_repeated(finished, images, tmp_path, monkeypatch) -> None:
    def stopping(learners, *args, **options):
        if len(learners) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return predict_tasks(learners, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "predict_tasks", stopping)
        assert train("--out", tmp_path / "run", *words(images)) == 128 + signal.SIGINT
    assert train("--resume", tmp_path / "run") == 0
    same_run(finished, tmp_path / "run")


def test_the_first_sigint_waits_and_the_second_would_kill() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Signals() as signals:
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat this one: it goes on waiting
        with pytest.raises(Interrupted) as caught:
            signals.check()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_resuming_a_finished_run_repeats_its_test(finished, copy, capsys) -> None:
    (copy / "result.json").unlink()
    assert train("--resume", copy) == 0
    same_run(finished, copy)
    assert "from iteration 9" in capsys.readouterr().out


def test_a_deleted_best_model_is_told_and_the_others_are_tested(finished, copy, capsys) -> None:
    first, second = (best.file for best in read_checkpoint(finished / "latest.pt").best)
    note = "note: '{}', one of the best models, was deleted: going on without it\n"
    (copy / first).unlink()
    capsys.readouterr()
    assert train("--resume", copy) == 0
    out, err = capsys.readouterr()
    assert err == note.format(copy / first)
    assert f"ensemble of 1: {second}\n" in out
    assert json.loads((copy / "result.json").read_text())["models"] == [second]

    (copy / second).unlink()  # and the test is of the latest, which the run ends with
    assert train("--resume", copy) == 0
    out, err = capsys.readouterr()
    assert err == note.format(copy / first) + note.format(copy / second)
    assert "ensemble of 1: latest.pt\n" in out


def test_a_best_model_that_is_deleted_while_the_run_goes_on_is_told(copy, capsys, monkeypatch) -> None:
    def deleting(*arguments, **options):
        for file in copy.glob("best-*.pt"):
            file.unlink()
        return predict_tasks(*arguments, **options)

    best = read_checkpoint(copy / "latest.pt").best
    monkeypatch.setattr(train_module, "predict_tasks", deleting)
    capsys.readouterr()
    assert train("--resume", copy, "--outer.iterations=10") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    latest = read_checkpoint(copy / "latest.pt")
    gone = [model for model in latest.best if model in best]
    assert notes == [
        f"note: '{copy / model.file}', one of the best models, was deleted: going on without it" for model in gone
    ]
    assert gone


def test_a_damaged_best_model_is_told_with_what_to_do(copy, capsys) -> None:
    first, second = (best.file for best in read_checkpoint(copy / "latest.pt").best)
    (copy / first).write_bytes((copy / first).read_bytes()[:-100])
    capsys.readouterr()
    assert train("--resume", copy) == 2
    err = capsys.readouterr().err
    assert str(copy / first) in err
    assert err.endswith("(if it cannot be brought back, delete it: the others are then used)\n")
    (copy / first).unlink()
    assert train("--resume", copy) == 0
    assert f"ensemble of 1: {second}\n" in capsys.readouterr().out


def test_a_deleted_model_makes_room_for_another(copy, monkeypatch) -> None:
    first, second = read_checkpoint(copy / "latest.pt").best
    (copy / first.file).unlink()

    def all_wrong(learners, sampler, *arguments, **options):
        _, labels = predict_tasks(learners, sampler, *arguments, **options)
        return torch.nn.functional.one_hot((labels + 1) % 3, 3).double(), labels

    monkeypatch.setattr(train_module, "predict_tasks", all_wrong)
    assert train("--resume", copy, "--outer.iterations=10") == 0
    assert read_checkpoint(copy / "latest.pt").best == (second, (10, 0.0))


@pytest.mark.slow
def test_a_finished_run_can_go_on(finished, copy, images, tmp_path) -> None:
    assert train("--resume", copy, "--outer.iterations", 11, "--run.checkpoint_every=1") == 0
    assert train("--out", tmp_path / "straight", *words(images, outer__iterations=11)) == 0
    saved, straight = (read_checkpoint(folder / "latest.pt") for folder in (copy, tmp_path / "straight"))
    torch.testing.assert_close(saved.state, straight.state, rtol=0, atol=0)
    assert "iterations = 11" in (copy / "config.toml").read_text()


def test_the_learner_of_a_run_adapts(finished, images) -> None:
    learner = load(finished)
    adapted = learner.adapt(torch.rand(3, 3, 16, 16), torch.arange(3))
    assert adapted(torch.rand(4, 3, 16, 16)).shape == (4, 3)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stands(finished, copy) -> None:
    limit = (copy / "latest.pt").stat().st_size - 1

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "cxgrad_fast.train", "--resume", str(copy), "--outer.iterations=30"]
    done = subprocess.run(command, preexec_fn=small_disk, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write or read '{copy / 'latest.pt'}': File too large\n"
    same_state(finished / "latest.pt", copy / "latest.pt")
    assert not list(copy.glob(".*"))


# a loss that is not finite


@pytest.mark.parametrize(("setting", "step"), [("inner__learning_rate", 1), ("outer__learning_rate", 2)])
def test_a_loss_that_is_not_finite_stops_and_can_be_repeated(images, tmp_path, capsys, setting: str, step: int) -> None:
    folder = tmp_path / "run"
    assert train("--out", folder, *words(images, **{setting: 1e300}, run__checkpoint_every=1)) == 3
    first = 2 * (step - 1)
    file = folder / f"nonfinite-{step}.pt"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"not finite: iteration {step}, tasks {first} to {first + 1};" in line
    assert f"'{file}', latest.pt is as it was" in line
    assert read_checkpoint(folder / "latest.pt").iteration == step - 1
    same_state(folder / "latest.pt", file)

    saved = read_checkpoint(file)
    assert saved.episode.pop("tasks") == [first, first + 1]
    with pytest.raises(NonFiniteLossError):
        saved.learner(file, optimizer=True).meta_step(Episodes(**saved.episode))
