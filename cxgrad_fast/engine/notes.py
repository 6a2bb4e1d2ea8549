"""What ranks leave for each other with their launcher, which outlives them: who lives, who has left, who tells."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 20.0  # seconds in which a rank has to answer before it counts as lost


class Notes:
    """The notes of all ranks, read and written by one of them.

    Whether a process of this machine has ended is known from the system: one that is only slow has not. A rank of
    another machine has ended where a rank beside it says so.

    Once the launcher cannot be reached there are no notes to read, and nothing is written.

    Args:
        store: the launcher's ``torch.distributed.Store``.
        rank: this process.
        size: how many ranks there are.
        clock, sleep: a test may bring its own.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._clock, self._sleep = clock, sleep
        self._is_reachable = True
        self._processes = [""] * size
        self._write(f"process/{rank}", process_note())

    def meet(self) -> None:
        """Read which process each rank is; waits until all have noted it.

        Raises:
            RuntimeError: the launcher cannot be reached.
        """
        keys = [_key(f"process/{rank}") for rank in range(self._size)]
        self._processes = [note.decode() for note in self._store.multi_get(keys)]

    # who lives

    def sign(self) -> None:
        """Note that this rank lives."""
        self._write(f"lives/{self._rank}")

    def call(self) -> None:
        """Ask all ranks to sign, and sign."""
        self._write("called")
        self.sign()

    def answer(self) -> None:
        """Sign if a rank called. A thread of each does this, whatever its main thread is busy with."""
        if self._has("called"):
            self.sign()

    def ended(self) -> list[int]:
        """The ranks that are known to be lost: their processes have ended unsigned, or they noted that they fail."""
        ended = []
        for rank in self._others():
            is_seen = not self._has(f"lives/{rank}") and has_ended(self._processes[rank])
            if is_seen:
                self._write(f"ended/{rank}")  # for other machines
            if is_seen or self._has(f"ended/{rank}"):
                ended.append(rank)
        return ended

    def lost(self) -> list[int]:
        """The ranks that are lost, after one was found to be.

        Those that :meth:`ended`, as soon as there is one; none if all have signed; after ``PATIENCE`` those that have
        not: they hang, or are on a machine that cannot be reached.
        """
        self.call()
        deadline = self._clock() + PATIENCE
        while True:
            ended = self.ended()
            silent = [rank for rank in self._others() if not self._has(f"lives/{rank}")]
            if ended or not silent:
                return ended
            if self._clock() > deadline:
                return silent if self._is_reachable else []
            self._sleep(0.02)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    # who tells

    def leave(self, code: int) -> None:
        """This rank ends, for a reason that it tells. Where it is rank 0, the others end alike, and tell nothing."""
        if self._rank == 0:
            self._write("left", str(code))
            self.sign()
        else:
            self._write(f"ended/{self._rank}")

    def left(self) -> int | None:
        """The exit code with which rank 0 left; None if it did not."""
        return self._ask(lambda: int(self._store.get(_key("left"))), None) if self._has("left") else None

    def is_to_tell(self, lost: Sequence[int]) -> bool:
        """Whether this rank is to tell who was lost: rank 0 if it lives, else the first that asks."""
        if not self._is_reachable:
            return True  # better twice than never
        return (self._rank == 0 or 0 in lost) and self._ask(lambda: self._store.add(_key("told"), 1), 1) == 1

    # the store

    def _has(self, name: str) -> bool:
        return self._ask(lambda: self._store.check([_key(name)]), False)

    def _write(self, name: str, value: str = "") -> None:
        self._ask(lambda: self._store.set(_key(name), value), None)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        if self._is_reachable:
            try:
                return question()
            except RuntimeError:
                self._is_reachable = False  # torch would complain of every other attempt
        return otherwise


def _key(name: str) -> str:
    return f"cxgrad_fast/{name}"


def process_note() -> str:
    """This process, for :func:`has_ended`; empty where the system does not show processes in /proc."""
    machine, process = _machine(), os.getpid()
    return f"{machine} {process} {_state_and_start(process)[1]}" if machine else ""


def has_ended(note: str) -> bool:
    """Whether the process that left this note has ended; False where this machine cannot know."""
    machine, _, rest = note.partition(" ")
    if not machine or machine != _machine():
        return False
    process, _, start = rest.partition(" ")
    try:
        state, its_start = _state_and_start(process)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX" or its_start != start  # nobody has waited for it yet, or its number is another's by now


def _machine() -> str:
    """One start of one system, and of its containers the one in which process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_and_start(process: int | str) -> tuple[str, str]:
    """A letter, and when the process began: fields 3 and 22 of proc_pid_stat(5)."""
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return after_name[0], after_name[19]
