"""Episodes per second of whole meta-training steps, all sides interleaved, and how far each is from the limit.

    python bench/episodes.py [--preset released-mini-5w1s[,MORE]] [--group.setting value ...]
                             [--sweep SETTING=V1,V2 ...] [--sides loop,func-vmap,...] [--rounds 9] [--limit SECONDS]

Random seeded episodes of the preset's shape: no data is needed. Every side runs in a process of its own and is first
asked whether it does the same work (bench/equal_work.py); one that does not gets no figure, and the exit code is 1.
Then all sides take turns (A B C, C B A, ...). A turn is several steps in a row, as in training: the first of them,
whose data other processes have driven from the caches, stands apart (``cold_s`` in the result file). A side that cannot
run, or not within its limit, or that does not compute the algorithm, keeps its row with the reason.

The result file is written after every case; the same command, on the same machine and commit, takes an unfinished file
up where it stopped. ``--preset 'glyphs*-5w1s'`` is every algorithm's.

Columns: episodes/s, median and 20-80 % quantiles; its ratio to the per-task loop, pair by pair; the number of samples
n; the share of the roofline limit (bench/roofline.py); peak memory of one step; operator calls (on CUDA: launches) of
one step; seconds of the first step, and the part of them that is compilation or other work done once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from equal_work import (
    TOLERANCE,
    Case,
    Truth,
    Verdict,
    check_rounded,
    check_small,
    check_timed,
    make_case,
    needs_small,
    small_copies,
    small_copy,
    truth,
)
from isolated import TURN_S, Direct, Host, Isolated
from measure import RESULTS, Dropped, Timing, interleave, machine_line, ratio
from result_file import ResultFile
from rows import NOTHING, Row, describe, record, table
from side import Unavailable, device_of
from sides import BASELINE, COMPILING, SIDES, precision_of, refusal

from cxgrad_fast import Config, InputError, reference
from cxgrad_fast.cli import build_config, run_command, split_settings
from cxgrad_fast.config import PRESETS
from cxgrad_fast.printable import shown

DEFAULT = "released-mini-5w1s"
QUICK = {"model.filters": 4, "task.queries": 3, "inner.steps": 2, "inner.context_dim": 8}


@dataclass(frozen=True)
class Answers:
    """What the oracle says of a case and of its small copy."""

    expected: Truth
    small: Case
    expected_small: Truth


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a side does other work."""
    settings, rest = split_settings(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(rest)
    names = _chosen(options.sides)
    configs = _configs(options, settings)
    request = {
        "quick": options.quick,
        "rounds": options.rounds,
        "limit_s": options.limit,
        "turn_s": options.turn,
        "requested_sides": list(names),
    }
    results = ResultFile("episodes", request, configs, None if options.no_save else options.out)
    print(f"{machine_line(results.machine)}\n", flush=True)
    for config in configs:
        if results.has(config):
            print(f"{describe(config)}: measured before, in {results.path}\n", flush=True)
            continue
        rows, limit = run_case(config, names, options.rounds, options.limit, options.turn, options.in_process)
        print("\n".join(table(config, rows, limit)) + "\n", flush=True)
        results.add(record(config, rows, limit))
    if options.json:
        print(json.dumps(results.content))
    if results.path:
        print(f"written to {results.path}")
    return 1 if any(side["wrong"] for case in results.cases for side in case["sides"]) else 0


def run_case(
    config: Config,
    names: Sequence[str],
    rounds: int,
    limit_s: float,
    turn_s: float = TURN_S,
    in_process: bool = False,
) -> tuple[list[Row], dict[str, Any]]:
    """All sides of one case, checked and then timed against each other; and the roofline limit."""
    if config.inner.algorithm not in reference.ALGORITHMS:
        return [Row(name, f"the oracle has no meta-loss of {config.inner.algorithm}") for name in names], _limit(config)
    case, small = make_case(config, calm=True), make_case(small_copy(config))
    answers = Answers(truth(case), small, truth(small))
    hosts: dict[str, Host] = {}
    rows: dict[str, Row] = {}
    try:
        for name in names:
            rows[name] = Row(name, refusal(name, config))
            if rows[name].reason:
                continue
            _say(f"{name}: checking")
            host: Host = Direct(name) if in_process else Isolated(name, limit_s)
            hosts[name] = host
            rows[name] = _prepare(name, host, case, answers)
        ready = {name: hosts[name] for name in names if not rows[name].reason}
        _say(f"timing {', '.join(ready)}")
        cold: dict[str, list[float]] = {name: [] for name in ready}

        def turn(name: str) -> float:
            found = hosts[name].turn(turn_s)
            cold[name].append(found.cold)
            return found.mean

        timings = interleave({name: partial(turn, name) for name in ready}, rounds, limit_s, warm_up=0)
        for name, timing in timings.items():
            row = replace(rows[name], seconds=timing, cold=Timing(tuple(cold[name])), reason=timing.note)
            rows[name] = _counted(row, hosts[name])
    finally:
        for host in hosts.values():
            host.close()
    limit = _limit(config)
    return [_compared(rows[name], rows.get(BASELINE), limit) for name in names], limit


def _prepare(name: str, host: Host, case: Case, answers: Answers) -> Row:
    """Build, check and start one side; its row has a reason where it ends here."""
    row = Row(name)
    try:
        if needs_small(name):
            row = _judged(row, check_small(host, answers.small, answers.expected_small))
        if needs_small(name) and not row.wrong:
            row = _judged(row, check_rounded(host, small_copies(case.config)))
        if not row.wrong:
            host.build(case.config, case.episodes, case.parameters)
            row = replace(row, first_step_s=host.step())
            host.load(case.parameters)
            row = _judged(row, check_timed(host, case, answers.expected, precision_of(name, case.config)))
        if not row.wrong:
            row = replace(row, peak_bytes=host.peak_memory())  # the step that warms up, too
    except (Unavailable, Dropped) as reason:
        row = replace(row, reason=str(reason))
    return row


def _judged(row: Row, verdict: Verdict) -> Row:
    errors = row.errors | verdict.errors
    return replace(row, errors=errors, reason=verdict.failure, wrong=bool(verdict.failure))


def _counted(row: Row, host: Host) -> Row:
    """With its operators, which cost one more step: not of another's one program, or where there is no time left."""
    if row.reason or (row.side in COMPILING and not row.side.startswith("ours")):
        return row
    try:
        return replace(row, operators=host.operators())
    except Dropped as reason:
        return replace(row, reason=str(reason))


def _compared(row: Row, baseline: Row | None, limit: dict[str, Any]) -> Row:
    if not row.seconds.samples:
        return row
    gain = ratio(baseline.seconds, row.seconds) if baseline else NOTHING
    floor = limit.get("floor_s")
    return replace(row, gain=gain, share=floor / row.seconds.median if floor else None)


def _limit(config: Config) -> dict[str, Any]:
    """The roofline of a case: FLOPs, bytes, the peaks measured now, and the seconds that follow."""
    try:
        from roofline import peaks_for, step_cost, time_floor
    except ImportError as error:
        return {"reason": f"no roofline: {error}"}
    cost, peaks = step_cost(config), peaks_for(config.run.precision, device_of(config))
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "peak_flops_per_s": peaks.flops,
        "peak_bytes_per_s": peaks.bandwidth,
        "floor_s": time_floor(cost, peaks),
    }


def _configs(options: argparse.Namespace, settings: dict[str, object]) -> list[Config]:
    """The cases: presets times the values of every ``--sweep``.

    Raises:
        InputError: a bad setting, or a precision that the equal-work check has no tolerance for.
    """
    sweeps = []
    for words in options.sweep:
        setting, equals, values = words.partition("=")
        if not equals:
            raise InputError(f"--sweep takes SETTING=V1,V2, got '{words}'")
        sweeps.append([(setting, value) for value in values.split(",")])
    configs = []
    for name, *values in itertools.product(_presets(options.preset), *sweeps):
        asked = {"data.source": "glyphs", **settings, **dict(values)}
        config = build_config(name, None, asked)
        if options.quick:  # those words that the algorithm has
            known = config.flat()
            quick = {word: QUICK[word] for word in QUICK if word in known}
            quick["model.image_size"] = max(20, config.inner.least_size(config.model))
            config = build_config(name, None, quick | asked)
        configs.append(config)
    for config in configs:
        if config.run.precision not in TOLERANCE:
            raise InputError(f"run.precision = {config.run.precision} has no tolerance in bench/equal_work.py yet")
    return configs


def _presets(words: str) -> list[str]:
    """The presets that are named; a word with a ``*`` is all that match it."""
    found: list[str] = []
    for word in words.split(","):
        names = [name for name in PRESETS if fnmatchcase(name, word)] if "*" in word else [word]
        if not names:
            raise InputError(f"--preset: no preset matches {shown(word)}")
        found += names
    return found


def _chosen(words: str) -> list[str]:
    names = words.split(",") if words else list(SIDES)
    unknown = [name for name in names if name not in SIDES]
    if unknown:
        raise InputError(f"--sides takes names of {', '.join(SIDES)}, got '{unknown[0]}'")
    return names


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=DEFAULT, help="one or several, separated by commas; * as in file names")
    parser.add_argument("--sweep", action="append", default=[], metavar="SETTING=V1,V2", help="a case for every value")
    parser.add_argument("--sides", default="", help=f"default: {','.join(SIDES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--turn", type=float, default=TURN_S, help="seconds of steps in a row that a sample should take"
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds a side may spend on one case, all in all")
    parser.add_argument("--quick", action="store_true", help="a tiny network: a trial of the command, no figures")
    parser.add_argument("--in-process", action="store_true", help="no child processes, no limits: to debug a side")
    parser.add_argument("--json", action="store_true", help="print the result file too")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
