"""Who ends a process after a signal: the main thread where it comes to a check, else the thread that watches."""

from __future__ import annotations

import os
import queue
import signal
import threading
from types import SimpleNamespace

import pytest

from cxgrad_fast.signals import Interrupted, Signals

DEADLINE = 60  # seconds, for what is sure to come


class Watched:
    """Signals of a rank of two, whose watch has no patience and tells how it would have ended the process."""

    def __init__(self, rank: int = 0, heard: int = 0) -> None:
        self.ended: list[int] = []
        self.rank_0_left: int | None = None
        self.looked = threading.Semaphore(0)
        self.codes: queue.Queue[int] = queue.Queue()
        self.signums: list[int] = []
        self.told: list[int] = []
        notes = SimpleNamespace(answer=self.looked.release, left=lambda: self.rank_0_left)
        notes.ended, notes.leave = lambda: self.ended, self.told.append
        ranks = SimpleNamespace(size=2, is_first=rank == 0, notes=notes, tell=lambda word: None, heard=lambda: heard)
        self.signals = Signals(ranks, self.end, patience=0, leave=self.codes.put)

    def end(self, signum: int) -> int:
        self.signums.append(signum)
        return 7

    def look_twice(self) -> None:
        """Return once the watch has seen all that was there when this was called, and acted."""
        while self.looked.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self.looked.acquire(timeout=DEADLINE)


class AskedFor:
    """A lock that tells when a thread asks for it which is not the one that made it."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock, self._owner, self.asked = lock, threading.get_ident(), threading.Event()

    def __enter__(self) -> None:
        if threading.get_ident() != self._owner:
            self.asked.set()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def test_a_main_thread_that_is_busy_is_left() -> None:
    watched = Watched()
    with watched.signals:
        watched.look_twice()
        assert watched.codes.empty()
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.codes.get(timeout=DEADLINE) == 7
        assert watched.signums == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        watched.look_twice()
    assert watched.codes.empty()  # once


def test_a_main_thread_that_saves_is_not_left() -> None:
    watched = Watched()
    signals = watched.signals
    signals._held = lock = AskedFor(signals._held)
    with signals:
        with signals.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            assert lock.asked.wait(DEADLINE)  # the watch would end the process now
            assert watched.codes.empty()
            signals.stop_watching()
        watched.look_twice()
    assert watched.codes.empty()
    assert signals.received == signal.SIGTERM


def test_what_was_held_is_left_after_it() -> None:
    watched = Watched()
    signals = watched.signals
    with signals:
        with signals.hold():
            os.kill(os.getpid(), signal.SIGINT)
        assert watched.codes.get(timeout=DEADLINE) == 7


def test_who_stops_where_it_checks_is_not_left() -> None:
    watched = Watched(heard=signal.SIGTERM)
    with watched.signals:
        with pytest.raises(Interrupted, match="SIGTERM") as caught:
            watched.signals.check()
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does when another rank was faster
        watched.look_twice()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert watched.codes.empty()


def test_ranks_that_save_nothing_wait_for_rank_0() -> None:
    watched = Watched(rank=1)
    with watched.signals:
        os.kill(os.getpid(), signal.SIGTERM)
        watched.look_twice()
        assert watched.codes.empty()
        watched.rank_0_left = 143
        assert watched.codes.get(timeout=DEADLINE) == 7


def test_ranks_leave_without_a_signal_where_rank_0_did() -> None:
    watched = Watched(rank=1)
    with watched.signals:
        watched.ended = [0]
        watched.look_twice()
        assert watched.codes.empty()  # the next sum finds out, as far as nobody knows
        watched.rank_0_left = 2
        assert watched.codes.get(timeout=DEADLINE) == 7
    assert watched.signums == [0]


def test_ranks_that_wait_for_the_dead_are_left_after_a_signal() -> None:
    watched = Watched(rank=1)
    with watched.signals:
        watched.ended = [0]
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.codes.get(timeout=DEADLINE) == 7


def test_an_end_that_fails_ends_all_the_same(capsys) -> None:
    watched = Watched()

    def fail(signum: int) -> int:
        raise ValueError("a bug")

    with watched.signals, watched.signals.guarding(fail):
        os.kill(os.getpid(), signal.SIGTERM)
        assert watched.codes.get(timeout=DEADLINE) == 1
    assert "ValueError: a bug" in capsys.readouterr().err
    assert watched.told == [1]


def test_a_process_alone_has_its_signals_back_after_it() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    signals = Signals()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
    with signals.guarding(lambda signum: 0):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            signals.check()
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
