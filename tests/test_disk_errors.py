"""Whatever a run's file system answers: one line, exit code 2, and a checkpoint to go on from."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import train, words

from cxgrad_fast import Learner, runs
from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint
from cxgrad_fast.cli import run_command
from cxgrad_fast.config import preset
from cxgrad_fast.runs import Run, check_writable, latest_file

pytest_plugins = ("tiny_runs_fixtures",)

# what a path, or a descriptor of an open file, is handed to
CALLS = ("open", "replace", "fsync", "write", "unlink", "mkdir", "listdir", "scandir", "stat", "close")


class Disk:
    """Answers one of the calls that concern a folder with an error.

    Attributes:
        seen: the calls so far, by name.
    """

    def __init__(self, folder: Path, code: int, fails_at: int = -1, names: tuple[str, ...] = CALLS) -> None:
        self._folder, self._code, self._fails_at, self._names = str(folder), code, fails_at, names
        self.seen: list[str] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self._names:
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            if "open" in self._names:
                opening = self._wrapped("open", io.open)
                patch.setattr(io, "open", opening)
                patch.setattr(builtins, "open", opening)
            yield

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            target = arguments[0] if arguments else "."
            if not self._concerns(target):
                return call(*arguments, **options)
            self.seen.append(name)
            if len(self.seen) - 1 != self._fails_at:
                return call(*arguments, **options)
            if name == "close":
                call(*arguments, **options)
            names = () if isinstance(target, int) else (str(target),)
            raise OSError(self._code, os.strerror(self._code), *names)

        return wrapped

    def _concerns(self, target: Any) -> bool:
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return False
        return os.fspath(target).startswith(self._folder)


CONFIG = preset(
    "glyphs-5w1s",
    {"model.filters": 2, "model.image_size": 16, "task.ways": 2, "inner.context_dim": 3, "run.device": "cpu"},
)
BEST = (Best(8, 0.5), Best(4, 0.25))


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch) -> None:
    """Nothing here depends on what stands after a power cut, nor on versions."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(runs, "_describe_source", lambda source: source)


@pytest.fixture
def saved() -> Checkpoint:
    state, rng = Learner(CONFIG).state_dict(), {"cpu": torch.get_rng_state()}
    return Checkpoint(config=CONFIG, state=state, iteration=9, validated=8, best=BEST, rng=rng)


def new_run(folder: Path, saved: Checkpoint) -> Path:
    with Run.create(folder, saved) as run:
        run.log(8, "val", loss=0.5, accuracy=0.5, interval=0.1)
        run.log(9, "train", loss=0.5, accuracy=0.5)
        for best in BEST:
            run.save_best(best, saved)
    return folder


def go_on(folder: Path, saved: Checkpoint) -> int:
    """What a resumed run does to its folder, without the training."""

    def main(argv: object) -> int:
        check_writable(folder)
        assert read_checkpoint(latest_file(folder)).iteration == 9
        with Run(folder, saved) as run:
            run.log(10, "train", loss=0.5, accuracy=0.5)
            run.log(10, "val", loss=0.5, accuracy=0.5, interval=0.1)
            best = (Best(10, 1.0), BEST[0])
            after = dataclasses.replace(saved, iteration=10, validated=10, best=best)
            run.save_best(best[0], after)
            run.save(after)
        return 0

    return run_command(main)


@pytest.mark.parametrize(
    "code", [errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.ETIMEDOUT, errno.ENFILE, errno.ENOTCONN, errno.EIO]
)
def test_a_checkpoint_that_cannot_be_written_is_one_line(saved, tmp_path, capsys, code: int) -> None:
    run = new_run(tmp_path / "run", saved)
    before = (run / "latest.pt").read_bytes()
    with Disk(run / ".latest.pt", code, 0).installed():
        assert go_on(run, saved) == 2
    assert capsys.readouterr().err == f"error: cannot write or read '{run / 'latest.pt'}': {os.strerror(code)}\n"
    assert (run / "latest.pt").read_bytes() == before
    assert not list(run.glob(".*"))


def test_any_call_may_fail(saved, tmp_path, capsys) -> None:
    """Each call to the file system in turn."""
    disk = Disk(tmp_path / "dry", errno.ESTALE)
    start = new_run(tmp_path / "start", saved)
    rows = (start / "metrics.csv").read_bytes()
    shutil.copytree(start, tmp_path / "dry")
    with disk.installed():
        assert go_on(tmp_path / "dry", saved) == 0
    told = []
    for index in range(len(disk.seen)):
        run = shutil.copytree(start, tmp_path / f"run{index}")
        capsys.readouterr()
        with Disk(run, errno.ESTALE, index).installed():
            code = go_on(run, saved)
        err = capsys.readouterr().err
        told.append((disk.seen[index], code, err))
        assert code in (0, 2), told[-1]
        if code == 2:
            (line,) = err.splitlines()
            assert line.startswith("error: "), told[-1]
            assert os.strerror(errno.ESTALE) in line, told[-1]
        else:
            assert err == "", told[-1]
        latest = read_checkpoint(run / "latest.pt")
        assert latest.iteration in (9, 10), told[-1]
        assert all((run / best.file).exists() for best in latest.best), told[-1]
        with Run(run, saved):  # nothing holds it any more
            assert (run / "metrics.csv").read_bytes() == rows, told[-1]
    assert [name for name, code, _ in told if code == 2].count("fsync") > 8


def test_a_new_run_that_cannot_be_written_leaves_no_folder(images, tmp_path, capsys) -> None:
    with Disk(tmp_path / "run", errno.ENOTCONN, 0, ("fsync",)).installed():
        assert train("--out", tmp_path / "run", *words(images)) == 2
    assert capsys.readouterr().err.startswith("error: cannot write or read '")
    assert os.listdir(tmp_path) == []


def test_a_lock_that_fails_otherwise_is_one_line(saved, tmp_path, capsys, monkeypatch) -> None:
    run = new_run(tmp_path / "run", saved)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    assert go_on(run, saved) == 2
    assert capsys.readouterr().err == f"error: cannot write or read '{run}': {os.strerror(errno.EIO)}\n"
    assert len(os.listdir("/proc/self/fd")) == before
