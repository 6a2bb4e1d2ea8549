"""Which of several ways takes a convolution on CUDA: pinned, from a table, or measured at its first use.

A table is JSON, one line a shape, like those of the launch settings (:mod:`cxgrad_fast.kernels.launch`)::

    "transpose height=42 images=25 inputs=48 ... tasks=2": {"way": "grouped", "from": "pinned: faster here"}

A key with less than a shape's words holds for all shapes that have them, ``"transpose"`` for all of a kind; of several
the longest decides. Where the tables are, the first that has an entry wins:

1. ``CXGRAD_CONVOLUTION``: the name of a way pins it everywhere, a path that ends in ``.json`` is a table;
2. ``ways/DEVICE.json`` in the cache folder, where measured choices go, with the versions of torch and triton in their
   keys: others measure anew;
3. ``sm_90_ways.json`` beside the launch tables of the repository.

Nothing is measured on CPUs, in float64 or while a CUDA graph is captured: there our own kernels take it. The choice
depends on the number of tasks and on a clock, the bits of a result on the choice: who needs them the same on another
machine pins a way. ``python -m cxgrad_fast.kernels.tune --list`` and ``--clear`` show and forget choices.
"""

from __future__ import annotations

import functools
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import backends, launch

WAYS = ("triton", "grouped", "tasks", "unfold")  # the first needs no measurement
KINDS = ("convolution", "second", "transpose", "weight_gradient")
VARIABLE = "CXGRAD_CONVOLUTION"

_WHAT = "ways to convolve"
_ROUNDS = 5
_GAIN = 1.05  # less does not change what a shape is computed by
_QUEUED = 1 << 22  # cycles, about 2 ms, in which the host enqueues what is timed
# relative difference to our own kernels: rounding never reaches it, and TF32 in the place of float32 does
_AGREE = {"tf32x3": 3e-5, "tf32": 3e-3, "bfloat16": 3e-2}

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Choice:
    """One line of a table.

    Attributes:
        key: kind and shape, :func:`cxgrad_fast.kernels.launch.key_of`'s.
        way: one of ``WAYS``.
        source: "measured on ...", with the times; or whatever a person wrote.
        file: where it stands.
    """

    key: str
    way: str
    source: str
    file: Path

    @property
    def words(self) -> frozenset[str]:
        """What a shape must have."""
        return frozenset(self.key.split())


_known: dict[tuple[Any, ...], str] = {}


def choose(kind: str, shape: launch.Shape, device: torch.device, calls: Callable[[], Mapping[str, Call]]) -> str:
    """The way for one product.

    Args:
        kind: one of ``KINDS``.
        shape: all that its time depends on; ``products`` is among it.
        device: of its tensors.
        calls: the product itself, by the name of the way that takes it: what is measured.

    Raises:
        InputError: ``CXGRAD_CONVOLUTION`` names no way, or a table that cannot be read.
    """
    named = os.environ.get(VARIABLE, "")
    if named in WAYS:
        return named
    if not named and (device.type != "cuda" or backends.interpreting()):
        return WAYS[0]
    at = (kind, device, named, *shape.values())
    if at not in _known:
        found = _looked_up(kind, shape, device)
        if found is None:
            # by what is not kept, a graph is captured with our own kernels and the next step may still measure
            if not _measurable(shape, device):
                return WAYS[0]
            found = _measured(kind, shape, device, calls())
        _known[at] = found
    return _known[at]


def pinned() -> str:
    """The way that ``CXGRAD_CONVOLUTION`` names, if it names one.

    Raises:
        InputError: it names neither a way nor a table.
    """
    named = os.environ.get(VARIABLE, "")
    if named and named not in WAYS and not named.endswith(".json"):
        raise InputError(f"{VARIABLE} takes one of {', '.join(WAYS)}, or a table's .json file, got '{named}'")
    return named if named in WAYS else ""


def _measurable(shape: launch.Shape, device: torch.device) -> bool:
    if device.type != "cuda" or backends.interpreting() or shape["products"] not in _AGREE:
        return False
    return not torch.cuda.is_current_stream_capturing()


# --- measuring ---


def _measured(kind: str, shape: launch.Shape, device: torch.device, calls: Mapping[str, Call]) -> str:
    with torch.cuda.device(device):
        times = measure(calls, _seconds, _AGREE[str(shape["products"])])
        name = torch.cuda.get_device_name(device)
    if not times:
        return WAYS[0]
    way, file = fastest(times), _file(name)
    shown = ", ".join(f"{each} {1e6 * time:.1f} us" for each, time in times.items())
    if file is not None:
        remember(Choice(launch.key_of(kind, {**shape, **_versions()}), way, f"measured on {name}: {shown}", file))
    return way


def measure(calls: Mapping[str, Call], seconds: Callable[[Call], float], agree: float) -> dict[str, float]:
    """Median time of each way, the rounds alternating; those that do not run, or differ from the first, are left out.

    Nothing is timed where the first gives what is not a number: it would agree with nothing.

    Args:
        calls: by name, the first is right.
        seconds: times a call.
        agree: the largest relative difference.
    """
    wanted: Tensor | None = None
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        try:
            found = call().double()
        except RuntimeError:  # no algorithm, no memory, refused by use_deterministic_algorithms
            if wanted is None:
                raise
            continue
        if wanted is None:
            wanted = found
            if not wanted.isfinite().all():
                return {}
        elif not (found - wanted).norm() <= agree * wanted.norm():
            continue
        samples[name] = []
        seconds(call)
    for _ in range(_ROUNDS):
        for name, times in samples.items():
            times.append(seconds(calls[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def fastest(times: Mapping[str, float]) -> str:
    """The way that wins; the first unless another is clearly faster."""
    first = next(iter(times))
    best = min(times, key=times.__getitem__)
    return best if times[best] * _GAIN < times[first] else first


def _seconds(call: Call) -> float:
    """The device's time for a call: the host enqueues it while the device waits."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUED)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# --- tables ---


def _looked_up(kind: str, shape: launch.Shape, device: torch.device) -> str | None:
    words = set(launch.key_of(kind, {**shape, **_versions()}).split())
    for file in files(device):
        fitting = [choice for choice in _table(file) if choice.words <= words]
        if fitting:
            return max(fitting, key=lambda choice: len(choice.words)).way
    return None


def files(device: torch.device | None = None) -> list[Path]:
    """The tables for a device, the first wins; without one, all that there are."""
    pinned()
    named = os.environ.get(VARIABLE, "")
    found = [Path(named)] if named.endswith(".json") else []
    if device is None:
        return found + user_files() + sorted(launch.REPOSITORY.glob("*_ways.json"))
    if device.type != "cuda":
        return found
    shipped = launch.REPOSITORY / f"{launch.architecture()}_ways.json"
    usual = (_file(torch.cuda.get_device_name(device)), shipped)
    return found + [file for file in usual if file and os.path.exists(file)]  # not in a folder that cannot be entered


def user_files() -> list[Path]:
    """The user's tables, of every device."""
    folder = _folder()
    return sorted(folder.glob("*.json")) if folder else []


def _folder() -> Path | None:
    cache = cache_folder()
    return None if cache is None else cache / "ways"


def _file(device_name: str) -> Path | None:
    """The user's table for a kind of device; None where the machine names no home."""
    folder = _folder()
    return None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', device_name)}.json"


@functools.cache
def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": metadata.version("triton")}


@functools.cache
def _table(file: Path) -> list[Choice]:
    return read(file)


def read(file: Path) -> list[Choice]:
    """The choices of a table.

    Raises:
        InputError: the file cannot be read, another user owns or can write it, or it has a line that is no choice.
    """
    return [_choice(file, key, fields) for key, fields in launch.read_lines(file, _WHAT).items()]


def _choice(file: Path, key: str, fields: Any) -> Choice:
    launch.check_line(file, key, fields, _WHAT)
    if (kind := key.split()[0]) not in KINDS:
        raise InputError(f"{_WHAT} '{file}': '{key}' must begin with one of {', '.join(KINDS)}, got '{kind}'")
    if (way := fields.get("way")) not in WAYS:
        raise InputError(f"{_WHAT} '{file}': the way of '{key}' must be one of {', '.join(WAYS)}, got {way!r}")
    return Choice(key, way, fields[launch.SOURCE], file)


def write(file: Path, choices: Iterable[Choice]) -> None:
    """Write a table: one line a choice, in order, all of them or none.

    Raises:
        InputError: it cannot be written.
    """
    lines = {choice.key: {"way": choice.way, launch.SOURCE: choice.source} for choice in choices}
    launch.write_lines(file, lines, _WHAT)


def remember(choice: Choice) -> None:
    """Add to a table what was measured; where it cannot be written, this process alone knows."""
    try:
        there = read(choice.file) if os.path.exists(choice.file) else []
        write(choice.file, [*(other for other in there if other.key != choice.key), choice])
    except InputError:
        return
    _table.cache_clear()


def forget() -> Iterator[Path]:
    """Remove the user's tables, of every device; the files that were removed.

    Raises:
        InputError: one cannot be removed.
    """
    for file in user_files():
        launch.remove(file, _WHAT)
        yield file
    reload()


def forget_measured() -> Iterator[Path]:
    """Remove what was measured, and keep what a person wrote; the files that had any."""
    for file in user_files():
        choices = read(file)
        kept = [choice for choice in choices if not choice.source.startswith("measured")]
        if len(kept) < len(choices):
            write(file, kept)
            yield file
    reload()


def reload() -> None:
    """Read the tables again at the next product."""
    _known.clear()
    _table.cache_clear()


# --- for people ---


def report() -> list[str]:
    """What is known about this machine's choices, a line each."""
    try:
        return _report()
    except InputError as error:
        return [str(error)]


def _report() -> list[str]:
    if name := pinned():
        return [f"{name} for every product, by {VARIABLE}"]
    if not torch.cuda.is_available():
        return [f"{', '.join(WAYS)}: measured at first use on a CUDA device"]
    device = torch.device("cuda", torch.cuda.current_device())
    versions = {f"{name}={version}" for name, version in _versions().items()}
    lines = []
    for file in files(device):
        for choice in read(file):
            words = choice.key.split()
            others = {word for word in words if word.startswith(("torch=", "triton="))} - versions
            if not others:
                shape = " ".join(word for word in words if word not in versions)
                lines.append(f"{shape}: {choice.way} ({choice.source.partition(': ')[2] or choice.source})")
    return lines or [f"{', '.join(WAYS)}: nothing measured yet on {torch.cuda.get_device_name(device)}"]
