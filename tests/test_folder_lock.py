"""Of several processes that would make one run, one does; who comes second takes nothing of it away."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import config_of
from tiny_runs import train, words

from cxgrad_fast import InputError, Learner, checkpoints, runs
from cxgrad_fast import train as train_module
from cxgrad_fast.checkpoints import Checkpoint, read_checkpoint
from cxgrad_fast.folder_lock import FolderLock
from cxgrad_fast.runs import Run, check_writable

pytest_plugins = ("tiny_runs_fixtures",)

FILES = {"config.toml", "latest.pt", "metrics.csv", "source.txt", "tensorboard"}


@pytest.fixture(scope="module")
def start() -> Checkpoint:
    config = config_of(model__image_size=16)
    rng = {"cpu": torch.get_rng_state()}
    return Checkpoint(config=config, state=Learner(config).state_dict(), rng=rng, source="a commit")


def meanwhile(monkeypatch: pytest.MonkeyPatch, module: object, name: str, act: Callable[[], None]) -> list[int]:
    """Before the next call of a function of a module, another process acts; how often it has."""
    done: list[int] = []
    function = getattr(module, name)

    def interrupted(*arguments: object) -> object:
        if not done:
            done.append(1)
            act()
        return function(*arguments)

    monkeypatch.setattr(module, name, interrupted)
    return done


@pytest.mark.parametrize(("module", "name"), [(runs, "write_checkpoint"), (os, "replace"), (os, "fsync")])
def test_a_run_that_another_process_is_making_is_left_alone(start, tmp_path, monkeypatch, module, name) -> None:
    folder = tmp_path / "run"

    def make_too() -> None:
        with pytest.raises(InputError, match="is being trained by another process: wait for its end, or take another"):
            Run.create(folder, start)

    done = meanwhile(monkeypatch, module, name, make_too)
    with Run.create(folder, start):
        assert done
    assert set(os.listdir(folder)) == FILES
    assert read_checkpoint(folder / "latest.pt").iteration == 0


def test_a_folder_that_another_process_filled_before_the_lock_is_left_alone(start, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"

    def make() -> None:
        with Run.create(folder, start) as run:
            run.log(1, "train", loss=0.5)

    done = meanwhile(monkeypatch, fcntl, "flock", make)
    with pytest.raises(InputError, match="holds a run already: continue it with --resume"):
        Run.create(folder, start)
    assert done
    assert set(os.listdir(folder)) == FILES
    assert (folder / "metrics.csv").read_text().count("train") == 1


@pytest.mark.parametrize("function", ["flock", "open"])
def test_a_folder_that_another_process_removes_is_made_again(start, tmp_path, monkeypatch, function: str) -> None:
    folder = tmp_path / "deep" / "run"
    done = meanwhile(monkeypatch, fcntl if function == "flock" else os, function, lambda: folder.rmdir())
    with Run.create(folder, start):
        assert done
        with pytest.raises(InputError, match="is being trained by another process"):
            FolderLock(folder)
    assert set(os.listdir(folder)) == FILES


def test_a_lock_on_a_removed_folder_is_none(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    meanwhile(monkeypatch, fcntl, "flock", lambda: folder.rmdir())
    with pytest.raises(FileNotFoundError):
        FolderLock(folder)


@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_run_that_cannot_be_made_takes_nothing_of_others_away(start, tmp_path, monkeypatch, failing: int) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    replace, calls = os.replace, []

    def refuse(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) >= failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        Run.create(tmp_path, start)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "tensorboard"]
    assert os.listdir(tmp_path / "tensorboard") == ["events"]
    calls.clear()
    with pytest.raises(OSError, match="No space left"):
        Run.create(tmp_path / "a" / "b", start)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "tensorboard"]  # nor is a there
    monkeypatch.setattr(checkpoints.os, "replace", replace)
    with Run.create(tmp_path / "a" / "b", start):  # the lock has gone too
        pass


def test_who_checks_a_folder_bears_that_another_process_opens_a_run_there(start, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, start):
        pass
    touch = Path.touch

    def touch_and_open(path: Path, **options: bool) -> None:
        touch(path, **options)
        monkeypatch.setattr(Path, "touch", touch)
        with Run(folder, start):  # which removes what a killed process left
            pass

    monkeypatch.setattr(Path, "touch", touch_and_open)
    check_writable(folder)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys, code: int) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    FolderLock(tmp_path).close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"note: '{tmp_path}' cannot be locked ({os.strerror(code)})")


def test_a_run_is_locked_before_it_is_read(copy, monkeypatch, capsys) -> None:
    def train_too() -> None:
        assert train("--resume", copy, "--outer.iterations", 10) == 2

    done = meanwhile(monkeypatch, train_module, "read_checkpoint", train_too)
    assert train("--resume", copy, "--outer.iterations", 10) == 0
    assert done
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "is being trained by another process" in line
    assert read_checkpoint(copy / "latest.pt").iteration == 10
    # whoever is refused gives the lock back
    assert train("--resume", copy, "--inner.steps", 9) == 2
    FolderLock(copy).close()


def test_two_commands_with_one_out(images, tmp_path, monkeypatch, capsys) -> None:
    arguments = ("--out", tmp_path / "run", *words(images, outer__iterations=1))

    def train_too() -> None:
        assert train(*arguments) == 2

    meanwhile(monkeypatch, runs, "write_checkpoint", train_too)
    assert train(*arguments) == 0
    assert capsys.readouterr().err.count("error: ") == 1
    assert (tmp_path / "run" / "result.json").exists()
