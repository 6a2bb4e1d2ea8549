"""A rank that dies, hangs or gets a signal: one line tells it, and the last finished step is saved."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import Launched, polled
from same_runs import assert_same_run
from tiny_runs import train, words

from cxgrad_fast import EpisodeSampler, checkpoints
from cxgrad_fast import signals as signals_module
from cxgrad_fast import train as train_module
from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.engine import RankLostError, join_ranks
from cxgrad_fast.engine.notes import Notes

pytest_plugins = ("tiny_runs_fixtures",)

FOREVER = 1_000_000
STEPS = 3  # finished before something happens in the next


def at_step(rank: int, act: Callable[[], object]) -> None:
    """In a rank of a run: ``act`` in place of the training tasks of step ``STEPS + 1``, if this is that rank."""
    if int(os.environ["RANK"]) != rank:
        return
    sample = EpisodeSampler.sample

    def acting(sampler: EpisodeSampler, start: int, count: int) -> object:
        if sampler.pool.split == "train" and start >= 3 * STEPS:
            act()
        return sample(sampler, start, count)

    EpisodeSampler.sample = acting


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever() -> None:
    threading.Event().wait()


def wait_for(marker: Path, launched: Launched) -> None:
    """Return once a rank has made the file."""
    for _ in polled():
        assert all(process.is_alive() for process in launched.ranks), launched.err()
        if marker.exists():
            return


def changes(images: Path, **others: object) -> list[str]:
    """Three tasks a step, and no checkpoint but the first before a run's end."""
    settings = {"outer__iterations": FOREVER, "outer__meta_batch": 3, "outer__validate_every": FOREVER}
    return words(images, **settings | {"run__checkpoint_every": FOREVER} | others)


def assert_goes_on(run: Path, images: Path, folder: Path) -> None:
    """What was saved is a run as any other."""
    assert train("--resume", run, f"--outer.iterations={STEPS + 2}") == 0
    assert train("--out", folder, *changes(images, outer__iterations=STEPS + 2)) == 0
    assert_same_run(run, folder)


# under torchrun


def find_rank(launcher: int, rank: int) -> int:
    """The process that torchrun runs as this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError("no such rank")


@pytest.mark.slow
def test_a_killed_rank_is_told_and_another_number_of_ranks_goes_on(images, tmp_path) -> None:
    run, lost = tmp_path / "run", os.getpid() % 3
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    changes = words(images, outer__iterations=FOREVER, outer__meta_batch=4, outer__validate_every=5)
    command += ["-m", "cxgrad_fast.train", "--out", str(run), *changes]
    torchrun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        for _ in polled():
            assert torchrun.poll() is None, torchrun.communicate()
            if (run / "metrics.csv").exists() and (run / "metrics.csv").read_text().count(",train,") > 6:
                break
        os.kill(find_rank(torchrun.pid, lost), signal.SIGKILL)
        _, err = torchrun.communicate(timeout=600)
    finally:
        torchrun.terminate()  # and its ranks; nothing if they have ended
        torchrun.wait()
    assert torchrun.returncode != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    saved = read_checkpoint(run / "latest.pt")
    assert line.startswith(f"error: rank {lost} of 3 was lost at iteration "), line
    assert f"; the run stands at {run}/latest.pt (iteration {saved.iteration}); go on with: torchrun --nproc-" in line
    if lost:
        assert saved.iteration > 6  # rank 0 saved what it had
        assert f"lost at iteration {saved.iteration + 1};" in line

    iterations = saved.iteration + 5
    launched = Launched(tmp_path / "ranks", 2, train, "--resume", run, f"--outer.iterations={iterations}")
    assert launched.wait() == [0, 0], launched.err()
    changes = words(images, outer__iterations=iterations, outer__meta_batch=4, outer__validate_every=5)
    assert train("--out", tmp_path / "straight", *changes) == 0
    assert_same_run(run, tmp_path / "straight")


# ranks that die


def train_beside_a_slow_rank(*arguments: object) -> int:
    """Rank 1 dies in the step in which rank 2 is busy for ever."""
    at_step(1, die)
    at_step(2, wait_for_ever)
    return train(*arguments)


@pytest.mark.slow
def test_a_slow_rank_is_not_told_as_lost_and_does_not_stay(images, tmp_path) -> None:
    run = tmp_path / "run"
    launched = Launched(tmp_path / "ranks", 3, train_beside_a_slow_rank, "--out", run, *changes(images))
    assert launched.wait() == [4, -signal.SIGKILL, 4], launched.err()
    (line,) = launched.err().splitlines()
    assert line.startswith(f"error: rank 1 of 3 was lost at iteration {STEPS + 1}; the run stands at {run}/latest.pt ")
    assert f"(iteration {STEPS}); go on with: torchrun --nproc-per-node=3 -m cxgrad_fast.train --resume" in line
    assert_goes_on(run, images, tmp_path / "straight")


def train_on_a_slow_disk(marker: Path, *arguments: object) -> int:
    """Rank 1 dies; while rank 0 saves it gets SIGTERM, as from torchrun, and the watch has all the time it needs."""
    signals_module.PATIENCE = 0.0
    at_step(1, die)
    at_step(0, lambda: slow_disk(marker))
    return train(*arguments)


def slow_disk(marker: Path) -> None:
    looked, answer, fsync = threading.Semaphore(0), Notes.answer, os.fsync

    def looking(notes: Notes) -> None:
        answer(notes)
        looked.release()

    def slow(descriptor: int) -> None:
        os.fsync, Notes.answer = fsync, looking
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3):  # the second look at the latest begins after the signal, and ends before the third
            looked.acquire()
        fsync(descriptor)
        marker.touch()

    os.fsync = slow


@pytest.mark.slow
def test_a_last_checkpoint_takes_its_time(images, tmp_path) -> None:
    run, marker = tmp_path / "run", tmp_path / "marker"
    launched = Launched(tmp_path / "ranks", 2, train_on_a_slow_disk, marker, "--out", run, *changes(images))
    assert launched.wait() == [4, -signal.SIGKILL], launched.err()
    assert marker.exists()
    assert read_checkpoint(run / "latest.pt").iteration == STEPS
    (line,) = launched.err().splitlines()
    assert line.startswith(f"error: rank 1 of 2 was lost at iteration {STEPS + 1}; the run stands at {run}/latest.pt ")
    assert f"(iteration {STEPS}); go on with: " in line
    assert not list(run.glob(".*"))


def train_without_the_first(*arguments: object) -> int:
    at_step(0, die)
    return train(*arguments)


@pytest.mark.slow
def test_where_rank_0_dies_one_of_the_others_tells_where_the_run_stands(images, tmp_path) -> None:
    run = tmp_path / "run"
    launched = Launched(
        tmp_path / "ranks", 3, train_without_the_first, "--out", run, *changes(images, run__checkpoint_every=2)
    )
    assert launched.wait() == [-signal.SIGKILL, 4, 4], launched.err()
    (line,) = launched.err().splitlines()
    assert line.startswith(f"error: rank 0 of 3 was lost at iteration {STEPS + 1}; the run stands at {run}/latest.pt ")
    assert "(iteration 2); go on with: " in line


def train_and_die(*arguments: object) -> int:
    """The second rank does while it opens its images."""
    if os.environ["RANK"] == "1":
        train_module.open_pool = lambda *arguments: die()
    return train(*arguments)


def train_and_die_late(*arguments: object) -> int:
    """The second rank does when rank 0 makes the folder."""
    if os.environ["RANK"] == "1":
        train_module.FollowedRun = lambda folder: die()
    return train(*arguments)


@pytest.mark.parametrize("target", [train_and_die, train_and_die_late])
def test_a_rank_that_dies_before_the_run_is_told_and_leaves_no_folder(images, tmp_path, target: object) -> None:
    launched = Launched(tmp_path / "ranks", 3, target, "--out", tmp_path / "run", *words(images))
    assert launched.wait() == [4, -signal.SIGKILL, 4]
    assert launched.err() == "error: rank 1 of 3 was lost, there is nothing to save: start again\n"
    assert not (tmp_path / "run").exists()


def fill_the_disk() -> None:
    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints.os.replace = full


def train_on_a_full_disk(*arguments: object) -> int:
    """From the first checkpoint after the start on."""
    at_step(0, fill_the_disk)
    return train(*arguments)


@pytest.mark.slow
def test_a_full_disk_of_rank_0_is_told_once(images, tmp_path) -> None:
    run = tmp_path / "run"
    launched = Launched(
        tmp_path / "ranks", 2, train_on_a_full_disk, "--out", run, *changes(images, run__checkpoint_every=STEPS + 1)
    )
    assert launched.wait() == [2, 2], launched.err()
    (line,) = launched.err().splitlines()
    assert line.startswith(f"error: cannot write or read '{run}/latest.pt': No space left on device")


def wait_in_vain() -> int:
    """The last rank hangs: the others find out, each by itself, which."""
    ranks = join_ranks(timeout=timedelta(seconds=1))
    notes = ranks.notes
    if ranks.rank == ranks.size - 1:
        notes._store.wait(["0 has gone", "1 has gone"], timedelta(seconds=60))
        return 0
    times = iter([0.0])
    # the patience ends when the other has answered
    notes._clock = lambda: next(times, 1000.0 if notes._has(f"lives/{1 - ranks.rank}") else 0.0)
    try:
        ranks.total([torch.ones(3)])
    except RankLostError:
        ranks.give_up()
        assert notes.lost() == [ranks.size - 1]
        notes._store.set(f"{ranks.rank} has gone", "")
        return 4
    return 0


def test_a_rank_that_hangs_counts_as_lost(tmp_path) -> None:
    launched = Launched(tmp_path / "ranks", 3, wait_in_vain)
    assert launched.wait() == [4, 4, 0], launched.err()


# signals


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_the_same_step(images, tmp_path) -> None:
    run = tmp_path / "run"
    changes = words(images, outer__iterations=FOREVER, outer__validate_every=3)
    launched = Launched(tmp_path / "ranks", 2, train, "--out", run, *changes)
    for _ in polled():
        assert launched.ranks[0].is_alive(), launched.err()
        if (run / "metrics.csv").exists() and (run / "metrics.csv").read_text().count(",train,") > 4:
            break
    os.kill(launched.ranks[1].pid, signal.SIGTERM)
    assert launched.wait() == [128 + signal.SIGTERM] * 2, launched.err()
    stopped_at = read_checkpoint(run / "latest.pt").iteration
    assert f"SIGTERM: saved after iteration {stopped_at}; go on with: torchrun --nproc-per-node=2 -m" in launched.out(0)
    assert launched.out(1) + launched.err() == ""
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith(f"{stopped_at},")


def train_long_steps(busy: int, markers: Path, *arguments: object, first: Callable[[], None] = lambda: None) -> int:
    """One rank is busy for ever in a step, the other waits for it; there is no patience with long steps.

    Each rank leaves a marker where the step begins.
    """
    signals_module.PATIENCE = 0.0
    rank = int(os.environ["RANK"])

    def begin() -> None:
        if rank == busy:
            first()
        (markers / str(rank)).touch()
        if rank == busy:
            wait_for_ever()

    at_step(rank, begin)
    return train(*arguments)


def interrupt_a_long_step(folder: Path, target: Callable[..., int], busy: int, *arguments: object) -> Launched:
    """Two ranks that both got SIGTERM, as from torchrun, in the step in which one is busy for ever."""
    markers = folder / "markers"
    markers.mkdir()
    launched = Launched(folder / "ranks", 2, target, busy, markers, *arguments)
    for rank in range(2):
        wait_for(markers / str(rank), launched)
    for process in launched.ranks:
        os.kill(process.pid, signal.SIGTERM)
    return launched


@pytest.mark.slow
@pytest.mark.parametrize("busy", [0, 1])
def test_a_signal_in_a_long_step_saves_the_step_before_it(images, tmp_path, busy: int) -> None:
    run = tmp_path / "run"
    launched = interrupt_a_long_step(tmp_path, train_long_steps, busy, "--out", run, *changes(images))
    assert launched.wait() == [128 + signal.SIGTERM] * 2, launched.err()
    assert launched.err() == ""
    told = f"SIGTERM: saved after iteration {STEPS}, without what was under way; go on with: torchrun --nproc-"
    assert told in launched.out(0)
    assert read_checkpoint(run / "latest.pt").iteration == STEPS
    assert_goes_on(run, images, tmp_path / "straight")


def train_long_steps_on_a_full_disk(busy: int, markers: Path, *arguments: object) -> int:
    return train_long_steps(busy, markers, *arguments, first=fill_the_disk)


@pytest.mark.slow
def test_a_full_disk_is_told_once_where_a_long_step_is_left(images, tmp_path) -> None:
    run = tmp_path / "run"
    launched = interrupt_a_long_step(tmp_path, train_long_steps_on_a_full_disk, 0, "--out", run, *changes(images))
    assert launched.wait() == [2, 2], launched.err()
    (line,) = launched.err().splitlines()
    assert line.startswith(f"error: cannot write or read '{run}/latest.pt': No space left on device")
    assert read_checkpoint(run / "latest.pt").iteration == 0


def train_slow_images(marker: Path, *arguments: object) -> int:
    """Rank 0 opens them for ever."""
    signals_module.PATIENCE = 0.0
    if os.environ["RANK"] == "0":

        def open_pool(*arguments: object) -> None:
            marker.touch()
            wait_for_ever()

        train_module.open_pool = open_pool
    return train(*arguments)


def test_a_signal_before_the_run_ends_all_ranks(images, tmp_path) -> None:
    marker = tmp_path / "marker"
    launched = Launched(tmp_path / "ranks", 2, train_slow_images, marker, "--out", tmp_path / "run", *changes(images))
    wait_for(marker, launched)
    for process in launched.ranks:
        os.kill(process.pid, signal.SIGINT)
    assert launched.wait() == [128 + signal.SIGINT] * 2, launched.err()
    assert launched.err() == "interrupted\n"
    assert not (tmp_path / "run").exists()
