"""Who is lost: a process that has ended, not one that is slow; told by one rank."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from cxgrad_fast.engine import notes as notes_module
from cxgrad_fast.engine.notes import PATIENCE, Notes, has_ended, process_note

ELSEWHERE = "another-boot/pid:[1] 17 4"


class Child:
    """A process that waits to be killed, and the note it would leave."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        machine, _, _ = process_note().split()
        self.note = f"{machine} {self.process.pid} {notes_module._state_and_start(self.process.pid)[1]}"

    def end(self) -> None:
        """Kill it; it stays a zombie until somebody waits for it."""
        self.process.kill()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture(scope="module")
def children() -> Iterator[list[Child]]:
    """One that lives, one that was killed and not waited for."""
    both = [Child(), Child()]
    both[1].end()
    yield both
    for child in both:
        child.process.kill()
        child.process.communicate()


class Time:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def met(processes: list[str], time: Time | None = None) -> list[Notes]:
    """The notes of ranks with these process notes, in one store; without a time none of them may sleep."""

    def not_now(seconds: float) -> None:
        raise AssertionError("there is nothing to wait for")

    store = dist.HashStore()
    sleep = not_now if time is None else time.sleep
    ranks = [
        Notes(store, rank, len(processes), lambda: time.now if time else 0.0, sleep) for rank in range(len(processes))
    ]
    for rank, note in enumerate(processes):
        store.set(f"cxgrad_fast/process/{rank}", note)
    for notes in ranks:
        notes.meet()
    return ranks


def test_a_process_has_ended_when_the_system_says_so(children) -> None:
    alive, killed = children
    assert not has_ended(process_note())
    assert not has_ended(alive.note)
    assert has_ended(killed.note)  # a zombie
    machine, process, _ = alive.note.split()
    assert has_ended(f"{machine} {process} 1")  # its number belongs to another by now
    for note in ("", ELSEWHERE, alive.note.replace("/pid:", "/other:")):
        assert not has_ended(note)


def test_a_system_without_proc_knows_of_no_end(monkeypatch, children) -> None:
    monkeypatch.setattr(notes_module, "_machine", lambda: "")
    assert process_note() == ""
    assert not has_ended(children[1].note)


def test_a_slow_rank_is_not_lost_beside_one_that_ended(children) -> None:
    alive, killed = children
    first, *_ = met([process_note(), killed.note, alive.note])
    assert first.lost() == [1]  # at once, and rank 2 has not answered


def test_what_a_rank_knows_of_its_machine_the_others_read(children) -> None:
    first, beside, _ = met([process_note(), children[0].note, children[1].note])
    first._processes = [first._processes[0], ELSEWHERE, ELSEWHERE]  # as rank 0 would see them from another machine
    assert first.ended() == []
    assert beside.lost() == [2]
    assert first.lost() == [2]


def test_a_rank_that_answers_late_is_not_lost() -> None:
    time = Time()
    first, other = met([process_note(), ELSEWHERE], time)
    other.answer()  # nobody has called
    sleep = time.sleep

    def answer_late(seconds: float) -> None:
        sleep(seconds)
        if time.now > 100 + PATIENCE - 1:
            other.answer()

    first._sleep = answer_late
    assert first.lost() == []
    assert time.now < 100 + PATIENCE


def test_a_rank_that_does_not_answer_is_lost(children) -> None:
    time = Time()
    first, other, _ = met([process_note(), ELSEWHERE, children[0].note], time)
    other.sign()
    assert first.lost() == [2]  # it lives on this machine, and hangs
    assert time.now > 100 + PATIENCE


def test_a_rank_that_failed_is_lost_though_it_answered() -> None:
    first, other = met([process_note(), process_note()])
    other.sign()
    other.leave(2)
    assert first.lost() == [1]
    assert other.left() is None


def test_rank_0_leaves_and_the_others_know_how() -> None:
    first, other, last = met([process_note()] * 3)
    assert other.left() is None
    first.leave(143)
    assert [other.left(), last.left()] == [143, 143]
    assert other.ended() == []


@pytest.mark.parametrize(("lost", "asked", "telling"), [([1], (2, 0), 0), ([0], (2, 1), 2), ([], (1, 2, 0), 0)])
def test_one_rank_tells(lost: list[int], asked: tuple[int, ...], telling: int) -> None:
    ranks = met([process_note()] * 3)
    assert [rank for rank in asked if ranks[rank].is_to_tell(lost)] == [telling]


def test_without_the_launcher_the_system_is_asked_and_nothing_is_waited_for(children) -> None:
    class Gone:
        tries = 0

        def __getattr__(self, name: str) -> object:
            Gone.tries += 1
            raise RuntimeError("Broken pipe")

    time = Time()
    first, other = met([process_note(), children[1].note], time)
    other._store = first._store = Gone()
    assert first.lost() == [1]
    assert first.is_to_tell([1])
    assert Gone.tries == 1  # each would print a warning of torch
    assert first.left() is None
    other._processes = [children[0].note, ""]
    assert other.lost() == []  # rank 0 lives, and nobody can tell more
    assert other.is_to_tell([])
