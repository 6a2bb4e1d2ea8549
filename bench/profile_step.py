"""Where a meta-step's time goes: top kernels (CUDA) or operators (CPU), launches, and how long the device waits.

    python bench/profile_step.py [--preset NAME] [--steps 3] [--group.setting value ...]

Launches are kernels, copies and fills on CUDA, operator calls on a CPU. The device's idle share is one less the union
of its kernels' intervals over the wall time, which is taken without the profiler; a CPU is never idle by this measure.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, count_operators, machine, machine_line, synchronize, write_result
from meta_step_worker import random_episodes
from torch.profiler import ProfilerActivity, profile

from cxgrad_fast import Learner
from cxgrad_fast.cli import add_config_options, build_config, run_command, split_settings
from cxgrad_fast.engine import Pending, StaticGradients
from cxgrad_fast.kernels.conv_block import choice

SHOWN = 15


def trace(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, Any]:
    """Summary of ``steps`` calls, all figures a step; times in milliseconds."""
    for _ in range(2):
        step()
    wall = _wall(step, steps, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        traced = _wall(step, steps, device)
    if device.type == "cuda":
        events = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        rows = _by_name((event.name, event.time_range.end - event.time_range.start) for event in events)
        busy = covered([(event.time_range.start, event.time_range.end) for event in events]) / 1e6 / steps
    else:
        rows = {event.key: (event.count, event.self_cpu_time_total) for event in profiler.key_averages()}
        busy = wall
    top = sorted(rows.items(), key=lambda row: -row[1][1])[:SHOWN]
    return {
        "wall_ms": 1e3 * wall,
        "profiled_wall_ms": 1e3 * traced,
        "busy_ms": 1e3 * busy,
        "idle_share": max(0.0, 1 - busy / wall),
        "launches": count_operators(step, device),
        "top": [{"name": name, "calls": count / steps, "ms": total / 1e3 / steps} for name, (count, total) in top],
    }


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _by_name(calls: Iterable[tuple[str, float]]) -> dict[str, tuple[int, float]]:
    rows: dict[str, tuple[int, float]] = {}
    for name, length in calls:
        count, total = rows.get(name, (0, 0.0))
        rows[name] = (count + 1, total + length)
    return rows


def _wall(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds a step."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(parser)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    settings, words = split_settings(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    config = build_config(options.preset, options.config, settings)
    learner = Learner(config)
    if isinstance(learner._gradients, StaticGradients):  # the program alone, without trials
        learner._gradients = StaticGradients(learner._loss_and_gradients, trials=0)
    episodes = random_episodes(learner)
    pending: deque[Pending] = deque()

    def step() -> None:  # as in training: a captured one is started before the one ahead of it is done
        pending.append(learner.start_step(episodes))
        if len(pending) >= learner.steps_ahead:
            pending.popleft().on_host()

    found = trace(step, options.steps, learner.device)
    print(machine_line(machine()))
    print(
        f"{config.preset}, {config.outer.meta_batch} tasks: {found['wall_ms']:.1f} ms a step, "
        f"{found['launches']} launches, device idle {100 * found['idle_share']:.0f} %"
    )
    print(f"{'ms':>10} {'calls':>8}")
    for row in found["top"]:
        print(f"{row['ms']:10.3f} {row['calls']:8.1f}  {row['name'][:90]}")
    ways = os.environ.get(choice.VARIABLE, "")  # to convolve: a name, a table, or measured ones
    payload = {"config": config.flat(), "steps": options.steps, "convolution": ways, **found}
    write_result("profile", payload, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
