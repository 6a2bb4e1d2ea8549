"""How a training run ends before its last iteration: the last finished step is saved, and one rank tells why."""

from __future__ import annotations

import os
import shlex
import sys

from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.config import InputError
from cxgrad_fast.engine import NonFiniteError, RankLostError
from cxgrad_fast.launched import Ending, ending_of
from cxgrad_fast.runs import LATEST, Run, draw_curves
from cxgrad_fast.session import Session
from cxgrad_fast.signals import Interrupted, Signals


def interrupted(session: Session, run: Run, stop: Interrupted) -> int:
    """In the main thread of each rank, after the same step; the exit code."""
    is_saved = _save(session, run)
    _tell(session, run, Ending(stop.exit_code, signal=str(stop)), is_saved)
    if session.ranks.is_first:
        draw_curves(run.folder)
    return stop.exit_code


def rank_lost(session: Session, run: Run, signals: Signals, error: RankLostError) -> int:
    """In the main thread of a rank that lives; the exit code."""
    signals.stop_watching()
    session.ranks.give_up()
    is_saved = _save(session, run)  # before anything is waited for
    ending = ending_of(session.ranks, signals.received, session.ranks.notes.lost(), str(error))
    _tell(session, run, ending, is_saved)
    if session.learner.device.type == "cuda":
        os._exit(ending.code)  # where NCCL waits for the dead, leaving would too
    return ending.code


def step_left(session: Session, run: Run, signum: int) -> int:
    """In the thread that watches, while the main thread computes a step or waits for the dead; the exit code."""
    # a device that waits for the dead does not answer
    is_saved = session.learner.device.type == "cpu" and _save(session, run)
    ending = ending_of(session.ranks, signum, session.ranks.notes.ended())
    if session.ranks.is_first and sys.stderr.isatty():
        print(file=sys.stderr)  # the main thread's progress bar stands there
    _tell(session, run, ending, is_saved, ", without what was under way")
    return ending.code


def _save(session: Session, run: Run) -> bool:
    """Whether the session is in latest.pt now: where a weight is not finite, what stands there is better."""
    if run.saved != (session.iteration, session.validated):  # disks may be slow, and torchrun kills after 30 s
        try:
            run.save(session.checkpoint())
        except NonFiniteError:
            return False
    return True


def _tell(session: Session, run: Run, ending: Ending, is_saved: bool, left_out: str = "") -> None:
    """One line, from the rank that is to tell."""
    latest, go_on = run.folder / LATEST, f"go on with: {_go_on(session, run)}"
    if ending.lost:
        iteration = session.iteration if session.ranks.is_first and is_saved else _iteration_in(run)
        stands = "where rank 0 ran" if iteration is None else f"iteration {iteration}"
        where = f"at iteration {session.iteration + 1}; the run stands at {latest} ({stands})"
        print(f"error: {ending.lost} {where}; {go_on}", file=sys.stderr, flush=True)
    elif ending.signal and is_saved:
        print(f"{ending.signal}: saved after iteration {session.iteration}{left_out}; {go_on}", flush=True)
    elif ending.signal:
        print(f"{ending.signal}: the run stands at {latest} (iteration {_iteration_in(run)}); {go_on}", flush=True)


def _iteration_in(run: Run) -> int | None:
    """That of latest.pt; None where it cannot be read: it may be on rank 0's machine alone."""
    try:
        return read_checkpoint(run.folder / LATEST).iteration
    except InputError:
        return None


def _go_on(session: Session, run: Run) -> str:
    """The command that continues the run."""
    size = session.ranks.size
    launcher = "python" if size == 1 else f"torchrun --nproc-per-node={size}"
    return f"{launcher} -m cxgrad_fast.train --resume {shlex.quote(str(run.folder))}"
