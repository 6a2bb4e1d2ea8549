"""What all measuring commands share: interleaved timing, ratios, memory, operator counts, the machine, result files.

Habits: warm up outside the clock, interleave what is compared (A B, B A, ...), report medians with 20 and 80 %
quantiles, take ratios pair by pair, and say which machine, versions and commit a figure comes from.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cxgrad_fast.checkpoints import write_atomic
from cxgrad_fast.info import package_version
from cxgrad_fast.kernels import release_buffers
from cxgrad_fast.runs import source_version

RESULTS = Path(__file__).parent / "results"

# runs once; may return the seconds it took where they are known better than from outside (another process)
Run = Callable[[], float | None]


class Dropped(Exception):
    """Raised by a side that cannot go on (its time limit, its memory); the message is the reason."""


@dataclass(frozen=True)
class Timing:
    """Samples of one quantity (seconds, or a ratio), in the order they were taken; ``note`` says what went wrong."""

    samples: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        """Of the samples; NaN without any."""
        return self._quantile(0.5)

    @property
    def p20(self) -> float:
        """The 20 % quantile, linear between samples."""
        return self._quantile(0.2)

    @property
    def p80(self) -> float:
        """The 80 % quantile, linear between samples."""
        return self._quantile(0.8)

    def _quantile(self, share: float) -> float:
        return float(np.quantile(self.samples, share)) if self.samples else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        return {
            "median": self.median,
            "p20": self.p20,
            "p80": self.p80,
            "n": len(self.samples),
            "samples": list(self.samples),
        }


def ratio(a: Timing, b: Timing) -> Timing:
    """``a / b`` pair by pair, sample i of both from the same round; ``ratio(loop, side)`` is side's speed-up."""
    return Timing(tuple(x / y for x, y in zip(a.samples, b.samples, strict=False)))


def interleave(
    sides: Mapping[str, Run],
    rounds: int,
    budget_s: float,
    *,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all sides against each other: every round runs each once, every second round in the opposite order.

    Args:
        sides: name -> what to time.
        rounds: samples a side.
        budget_s: seconds a side may spend, warm-up included. One that has spent more is dropped, after one sample at
            least, and its Timing's note says so; one that raises :class:`Dropped` keeps the samples it has.
        warm_up: runs of each side before the first round, not among the samples.
        device: a CUDA device is synchronised before the clock is read.
        clock: seconds; a test may bring its own.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    spent = dict.fromkeys(sides, 0.0)
    notes: dict[str, str] = {}

    def run(name: str) -> float | None:
        try:
            seconds = _timed(sides[name], torch.device(device), clock)
        except Dropped as reason:
            notes[name] = str(reason)
            return None
        spent[name] += seconds
        return seconds

    for _ in range(warm_up):
        for name in sides:
            if name not in notes:
                run(name)
    for index in range(rounds):
        for name in list(sides)[:: -1 if index % 2 else 1]:
            if name in notes:
                continue
            seconds = run(name)
            if seconds is not None:
                samples[name].append(seconds)
                if spent[name] > budget_s and index + 1 < rounds:
                    notes[name] = f"over its limit of {budget_s:g} s after {index + 1} of {rounds} samples"
    return {name: Timing(tuple(found), notes.get(name, "")) for name, found in samples.items()}


def _timed(run: Run, device: torch.device, clock: Callable[[], float]) -> float:
    synchronize(device)
    begin = clock()
    own = run()
    synchronize(device)
    return clock() - begin if own is None else own


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int | None:
    """Bytes that one run needs at its peak.

    On CUDA, the allocator's peak: all tensors alive, parameters and episodes among them. On a CPU, how far the
    process's resident memory rises above what it was before the run, when freed memory had been given back: it counts
    every library's buffers, but only what this run adds. Call it in a process that does nothing else; None where the
    kernel does not say.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    release_buffers()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def count_operators(run: Run, device: torch.device | str = "cpu") -> int:
    """Operator calls of one run that reach torch's dispatcher, views too; on CUDA, what reaches the device instead.

    There: kernels, copies and fills, as the profiler saw them, those inside a replayed graph too.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with _Counter() as counter:
            run()
        return counter.calls
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        synchronize(device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "triton", "numpy")},
        "cuda": torch.version.cuda,
        "commit": source_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """One line of :func:`machine` to stand above a table."""
    gpu = found["gpu"]
    parts = [
        f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads, {found['memory_gb']} GiB",
        *([f"{gpu['name']} ({gpu['power_limit_w']} W)"] if gpu else []),
        f"python {found['python']}, torch {found['torch']}",
        f"commit {found['commit'][:12]}{'-dirty' if found['commit'].endswith('-dirty') else ''}",
        found["date"],
        f"load {found['load'][0]}",
    ]
    return "; ".join(parts)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(), "power_limit_w": _ask_smi("power.limit")} | {
        "driver": _ask_smi("driver_version"),
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
    }


def _ask_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_result(
    name: str, payload: Mapping[str, Any], folder: Path = RESULTS, found: Mapping[str, Any] | None = None
) -> Path:
    """Write ``folder/<date>-<name>.json``: the payload, the machine and the command line; whole or not at all.

    Args:
        name, payload, folder: of the file.
        found: an earlier :func:`machine`, to write a result again in the place of the one that was written with it.
    """
    found = machine() if found is None else found
    stamp = found["date"].replace(":", "").replace("+0000", "")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stamp}-{name}.json"
    content = {"name": name, "machine": found, "command": shlex.join([Path(sys.executable).name, *sys.argv]), **payload}
    write_atomic(path, (json.dumps(_plain(content), indent=1) + "\n").encode())
    return path


def _plain(value: Any) -> Any:
    """``value`` with NaN and infinity as None: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
