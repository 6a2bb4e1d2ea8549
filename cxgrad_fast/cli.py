"""What the commands share: settings from the command line, errors as one line with exit code 2, progress."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch

from cxgrad_fast.config import ALGORITHMS, PRESETS, Config, InnerConfig, InputError, all_settings, from_toml, preset
from cxgrad_fast.config.fields import settings_of
from cxgrad_fast.engine.memory import is_out_of_memory
from cxgrad_fast.near_words import advice
from cxgrad_fast.printable import one_line, shown

DEFAULT_PRESET = "glyphs-5w1s"

# of the names of presets -> what they are; without an algorithm in its name a preset is CxGrad's
PRESET_PATTERNS = {
    "glyphs-5w{1,5}s": "drawn letters, 5-way, 1 or 5 shots; minutes on two cores",
    "glyphs-ALGORITHM-5w{1,5}s": "the same with another algorithm",
    "released-{mini,tiered}-5w{1,5}s": "what the program does that the authors of CxGrad released",
    "released-ALGORITHM-{mini,tiered}-5w{1,5}s": "what the released program of another algorithm does",
    "paper-{mini,tiered}-5w{1,5}s": "CxGrad where the paper's text differs from its program",
}


class Parser(argparse.ArgumentParser):
    """An argument parser for ``python -m cxgrad_fast.<command>`` that also takes every setting as ``--group.field``.

    Its errors are InputErrors: one line, not a page of usage.

    Args:
        command: its name.
        description: for ``--help``.
        defaults: the Config whose settings ``--help`` lists; None for a command that takes none.
    """

    def __init__(self, command: str, description: str, defaults: Config | None = None) -> None:
        super().__init__(
            prog=f"python -m cxgrad_fast.{command}",
            description=description,
            epilog=_settings_help(defaults) if defaults else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._settings = [] if defaults is None else list(all_settings())

    def error(self, message: str) -> NoReturn:
        raise InputError(one_line(message, 300))

    def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, object]]:
        """The command's own options, and the settings among the words as ``{dotted name: text}``.

        Raises:
            InputError: an unknown option (with the nearest known one) or one without its value. Unknown settings are
                found where they meet a Config.
        """
        settings, rest = split_settings(sys.argv[1:] if argv is None else argv)
        options, unknown = self.parse_known_args(rest)
        if unknown:
            self._refuse(unknown[0])
        return options, settings

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("-"):
            self.error(f"unexpected word {shown(word)}: options start with --, see --help")
        name = word.partition("=")[0]
        options = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown option {shown(name)}: {advice(name, self._settings, options)}")


def split_settings(argv: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Settings (``--task.shots 5``, ``--task.shots=5``) as ``{dotted name: text}``, and the other words in order.

    Raises:
        InputError: a setting without a value.
    """
    settings: dict[str, object] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
            continue
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise InputError(f"setting {shown(name[2:])} needs a value: {one_line(name, 100)} VALUE")
        settings[name[2:]] = value
    return settings, rest


def build_config(
    name: str | None, file: str | None, settings: dict[str, object], default: str = DEFAULT_PRESET
) -> Config:
    """The Config of a preset, a TOML file and the command line; each wins over the one before it.

    Args:
        name: of the preset; None: the file's ``preset``, else ``default``.
        file: path of a TOML file, or None.
        settings: from the command line.

    Raises:
        InputError: a file that cannot be read, an unknown preset or setting, a bad value.
    """
    from_file = from_toml(file) if file is not None else {}
    stated = from_file.pop("preset", default)
    if not isinstance(stated, str):
        raise InputError(f"'preset' in the settings file '{file}' must be text, got {shown(stated)}")
    return preset(stated if name is None else name, from_file, settings)


def add_config_options(parser: argparse.ArgumentParser, default: str = DEFAULT_PRESET) -> None:
    """The two options every command that builds a Config has; ``default`` is the preset."""
    parser.add_argument("--preset", metavar="NAME", help=f"settings to start from, see below (default: {default})")
    parser.add_argument("--config", metavar="FILE", help="settings in a TOML file; the command line wins over it")
    parser.epilog = "\n\n".join(filter(None, [presets_help(), parser.epilog]))


def presets_help() -> str:
    """The names of all presets, as patterns: ``{1,5}`` stands for 1 or 5, ``ALGORITHM`` for each that is listed."""
    algorithms = [name for name in ALGORITHMS if f"glyphs-{name}-5w1s" in PRESETS]
    lines = [f"presets (one file each in {next(iter(PRESETS.values())).parent}, with the sources of its values):"]
    lines += [f"  {pattern:<42}  {meaning}" for pattern, meaning in PRESET_PATTERNS.items()]
    return "\n".join([*lines, f"  ALGORITHM is one of {', '.join(algorithms)}"])


def _settings_help(config: Config) -> str:
    lines = [f"settings, here as in preset {config.preset} (a run that is named brings its own):"]
    for group in dataclasses.fields(config):
        if group.name == "preset":
            continue
        lines.append("")
        values = getattr(config, group.name)
        for spec in settings_of(values):
            value = getattr(values, spec.name)
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            choices = tuple(ALGORITHMS) if spec.name == "algorithm" else spec.metadata.get("choices")
            note = f"   ({' | '.join(map(str, filter(lambda c: c != '', choices)))})" if choices else ""
            lines.append(f"  --{group.name}.{spec.name} {shown}{note}")
        if group.name == "inner":
            lines += _other_algorithms(values)
    return "\n".join(lines)


def _other_algorithms(inner: InnerConfig) -> list[str]:
    """A line for each algorithm that has settings which the one shown does not have."""
    shown = {spec.name for spec in settings_of(inner)}
    lines = []
    for name, kind in ALGORITHMS.items():
        own = [f"--inner.{spec.name} {spec.default}" for spec in settings_of(kind) if spec.name not in shown]
        if own:
            lines.append(f"  with --inner.algorithm {name} also: {' '.join(own)}")
    return lines


def run_command(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """``main(argv)``'s exit code; what the user or the system is at fault for is ``error: <one line>`` on stderr and 2.

    That is bad input, every error of the operating system, and memory that is full.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be more than the terminal can show
    try:
        code = main(argv)
        _flush_output()  # here, where a full disk behind it is told in words
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of `... | head` has had enough
        _drop_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        message = _explain(error)
        if not message:
            raise
    try:
        _flush_output()
    except OSError:
        _drop_output()
    print("error:", one_line(message), file=sys.stderr)
    return 2


def _explain(error: Exception) -> str:
    """The error in words for the user; empty for a fault of this program, which keeps its traceback."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the device's memory is full: try --run.tasks_per_chunk 1, --run.recompute true or fewer tasks"
    if is_out_of_memory(error):
        asked = re.search(r"to allocate ([\d.]+ \w+)", str(error))
        return (
            f"memory is full{f' ({asked[1]} more were asked for)' if asked else ''}: try --run.tasks_per_chunk 1, "
            "--run.recompute true, fewer tasks (outer.meta_batch, evaluation.tasks_per_batch) or a smaller model"
        )
    return _explain_system(error) if isinstance(error, OSError) else ""


def _explain_system(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    is_named = isinstance(error.filename, str | bytes)
    if not (is_named and os.path.isabs(error.filename)) and not _has_working_folder():
        return f"the working directory was removed ({reason}): change to one that exists"
    place = f" '{os.fsdecode(error.filename)}'" if is_named else ""
    message = f"cannot write or read{place}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        message += " (free some space; the checkpoints written before are whole)"
    return message


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _flush_output() -> None:
    if sys.stdout is not None:  # closed by whoever started this
        sys.stdout.flush()


def _drop_output() -> None:
    """What stdout still holds cannot be written: without this the interpreter would fail on it at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """How far a long job is, on stderr: a tqdm bar on a terminal, elsewhere a plain line every ``every`` seconds.

    Args:
        label: what is counted, e.g. ``training``.
        total: when it is done.
        done: where it starts (a resumed run).
        every: seconds between plain lines.
        clock: seconds; a test may bring its own.
        is_shown: False for the ranks that leave it to another to tell.
    """

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        every: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
        is_shown: bool = True,
    ) -> None:
        self._is_shown = is_shown
        self._label, self._total, self._start, self._every, self._clock = label, total, done, every, clock
        self._began = self._last = clock()
        self._bar: Any = None
        if is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(desc=label, total=total, initial=done, bar_format=layout, dynamic_ncols=True, leave=False)

    def update(self, done: int, shown: str = "") -> None:
        """``done`` of ``total`` are done; ``shown`` is added to the line."""
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if self._is_shown and now - self._last >= self._every:
            self._last = now
            left = (self._total - done) * (now - self._began) / max(done - self._start, 1)
            parts = [f"{self._label} {done}/{self._total}", shown, f"{clock_time(left)} remaining"]
            print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line on stdout that stays, without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def clock_time(seconds: float) -> str:
    """``83.2`` -> ``1:23``; ``3723`` -> ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
