"""A command on the ranks that torchrun started: the first speaks, all end with a reason that is told once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass

from cxgrad_fast.engine import NonFiniteError, RankLostError, Ranks, ToldElsewhereError, is_launched, join_ranks
from cxgrad_fast.signals import Interrupted, Signals, exit_code

# exit codes
BAD_INPUT = 2
NON_FINITE = 3
RANK_LOST = 4

Main = Callable[[Sequence[str] | None, Ranks, Signals], int]


def on_ranks(main: Main, argv: Sequence[str] | None) -> int:
    """``main(argv, ranks, signals)``'s exit code; what goes to stdout on all ranks but the first is dropped.

    The signals are open already where there are several ranks: until :meth:`Signals.guarding` there is nothing to save.

    Raises:
        InputError: what is wrong, on the one rank that is to tell it.
    """
    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(join_ranks())
            signals = Signals(ranks, lambda signum: _tell_unsaved(ending_of(ranks, signum, ranks.notes.ended())))
            if ranks.size > 1:
                stack.enter_context(signals)
            if not ranks.is_first:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            return _told(main, argv, ranks, signals)
        except ToldElsewhereError:
            return BAD_INPUT
        except RankLostError as error:
            print(f"error: not all ranks came: {error}", file=sys.stderr)
            return RANK_LOST
        finally:
            if is_launched():  # where another rank ends first torchrun sends SIGTERM: the exit code is this rank's own
                for signum in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(signum, signal.SIG_IGN)


def _told(main: Main, argv: Sequence[str] | None, ranks: Ranks, signals: Signals) -> int:
    try:
        return main(argv, ranks, signals)
    except Interrupted as stop:
        return _tell_unsaved(Ending(stop.exit_code, signal=str(stop) if ranks.is_first else ""))
    except RankLostError as error:
        signals.stop_watching()
        ranks.give_up()
        return _tell_unsaved(ending_of(ranks, signals.received, ranks.notes.lost(), str(error)))
    except NonFiniteError as error:  # all ranks find the same
        signals.stop_watching()
        if ranks.is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return NON_FINITE
    except ToldElsewhereError:
        raise
    except BaseException:  # this rank tells
        if ranks.size > 1:
            ranks.notes.leave(BAD_INPUT)
        raise


@dataclass(frozen=True)
class Ending:
    """Why ranks end that cannot go on together.

    Attributes:
        code: this process's exit code.
        lost: who was lost, for the rank that is to tell it; empty on the others.
        signal: the name of the signal that came where none is lost, for the rank that is to tell it.
    """

    code: int
    lost: str = ""
    signal: str = ""


def ending_of(ranks: Ranks, signum: int, lost: Sequence[int], cause: str = "") -> Ending:
    """What a rank has found out, in words such as ``rank 2 of 3 was lost``; of rank 0, which now leaves, all learn it.

    Args:
        ranks: several.
        signum: the signal that this process got, or 0.
        lost: ranks.
        cause: what is told where none is lost and no signal came.
    """
    code = ranks.notes.left()
    if code is not None:
        return Ending(code)
    if signum and not lost:
        ending = Ending(exit_code(signum), signal=signal.Signals(signum).name if ranks.is_first else "")
    else:
        ending = Ending(RANK_LOST, lost=_who(ranks, lost, cause) if ranks.notes.is_to_tell(lost) else "")
    if ranks.is_first:
        ranks.notes.leave(ending.code)
    return ending


def _who(ranks: Ranks, lost: Sequence[int], cause: str) -> str:
    if not lost:
        return f"the {ranks.size} ranks lost each other" + f" ({cause})" * bool(cause)
    several = len(lost) > 1
    names = ", ".join(map(str, lost))
    return f"rank{'s' * several} {names} of {ranks.size} {'were' if several else 'was'} lost"


def _tell_unsaved(ending: Ending) -> int:
    """The exit code, after one line on stderr from the rank that is to tell."""
    if ending.lost:
        print(f"error: {ending.lost}, there is nothing to save: start again", file=sys.stderr, flush=True)
    elif ending.signal:
        print("interrupted", file=sys.stderr, flush=True)
    return ending.code
