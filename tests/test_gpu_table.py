"""bench/gpu_table.py: the order of its rows, what a run that is cut off leaves, how it times steps, and on what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import equal_work
import gpu_table
import isolated
import meta_step_worker
import pytest
import torch
from helpers import config_of
from meta_step_worker import random_episodes

from cxgrad_fast import Config, Episodes, InputError, Learner
from cxgrad_fast.cli import run_command
from cxgrad_fast.engine.captured import Waits


def table(out: Path) -> list[dict[str, Any]]:
    (file,) = out.glob("*-gpu-table.json")
    return json.loads(file.read_text())["rows"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Makes the row of a number end in an error; the others have no figures."""
    plan: dict[int, BaseException] = {}
    count = iter(range(1000))

    def build(config: Any) -> None:
        raise plan.get(next(count), InputError("not here"))

    monkeypatch.setattr(gpu_table, "Learner", build)
    return plan.__setitem__


def test_float64_is_last(tmp_path: Path, measured: Any) -> None:
    assert run_command(gpu_table.main, ["--size", "tiny", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path)
    assert len(rows) == 2 * 2 * 4
    order = list(dict.fromkeys(row["precision"] for row in rows))
    assert order == ["float32", "tf32", "bfloat16", "float64"]
    assert {row["why_not"] for row in rows} == {"not here"}


def test_a_run_that_is_cut_off_leaves_the_rows_it_has(tmp_path: Path, measured: Any) -> None:
    measured(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        gpu_table.main(["--size", "tiny", "--out", str(tmp_path)])
    assert len(table(tmp_path)) == 3


def test_a_row_that_fails_does_not_stop_the_rest(tmp_path: Path, measured: Any, capsys: Any) -> None:
    measured(1, RuntimeError("an illegal memory\naccess"))
    assert run_command(gpu_table.main, ["--size", "tiny", "--out", str(tmp_path)]) == 1
    rows = table(tmp_path)
    assert len(rows) == 16
    assert [row["why_not"] for row in rows if "failed" in row] == ["an illegal memory access"]
    assert "RuntimeError: an illegal memory" in capsys.readouterr().err


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_steps_follow_each_other_as_in_training(ahead: int) -> None:
    log: list[str] = []

    def start_step(episodes: Any) -> Any:
        number = sum(word.startswith("start") for word in log)
        log.append(f"start {number}")
        return SimpleNamespace(on_host=lambda: log.append(f"end {number}"))

    learner: Any = SimpleNamespace(steps_ahead=ahead, start_step=start_step, device=torch.device("cpu"))
    assert gpu_table.training(learner, None, 5)() > 0
    assert [word for word in log if word.startswith("end")] == [f"end {number}" for number in range(5)]
    under_way = [sum(1 if word.startswith("start") else -1 for word in log[: end + 1]) for end in range(10)]
    assert max(under_way) == ahead
    assert under_way[-1] == 0


def test_the_largest_needs_two_measured_sizes() -> None:
    row = {"row": "Conv-4/48 5w5s", "precision": "float32", "compiled": False}
    one = row | {"tasks": 2, "peak_memory_bytes": 10}
    for done in ([], [one], [one, row | {"tasks": 4, "why_not": "no memory"}]):
        assert "not measured: its size follows from two" in gpu_table.line(gpu_table.largest(1.0, done))


@pytest.mark.slow
def test_a_table_of_real_steps(tmp_path: Path) -> None:
    row = gpu_table.ROWS["tiny"][0]
    found = gpu_table.measured(row, "float64", 0.1, steps=2)
    assert found["episodes_per_s"]["median"] > 0
    assert found["steps"] == 2


# --- the episodes of all benches ---


def episodes_in_a_process_of_its_own(config: Config) -> Episodes:
    """What a side is built on there (bench/isolated.py)."""
    case = equal_work.make_case(config)
    sets = {name: tensor.numpy() for name, tensor in vars(case.episodes).items() if isinstance(tensor, torch.Tensor)}
    side: Any = SimpleNamespace(build=lambda config, episodes, parameters: episodes)
    return isolated._perform(side, "build", [config, sets, {}])


@pytest.mark.parametrize(
    "make",
    [
        lambda config: random_episodes(Learner(config)),
        lambda config: equal_work.make_case(config).episodes,
        episodes_in_a_process_of_its_own,
    ],
    ids=["worker", "case", "isolated"],
)
def test_no_label_is_read_by_the_host(make: Callable[[Config], Episodes]) -> None:
    """It would wait for the device, four times a step."""
    config = config_of()
    with Waits() as waits:
        Learner(config)._checked(make(config))
    assert waits.found == []


def test_the_worker_runs_packages_that_do_not_know_of_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """bench/compare.py gives it any commit's."""
    names = ("support_x", "support_y", "query_x", "query_y")
    monkeypatch.setattr(meta_step_worker, "Episodes", make_dataclass("Episodes", names))
    made = meta_step_worker.episodes_of(config_of(), torch.zeros)
    assert made.query_y.shape == (4, 15)
