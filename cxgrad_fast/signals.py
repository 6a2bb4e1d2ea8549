"""SIGINT and SIGTERM, which wait for a place where nothing is lost, on all ranks at the same one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from cxgrad_fast.engine import ALONE, Ranks

GRACE = 20.0  # seconds; torchrun kills 30 after it sent SIGTERM


class Interrupted(Exception):
    """SIGINT or SIGTERM came; raised only where the session may be saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Signals:
    """While open, SIGINT and SIGTERM wait for :meth:`check`; after the first, SIGINT kills a process that is alone.

    Args:
        ranks: who is interrupted together: a signal that any of them got.
        stuck: called in a thread of its own where a signal came and no :meth:`check` in ``grace`` seconds after it: the
            main thread waits for the dead, which NCCL does for ever.
        grace: seconds.
    """

    def __init__(self, ranks: Ranks = ALONE, stuck: Callable[[], None] = lambda: None, grace: float = GRACE) -> None:
        self._ranks, self._stuck, self._grace = ranks, stuck, grace
        self._received = self._checks = 0
        self._before: dict[int, Any] = {}
        self._left = threading.Event()
        self._watch: threading.Thread | None = None

    def __enter__(self) -> Signals:
        for signum in (signal.SIGINT, signal.SIGTERM):
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
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        if self._watch is not None:
            signal.set_wakeup_fd(self._wake_before)
            self._left.set()
            os.close(self._wake)  # ends the thread's reading
            self._watch.join()
            os.close(self._pipe)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        if self._ranks.size == 1:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        else:  # torchrun passes a terminal's SIGINT on, perhaps to processes that had it already
            self._ranks.tell(signum)

    def check(self) -> None:
        """Raises Interrupted if a signal has come, to this rank or another; with several, all have to call it."""
        self._checks += 1
        if signum := self._received if self._ranks.size == 1 else self._ranks.heard():
            self._left.set()
            raise Interrupted(signum)

    def _watching(self) -> None:
        """Python's own handlers wait for the main thread to come back from what it calls; this does not."""
        if not os.read(self._pipe, 1):
            return
        with suppress(RuntimeError):  # nobody keeps the notes any more
            self._ranks.sign()
        checks = -1
        while checks != self._checks:
            checks = self._checks
            if self._left.wait(self._grace):
                return
        self._stuck()
