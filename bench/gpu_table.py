"""Episodes per second of our meta-step over the configs a GPU is judged by, with memory and fraction of the limit.

    python bench/gpu_table.py [--size full|small|tiny] [--seconds 3] [--out FOLDER]

``full``: Conv-4/48 5w1s with 4 tasks, 5w5s with 2, 4 and 16, ResNet-12, each in every precision that the learner has,
with and without ``--compile``, and on CUDA the largest meta-batch of 5w5s that fits; float64, which is for checks, is
last. ``small`` and ``tiny`` are for CPUs and for tests. Steps follow each other as in training, where a captured one is
started before the one ahead of it is done. The result file is written after every row: a run that is cut off leaves
what it has. A row that cannot run keeps its place and says why; where that is an error, and not a device or a mode that
is not there, the exit code is 1. Against other programs: bench/episodes.py.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Timing, interleave, machine, machine_line, peak_memory, synchronize, write_result
from meta_step_worker import random_episodes
from peaks import DTYPES, peaks_for
from roofline import step_cost, time_floor

from cxgrad_fast import Episodes, InputError, Learner, preset
from cxgrad_fast.cli import run_command
from cxgrad_fast.engine import Pending

STEPS = {"full": 10, "small": 3, "tiny": 1}  # of a sample
PRECISIONS = (*(name for name in DTYPES if name != "float64"), "float64")
RESNET: dict[str, object] = {"model.backbone": "resnet12", "model.filters": 64}
TINY: dict[str, object] = {"model.filters": 4, "model.image_size": 16, "task.queries": 2, "inner.steps": 1}


@dataclass(frozen=True)
class Row:
    """One config of the table."""

    name: str
    preset: str
    tasks: int
    overrides: tuple[tuple[str, object], ...] = ()


def _row(name: str, of: str, tasks: int, overrides: dict[str, object] | None = None) -> Row:
    return Row(name, of, tasks, tuple((overrides or {}).items()))


LARGEST = _row("Conv-4/48 5w5s, largest", "released-mini-5w5s", 0)
ROWS = {
    "full": [
        _row("Conv-4/48 5w1s", "released-mini-5w1s", 4),
        _row("Conv-4/48 5w5s", "released-mini-5w5s", 2),
        _row("Conv-4/48 5w5s", "released-mini-5w5s", 4),
        _row("Conv-4/48 5w5s", "released-mini-5w5s", 16),
        _row("ResNet-12/64 5w1s", "released-mini-5w1s", 2, RESNET),
    ],
    "small": [
        _row("Conv-4/32 5w1s 28x28", "glyphs-5w1s", 2),
        _row("Conv-4/32 5w5s 28x28", "glyphs-5w5s", 2),
    ],
    "tiny": [
        _row("Conv-4/4 5w1s 16x16", "glyphs-5w1s", 1, TINY),
        _row("ResNet-12/4 5w1s 16x16", "glyphs-5w1s", 1, TINY | {"model.backbone": "resnet12"}),
    ],
}


def training(learner: Learner, episodes: Episodes, steps: int) -> Callable[[], float]:
    """Does so many meta-steps as training does, ``learner.steps_ahead`` under way at once; returns seconds a step."""

    def run() -> float:
        synchronize(learner.device)
        began, pending = time.perf_counter(), deque[Pending]()
        for _ in range(steps):
            pending.append(learner.start_step(episodes))
            if len(pending) >= learner.steps_ahead:
                pending.popleft().on_host()
        while pending:
            pending.popleft().on_host()
        return (time.perf_counter() - began) / steps

    return run


def measured(row: Row, precision: str, seconds: float, steps: int, is_compiled: bool = False) -> dict[str, Any]:
    """Figures of one row, or ``why_not``."""
    overrides = {"outer.meta_batch": row.tasks, "run.precision": precision, "run.compile": is_compiled}
    config = preset(row.preset, overrides | dict(row.overrides))
    found: dict[str, Any] = {"row": row.name, "tasks": row.tasks, "precision": precision, "compiled": is_compiled}
    found |= {"steps": steps, "config": config.flat()}
    try:
        learner = Learner(config)
        episodes = random_episodes(learner)
        memory = peak_memory(lambda: learner.meta_step(episodes), learner.device)
        for _ in range(8 if is_compiled else 2):
            learner.meta_step(episodes)
        sample = training(learner, episodes, steps)
        budget = seconds / steps  # a sample counts as what it returns, one step
        timing = interleave({"ours": sample}, 50, budget, warm_up=1, device=learner.device)["ours"]
    except (InputError, torch.OutOfMemoryError) as error:
        return found | {"why_not": _one_line(error)}
    except Exception as error:  # the other rows may run
        traceback.print_exc()
        return found | {"why_not": _one_line(error), "failed": True}
    floor = time_floor(step_cost(config), peaks_for(precision, learner.device))
    rate = Timing(tuple(row.tasks / sample for sample in timing.samples))
    return found | {
        "episodes_per_s": rate.as_dict(),
        "peak_memory_bytes": memory,
        "limit_episodes_per_s": row.tasks / floor,
        "fraction_of_limit": rate.median * floor / row.tasks,
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def largest(seconds: float, done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest float32 meta-batch of 5w5s that fits, from the memory that the two measured ones took."""
    pairs = sorted(
        (entry["tasks"], entry["peak_memory_bytes"])
        for entry in done
        if (entry["row"], entry["precision"], entry["compiled"]) == ("Conv-4/48 5w5s", "float32", False)
        and "why_not" not in entry
    )
    if len(pairs) < 2:
        row = {"row": LARGEST.name, "tasks": 0, "precision": "float32", "compiled": True}
        return row | {"why_not": "its size follows from two meta-batches of 5w5s, which were not measured"}
    (few, small), (many, big) = pairs[0], pairs[-1]
    tasks = many + int((torch.cuda.mem_get_info()[1] - big) * (many - few) / (big - small))
    while True:
        found = measured(replace(LARGEST, tasks=tasks), "float32", seconds, STEPS["full"], is_compiled=True)
        torch.cuda.empty_cache()
        if "why_not" not in found or tasks <= many:
            return found
        tasks = int(0.9 * tasks)


def rows(size: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The table's rows, one after the other."""
    done = []
    for precision in PRECISIONS:
        if precision == "float64" and size == "full" and torch.cuda.is_available():
            yield largest(seconds, done)
        for row in ROWS[size]:
            for is_compiled in (False, True):
                done.append(measured(row, precision, seconds, STEPS[size], is_compiled))
                yield done[-1]


def line(found: dict[str, Any]) -> str:
    way = "compiled" if found["compiled"] else ""
    head = f"{found['row']:<26} {found['tasks']:5} {found['precision']:<9} {way:<9}"
    if "why_not" in found:
        return f"{head} not measured: {found['why_not']}"
    rate, memory = found["episodes_per_s"], found["peak_memory_bytes"]
    return (
        f"{head} {rate['median']:9.2f} ({rate['p20']:.2f} to {rate['p80']:.2f}) {(memory or 0) / 1e6:9.0f} "
        f"{found['limit_episodes_per_s']:9.1f} {100 * found['fraction_of_limit']:6.1f} %"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(ROWS), default="full")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing a row")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    here = machine()
    print(machine_line(here))
    print(f"{'':<26} tasks precision            episodes/s (20-80 %)  peak MB  limit  of it", flush=True)
    done: list[dict[str, Any]] = []
    for found in rows(options.size, options.seconds):
        done.append(found)
        print(line(found), flush=True)
        write_result("gpu-table", {"rows": done}, options.out, here)
    return 1 if any(found.get("failed") for found in done) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
