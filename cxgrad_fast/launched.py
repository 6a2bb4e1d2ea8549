"""A command on the ranks that torchrun started: the first speaks, all end with a reason that is told once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout

from cxgrad_fast.engine import RankLostError, Ranks, ToldElsewhereError, is_launched, join_ranks

# exit codes
BAD_INPUT = 2
RANK_LOST = 4


def on_ranks(main: Callable[[Sequence[str] | None, Ranks], int], argv: Sequence[str] | None) -> int:
    """``main(argv, ranks)``'s exit code; what goes to stdout on all ranks but the first is dropped.

    Raises:
        InputError: what is wrong, on the one rank that is to tell it.
    """
    with ExitStack() as stack:
        try:
            ranks = stack.enter_context(join_ranks())
            if not ranks.is_first:
                stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            return _told(main, argv, ranks)
        except ToldElsewhereError:
            return BAD_INPUT
        except RankLostError as error:
            print(f"error: not all ranks came: {error}", file=sys.stderr)
            return RANK_LOST
        finally:
            if is_launched():  # where another rank ends first torchrun sends SIGTERM: the exit code is this rank's own
                signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _told(main: Callable[[Sequence[str] | None, Ranks], int], argv: Sequence[str] | None, ranks: Ranks) -> int:
    try:
        return main(argv, ranks)
    except RankLostError as error:
        if who := who_was_lost(ranks, str(error)):
            print(f"error: {who}, there is nothing to save: start again", file=sys.stderr, flush=True)
        return RANK_LOST


def who_was_lost(ranks: Ranks, cause: str) -> str:
    """``rank 2 of 3 was lost``; empty on all ranks that live but one, which is to tell."""
    lost = ranks.lost()
    if ranks.rank != next(rank for rank in range(ranks.size) if rank not in lost):
        return ""
    if not lost:
        return f"the {ranks.size} ranks lost each other" + f" ({cause})" * bool(cause)
    several = len(lost) > 1
    names = ", ".join(map(str, lost))
    return f"rank{'s' * several} {names} of {ranks.size} {'were' if several else 'was'} lost"
