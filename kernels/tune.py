"""``python -m cxgrad_fast.kernels.tune``: measure, list and clear the launch settings of the Triton kernels.

Without an option it measures every kernel's candidates at its production shapes on the current CUDA device and writes
the fastest into the user's table, or into the file of ``--out``. An entry is written where a candidate beats the
defaults; pinned entries stay (:mod:`cxgrad_fast.kernels.launch`).

The ways to convolve (:mod:`cxgrad_fast.kernels.conv_block.choice`) are listed and cleared with them, as
``conv_block_ways``; they are measured at their first use, again after other settings were measured.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import backends, launch
from cxgrad_fast.kernels.conv_block import choice
from cxgrad_fast.kernels.launch import Entry, Question, Settings, Tunable

_GAIN = 1.02  # less is noise
_WAYS = "conv_block_ways"  # to convolve, as --kernel names them
_AGREE = 1e-3  # relative difference to the defaults' results, which rounding never reaches


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 where a person can do something about why it did not work, said in one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be more than the terminal can show
    try:
        return _run(argv)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="python -m cxgrad_fast.kernels.tune", description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print every table's entries, the first file wins")
    what.add_argument("--clear", action="store_true", help="remove the user's entries, pinned ones too")
    what.add_argument("--out", type=Path, metavar="FILE", help="write the measured entries into this table")
    parser.add_argument("--kernel", metavar="NAME", help="this kernel alone")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="NAME=VALUE[,VALUE...]",
        help="measure the production shapes alone in which NAME (tasks, images, size, ...) is one of these; repeatable",
    )
    options = parser.parse_args(argv)
    if options.where and (options.list or options.clear):
        raise InputError("--where chooses what is measured: it does not go with --list and --clear")
    if options.list:
        _list(options.kernel)
    elif options.clear:
        _clear(options.kernel)
    else:
        _tune(options.kernel, options.out, [_condition(words) for words in options.where])
    return 0


def _condition(words: str) -> tuple[str, frozenset[str]]:
    name, equals, values = words.partition("=")
    if not name or not equals:
        raise InputError(f"--where takes NAME=VALUE[,VALUE...], got '{words}'")
    return name, frozenset(values.split(","))


def _list(kernel: str | None) -> None:
    if kernel in (None, _WAYS):
        _list_ways()
    for architecture in launch.ARCHITECTURES if kernel != _WAYS else ():
        print(architecture)
        for file in launch.files(architecture):
            entries = [entry for entry in launch.read(file) if kernel in (None, entry.kernel)]
            print(f"  {file}: {len(entries) or 'no'} {'entry' if len(entries) == 1 else 'entries'}")
            for entry in entries:
                print(f"    {entry.key}: {_shown(entry.settings)} ({entry.source})")


def _list_ways() -> None:
    tables, way = choice.files(), choice.pinned()
    print(_WAYS)
    if way:
        print(f"  {choice.VARIABLE}: {way} for every product")
    for table in tables:
        found = choice.read(table)
        print(f"  {table}: {len(found) or 'no'} {'choice' if len(found) == 1 else 'choices'}")
        for each in found:
            print(f"    {each.key}: {each.way} ({each.source})")


def _clear(kernel: str | None) -> None:
    if kernel in (None, _WAYS):
        for forgotten in choice.forget():
            print(f"{forgotten}: removed")
    for architecture in launch.ARCHITECTURES if kernel != _WAYS else ():
        file = launch.user_file(architecture)
        if file is None or not os.path.lexists(file):
            continue
        # without a kernel the file is not read: it may be what is wrong
        kept = [entry for entry in launch.read(file) if entry.kernel != kernel] if kernel else []
        if kept:
            launch.write(file, kept)
        else:
            launch.remove(file)
        print(f"{file}: {len(kept)} entries left" if kept else f"{file}: removed")
    launch.reload()


def _tune(kernel: str | None, out: Path | None, where: Sequence[tuple[str, frozenset[str]]]) -> None:
    architecture = _architecture()
    file = out or launch.user_file(architecture)
    if file is None:
        raise InputError("no home folder for a table: --out names a file, or CXGRAD_CACHE a folder")
    chosen = _examples(_tunables(kernel), where)
    table = {entry.key: entry for entry in launch.read(file)} if os.path.lexists(file) else {}
    source = f"measured on {torch.cuda.get_device_name()}, {_commit()}"
    for tunable, example in chosen:
        question, best = measure(tunable, example, _seconds)
        key = launch.key_of(question.kernel, question.shape)
        if key in table and table[key].pinned:
            continue
        table.pop(key, None)
        if best:
            table[key] = Entry(key, best, source, file)
        launch.write(file, table.values())  # a run that is cut off leaves what it found
    launch.reload()
    print(f"{file}: {len(table)} entries")
    for forgotten in choice.forget_measured():  # with other settings than these
        print(f"{forgotten}: ways to convolve will be measured anew")


def _examples(
    tunables: Sequence[Tunable], where: Sequence[tuple[str, frozenset[str]]]
) -> list[tuple[Tunable, Mapping[str, Any]]]:
    """The production shapes that all conditions let through."""
    every = [(tunable, example) for tunable in tunables for example in tunable.examples]
    known = sorted({name for _, example in every for name in example})
    for name, _ in where:
        if name not in known:
            raise InputError(f"--where takes one of {', '.join(known)}, got '{name}'")
    chosen = [each for each in every if all(str(each[1].get(name)) in values for name, values in where)]
    if not chosen:
        raise InputError("--where lets no production shape through")
    return chosen


def _architecture() -> str:
    if reason := backends.why_not("triton"):
        raise InputError(f"measuring needs a CUDA device: {reason}")
    architecture = launch.architecture()
    if architecture is None:
        device = "Triton's interpreter" if backends.interpreting() else torch.cuda.get_device_name()
        raise InputError(f"tables are for {' and '.join(launch.ARCHITECTURES)}, this is {device}")
    return architecture


def _tunables(kernel: str | None) -> list[Tunable]:
    for path in sorted(Path(__file__).parent.glob("*/triton.py")):
        importlib.import_module(f"cxgrad_fast.kernels.{path.parent.name}.triton")
    known = launch.TUNABLES
    if kernel is not None and kernel not in known:
        raise InputError(f"--kernel takes one of {', '.join(sorted(known))}, got '{kernel}'")
    return [known[name] for name in sorted(known) if kernel in (None, name)]


def measure(
    tunable: Tunable, example: Mapping[str, Any], seconds: Callable[[Callable[[], Any]], float]
) -> tuple[Question, Settings]:
    """Time the candidates at one shape: what was asked there, and the settings that beat the defaults, if any do.

    Candidates that do not compile or fit are left out, and so are those whose results differ from the defaults'.
    """
    call = tunable.example(**example)
    with launch.recording() as asked, launch.trying(tunable.kernel, {}):
        wanted = call()
        question = next(question for question in asked if question.kernel == tunable.kernel)
        best, fastest = Settings(), seconds(call)
    text = launch.key_of(question.kernel, question.shape)
    line = f"{text}: {1e6 * fastest:.1f} us with {_shown(question.defaults)}"
    tried = 0
    for candidate in tunable.candidates(question.defaults, question.shape):
        with launch.trying(tunable.kernel, candidate):
            try:
                if not _agree(call(), wanted):
                    print(f"{text}: wrong results with {_shown(candidate)}", file=sys.stderr)
                    continue
                time = seconds(call)
            except Exception as error:  # Triton's many kinds: too much shared memory, too many registers, no layout
                print(f"{text}: {_shown(candidate)} does not run: {str(error).partition(chr(10))[0]}", file=sys.stderr)
                continue
        tried += 1
        if time * _GAIN < fastest:
            best, fastest = candidate, time
    print(f"{line}, {f'{1e6 * fastest:.1f} with {_shown(best)}' if best else 'the best'} of {tried + 1}", flush=True)
    return question, best


def _agree(found: Any, wanted: Any) -> bool:
    if not isinstance(found, Tensor):
        return found is None or all(_agree(one, other) for one, other in zip(found, wanted, strict=True))
    found, wanted = found.double(), wanted.double()
    return bool((found - wanted).norm() <= _AGREE * wanted.norm())  # not so where there is a NaN


def _seconds(call: Callable[[], Any]) -> float:
    """The device's time for a call, in a CUDA graph: no time of the host's is in it."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, return_mode="median")) / 1e3


def _shown(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "the defaults"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no commit"


if __name__ == "__main__":
    sys.exit(main())
