"""SIGINT and SIGTERM, which wait for a place where nothing is lost; ranks stop at the same one, if it comes soon.

After a signal, one of two threads ends the process. The main thread does, where it checks for signals, or when it finds
that a rank was lost. Of several ranks, a thread that watches does, where the main thread is busy for longer: with a
long step, or waiting for the dead, which NCCL does for ever. Whoever begins to end goes on alone. While the main thread
changes or saves what would be saved, it holds the watch off.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType, TracebackType
from typing import Any

from cxgrad_fast.engine import ALONE, Ranks

# seconds; torchrun kills 30 after a signal, and what is saved then has to reach the disk before
PATIENCE = 5.0
_TICK = 0.5  # seconds between two readings of the other ranks' notes
_ENDING = (signal.SIGINT, signal.SIGTERM)


def exit_code(signum: int) -> int:
    """Of a process that ends because of a signal."""
    return 128 + signum


class Interrupted(Exception):
    """SIGINT or SIGTERM came; raised only where the session may be saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = exit_code(signum)


class Signals:
    """While open, SIGINT and SIGTERM wait for :meth:`check`; after the first, SIGINT kills a process that is alone.

    Of several ranks, a thread of each watches. It answers where another asks who lives. It ends the process

    - on rank 0, ``patience`` seconds after a signal;
    - on the others, where rank 0 has left, and after a signal and ``patience`` where another rank is known to be lost.

    Args:
        ranks: who is interrupted together: a signal that any of them got.
        end: what the watch calls before it ends the process: from the signal that came, 0 for none, to the exit code.
        patience: seconds; None for ``PATIENCE``.
        leave: ends the process.
    """

    def __init__(
        self,
        ranks: Ranks = ALONE,
        end: Callable[[int], int] = exit_code,
        patience: float | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._ranks, self._end, self._leave = ranks, end, leave
        self._patience = PATIENCE if patience is None else patience
        self._received = 0
        self._before: dict[int, Any] = {}
        self._ends = False
        self._held = threading.RLock()
        self._watch: threading.Thread | None = None

    @property
    def received(self) -> int:
        """The last signal that this process got, 0 before the first."""
        return self._received

    def __enter__(self) -> Signals:
        for signum in _ENDING:
            self._before[signum] = signal.signal(signum, self._receive)
        if self._ranks.size > 1:
            self._pipe, wake = os.pipe()
            os.set_blocking(wake, False)
            self._wake_before, self._wake = signal.set_wakeup_fd(wake), wake
            self._watch = threading.Thread(target=self._watching, daemon=True)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_watching()
        for signum, handler in self._before.items():
            if signal.getsignal(signum) is not signal.SIG_IGN:  # which a process sets whose exit code is decided
                signal.signal(signum, handler)
        if self._watch is not None:
            signal.set_wakeup_fd(self._wake_before)
            os.close(self._wake)  # ends the thread's waiting
            self._watch.join()
            os.close(self._pipe)

    @contextmanager
    def guarding(self, end: Callable[[int], int]) -> Iterator[None]:
        """While open there is something to save, which ``end`` does: a process that is alone waits with signals too."""
        with self._held:
            self._end = end
        with self if self._ranks.size == 1 else nullcontext():
            try:
                yield
            finally:
                self.stop_watching()

    def check(self) -> None:
        """Raises Interrupted if a signal has come, to this rank or another; with several, all have to call it."""
        if signum := self._received if self._ranks.size == 1 else self._ranks.heard():
            self.stop_watching()
            raise Interrupted(signum)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The watch does not end the process in this block; if it has begun to, the block is never entered."""
        with self._held:
            yield

    def stop_watching(self) -> None:
        """From here on the main thread ends the process, however long it takes; if the watch has begun to, it does."""
        with self._held:
            self._ends = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if self._ranks.size == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        else:  # torchrun passes a terminal's SIGINT on, perhaps to processes that had it already
            self._ranks.tell(signum)

    def _watching(self) -> None:
        """Python's own handlers wait for the main thread to come back from what it calls; this does not."""
        poll, due = select.poll(), float("inf")
        poll.register(self._pipe, select.POLLIN)
        while True:
            if poll.poll(1000 * _TICK):
                woken = os.read(self._pipe, 64)
                if not woken:
                    return
                for signum in set(woken).intersection(_ENDING):
                    self._received = signum
                    due = min(due, time.monotonic() + self._patience)
            self._ranks.notes.answer()
            if not self._ends and self._is_due(time.monotonic() >= due):
                self._end_process()

    def _is_due(self, is_over: bool) -> bool:
        """Whether the watch is to end the process, if the patience with the main thread is over."""
        if self._ranks.is_first:
            return is_over
        return self._ranks.notes.left() is not None or (is_over and bool(self._ranks.notes.ended()))

    def _end_process(self) -> None:
        with self._held:
            if self._ends:
                return
            self._ends = True
            try:
                code = self._end(self._received)
            except Exception:
                traceback.print_exc()
                code = 1
            if self._ranks.is_first:
                self._ranks.notes.leave(code)  # what went wrong has been told
            self._leave(code)
