"""Launch settings of the Triton kernels: their defaults, unless a table knows better for this device and shape.

A table is a JSON file of one architecture, one line an entry::

    "conv_block_convolve count=8820 inputs=48 outputs=48 products=tf32x3": {"BLOCK_M": 64, "from": "measured on ..."}

An entry without a shape holds for all shapes that have no entry of their own. Of several files the first that has one
decides: the one that ``CXGRAD_LAUNCH`` names, the user's (``launch/sm_90.json`` in the cache folder), the repository's
(``kernels/launch_tables``). ``python -m cxgrad_fast.kernels.tune`` lists, measures and clears entries; those whose
``from`` begins with "pinned" it leaves alone. A table that another user owns or can write is refused.

A kernel's file asks :func:`settings` before every launch, and may declare the kernel a :func:`tunable`.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.config import InputError
from cxgrad_fast.files import check_folder, open_regular, own_folder, read_own, write_whole
from cxgrad_fast.kernels import backends

ARCHITECTURES = ("sm_80", "sm_90")  # of compute capability 8.x and 9.x
REPOSITORY = Path(__file__).parent / "launch_tables"
SOURCE = "from"  # the field of an entry that is no setting

# Triton's option of every launch: a product and a sum that follows it are one instruction. Up to Triton 3.9 this is the
# default, which warns where a launch does not say so; from 3.10 on it is not
FUSED = {"enable_fp_fusion": True}

_OPTIONS = {"num_warps", "num_stages", "maxnreg"}  # Triton's own: every kernel takes them
_PRECISIONS = {"float32": "tf32x3", "tf32": "tf32", "bfloat16": "ieee"}  # of products of float32 values
_WHAT = "launch settings"  # what a table has, in its errors
_INTERPRETED = backends.interpreting()

Settings = dict[str, int]
Shape = Mapping[str, int | str]


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        key: kernel and shape, :func:`key_of`'s.
        settings: block sizes and Triton's options, by name.
        source: where they came from: "predicted from machine code, ...", "measured on ...", "pinned ...".
        file: where they stand.
    """

    key: str
    settings: Settings
    source: str
    file: Path

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.key.partition(" ")[0]

    @property
    def pinned(self) -> bool:
        """Whether measuring leaves it alone."""
        return self.source.startswith("pinned")


@dataclass(frozen=True)
class Question:
    """One call of :func:`settings`."""

    kernel: str
    shape: Shape
    defaults: Settings


_named: ContextVar[str | None] = ContextVar("cxgrad_architecture", default=None)
_asked: ContextVar[list[Question] | None] = ContextVar("cxgrad_launch_questions", default=None)
_tried: ContextVar[dict[str, Settings] | None] = ContextVar("cxgrad_launch_trial", default=None)


def divide(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def input_precision(precision: str, dtype: torch.dtype) -> str:
    """What ``tl.dot`` is told for tensors of a type: float64 is always multiplied as such, bfloat16 has no other way.

    Raises:
        InputError: unknown precision.
    """
    if precision not in _PRECISIONS:
        raise InputError(f"precision takes one of {', '.join(_PRECISIONS)}, got '{precision}'")
    return _PRECISIONS[precision] if dtype == torch.float32 else "ieee"


def settings(kernel: str, defaults: Settings, **shape: int | str) -> Settings:
    """Block sizes and Triton's options for one launch.

    Args:
        kernel: its name in the tables.
        defaults: all its settings, used where no table has an entry for this device, kernel and shape.
        shape: what the best settings depend on.

    Raises:
        InputError: a table that cannot be read, or an entry that sets what the kernel does not have.
    """
    if (asked := _asked.get()) is not None:
        asked.append(Question(kernel, shape, defaults))
    if (tried := _tried.get()) is not None and kernel in tried:
        return defaults | tried[kernel]
    here = architecture()
    if here is None or not (entries := _table(here).get(kernel)):
        return defaults
    entry = entries.get(key_of(kernel, shape)) or entries.get(kernel)
    if entry is None:
        return defaults
    if unknown := entry.settings.keys() - defaults.keys() - _OPTIONS:
        known = ", ".join(sorted(defaults.keys() | _OPTIONS))
        raise InputError(f"{entry.file}: '{entry.key}' sets {', '.join(sorted(unknown))}; {kernel} has {known}")
    return defaults | entry.settings


def architecture() -> str | None:
    """That of :func:`on_architecture`, else of the current CUDA device; None where no table is for it."""
    if (named := _named.get()) is not None:
        return named
    if _INTERPRETED or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return None
    return _architecture_of(torch.cuda.current_device())


@functools.cache
def _architecture_of(device: int) -> str | None:
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major)


@contextmanager
def on_architecture(name: str) -> Iterator[None]:
    """Ask for settings in this block as if the device were of an architecture, "sm_80" or "sm_90"."""
    if name not in ARCHITECTURES:
        raise InputError(f"architecture takes one of {', '.join(ARCHITECTURES)}, got '{name}'")
    token = _named.set(name)
    try:
        yield
    finally:
        _named.reset(token)


@contextmanager
def recording() -> Iterator[list[Question]]:
    """The questions that are asked in this block."""
    asked: list[Question] = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


@contextmanager
def trying(kernel: str, candidate: Settings) -> Iterator[None]:
    """Launch a kernel with a candidate's settings in this block, whatever the tables say."""
    token = _tried.set((_tried.get() or {}) | {kernel: candidate})
    try:
        yield
    finally:
        _tried.reset(token)


# --- tables ---


def key_of(kernel: str, shape: Shape) -> str:
    """Kernel and shape as an entry's key."""
    return " ".join([kernel, *sorted(f"{name}={value}" for name, value in shape.items())])


def files(architecture: str) -> list[Path]:
    """The tables for an architecture, the first wins; those that nobody has written are left out."""
    named = os.environ.get("CXGRAD_LAUNCH")
    found = [Path(named)] if named else []
    usual = (user_file(architecture), REPOSITORY / f"{architecture}.json")
    return found + [path for path in usual if path and os.path.exists(path)]  # not in a folder that cannot be entered


def user_file(architecture: str) -> Path | None:
    """The user's table; None where the machine names no home."""
    cache = cache_folder()
    return None if cache is None else cache / "launch" / f"{architecture}.json"


def reload() -> None:
    """Read the tables again at the next question."""
    _table.cache_clear()


@functools.cache
def _table(architecture: str) -> dict[str, dict[str, Entry]]:
    """All entries that hold, by kernel and key."""
    table: dict[str, dict[str, Entry]] = {}
    for file in reversed(files(architecture)):
        for entry in read(file):
            table.setdefault(entry.kernel, {})[entry.key] = entry
    return table


def read(file: Path) -> list[Entry]:
    """The entries of a table.

    Raises:
        InputError: the file cannot be read, another user owns or can write it, or it has a line that is no entry.
    """
    return [_entry(file, key, fields) for key, fields in read_lines(file).items()]


def read_lines(file: Path, what: str = _WHAT) -> dict[str, Any]:
    """A table's lines by their keys, not looked at yet.

    Raises:
        InputError: the file cannot be read, another user owns or can write it, or it is no JSON object.
    """
    try:
        lines = json.loads(_content(file))
    except OSError as error:
        raise InputError(f"{what} '{file}': {error.strerror or error}") from error
    except RecursionError as error:
        raise InputError(f"{what} '{file}' are nested too deep") from error
    except ValueError as error:
        raise InputError(f"{what} '{file}' are no JSON: {error}") from error
    if not isinstance(lines, dict):
        raise InputError(f"{what} '{file}' must be an object of entries, got {type(lines).__name__}")
    return lines


def _content(file: Path) -> bytes:
    """What a table holds.

    Raises:
        OSError: it cannot be read, or another user owns or can write it; the repository's has who installed it.
    """
    if file.is_relative_to(REPOSITORY):
        with open_regular(file) as opened:
            return opened.read()
    folders = _cache_folders(file)
    for folder in folders:
        check_folder(folder)
    return read_own(file, follow=not folders)


def _cache_folders(file: Path) -> list[Path]:
    """The folders of the cache that a table is in, the outer first; none for one that a person has put elsewhere."""
    cache = cache_folder()
    return [cache, file.parent] if cache is not None and file.is_relative_to(cache) else []


def check_line(file: Path, key: str, fields: Any, what: str = _WHAT) -> None:
    """What every line of a table has: a key of a name and a shape's words, and fields that say where they come from.

    Raises:
        InputError: it has not.
    """
    name, *shape = key.split() or [""]
    if not name or not all(name and value for name, _, value in (word.partition("=") for word in shape)):
        raise InputError(f"{what} '{file}': the key '{key}' is not 'KERNEL name=value ...'")
    if not isinstance(fields, dict) or not isinstance(fields.get(SOURCE), str):
        raise InputError(f"{what} '{file}': '{key}' must say with \"{SOURCE}\" where it comes from")


def _entry(file: Path, key: str, fields: Any) -> Entry:
    check_line(file, key, fields)
    kernel, *shape = key.split()
    numbers = {name: value for name, value in fields.items() if name != SOURCE}
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise InputError(f"launch settings '{file}': {name} of '{key}' must be a whole number above 0, got {value}")
    return Entry(" ".join([kernel, *sorted(shape)]), numbers, fields[SOURCE], file)


def write(file: Path, entries: Iterable[Entry]) -> None:
    """Write a table: one line an entry, in order, all of them or none.

    Raises:
        InputError: it cannot be written.
    """
    write_lines(file, {entry.key: {**entry.settings, SOURCE: entry.source} for entry in entries})


def write_lines(file: Path, lines: Mapping[str, Any], what: str = _WHAT) -> None:
    """The same of any lines, by their keys.

    Raises:
        InputError: it cannot be written.
    """
    written = [f" {json.dumps(key)}: {json.dumps(fields)}" for key, fields in lines.items()]
    text = "\n".join(["{", ",\n".join(sorted(written)), "}", ""]) if written else "{}\n"
    try:
        for folder in _cache_folders(file):
            own_folder(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda opened: opened.write(text.encode()), mode=0o644)
    except OSError as error:
        raise InputError(f"{what} '{file}' cannot be written: {error.strerror or error}") from error


def remove(file: Path, what: str = _WHAT) -> None:
    """Remove a table.

    Raises:
        InputError: it cannot be removed.
    """
    try:
        file.unlink()
    except OSError as error:
        raise InputError(f"{what} '{file}' cannot be removed: {error.strerror or error}") from error


# --- what can be measured ---


@dataclass(frozen=True)
class Tunable:
    """A kernel whose settings can be measured.

    Attributes:
        kernel: its name in the tables.
        candidates: (its defaults for a shape, that shape) -> settings to try.
        examples: keyword arguments of ``example``, one set a production shape.
        example: makes arguments on the current CUDA device, and returns a call that launches the kernel with them and
            returns its results.
    """

    kernel: str
    candidates: Callable[[Settings, Shape], Iterable[Settings]]
    examples: Sequence[Mapping[str, Any]]
    example: Callable[..., Callable[[], Any]]


TUNABLES: dict[str, Tunable] = {}


def tunable(
    kernel: str,
    *,
    candidates: Callable[[Settings, Shape], Iterable[Settings]],
    examples: Sequence[Mapping[str, Any]],
) -> Callable[[Callable[..., Callable[[], Any]]], Callable[..., Callable[[], Any]]]:
    """Declare a kernel a :class:`Tunable`, over the function that makes an example of it.

    ::

        @launch.tunable("double", candidates=lambda defaults, shape: [{"BLOCK": 256}], examples=[{"count": 9}])
        def _example(count):
            x = torch.randn(count, device="cuda")
            return lambda: double(x)  # which asks settings("double", ...) and launches the kernel with the answer
    """

    def declare(example: Callable[..., Callable[[], Any]]) -> Callable[..., Callable[[], Any]]:
        TUNABLES[kernel] = Tunable(kernel, candidates, examples, example)
        return example

    return declare
