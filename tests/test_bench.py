"""The episodes bench: its clockwork by hand-computed numbers, its refusals by planted faults, its files by reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import episodes
import equal_work
import isolated
import measure
import pytest
import report
import sides
import torch
from helpers import config_of
from isolated import Direct
from measure import Dropped, Timing, interleave, ratio
from torch import Tensor

from cxgrad_fast import Config, Episodes
from cxgrad_fast.kernels import registration

QUICK = ["--quick", "--in-process", "--rounds", "2", "--outer.meta_batch", "2", "--run.device", "cpu"]
QUICK += ["--model.image_size", "16", "--model.filters", "2", "--task.queries", "1"]


class FakeClock:
    """Stands still until somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def worker(clock: FakeClock, log: list[str], name: str, durations: Iterator[float]) -> measure.Run:
    def run() -> None:
        log.append(name)
        clock.now += next(durations)

    return run


def jitter(scale: float, seed: int) -> Iterator[float]:
    g = torch.Generator().manual_seed(seed)
    while True:
        yield scale * (1 + 0.1 * float(torch.rand((), generator=g)))


# --- the clockwork ---


def test_sides_take_turns_and_the_order_alternates() -> None:
    clock, log = FakeClock(), list[str]()
    runs = {name: worker(clock, log, name, iter([9.0, 1.0, 2.0, 3.0])) for name in "ab"}
    timings = interleave(runs, 3, 100.0, clock=clock)
    assert log == list("ab" + "ab" + "ba" + "ab")  # the first pair warms up
    assert timings["a"].samples == timings["b"].samples == (1.0, 2.0, 3.0)


def test_quantiles_and_ratio_by_hand() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert (timing.p20, timing.median, timing.p80) == (2.0, 3.5, 5.0)
    pairs = ratio(Timing((2.0, 6.0, 5.0)), Timing((1.0, 2.0)))
    assert pairs.samples == (2.0, 3.0)  # a side that was dropped early has fewer
    assert pairs.median == 2.5


def test_a_planted_slowdown_shows_within_its_own_quantiles() -> None:
    clock = FakeClock()
    slow = (a + b for a, b in zip(jitter(1.0, 1), jitter(1.0, 2), strict=False))  # the same work twice
    runs = {"head": worker(clock, [], "head", slow), "base": worker(clock, [], "base", jitter(1.0, 3))}
    runs["again"] = worker(clock, [], "again", jitter(1.0, 4))
    timings = interleave(runs, 20, 1e9, clock=clock)
    slower, same = ratio(timings["head"], timings["base"]), ratio(timings["again"], timings["base"])
    assert slower.p20 <= 2 <= slower.p80
    assert same.p20 <= 1 <= same.p80


def test_a_side_over_its_limit_is_dropped_after_one_sample() -> None:
    clock, log = FakeClock(), list[str]()
    runs = {"slow": worker(clock, log, "slow", jitter(10, 0)), "fast": worker(clock, log, "fast", jitter(1, 0))}
    timings = interleave(runs, 4, 15.0, clock=clock)
    assert len(timings["slow"].samples) == 1
    assert timings["slow"].note == "over its limit of 15 s after 1 of 4 samples"
    assert (len(timings["fast"].samples), timings["fast"].note) == (4, "")


def test_a_side_that_fails_keeps_its_samples_and_may_time_itself() -> None:
    answers = iter([0.5, 0.25])

    def run() -> float:
        try:
            return next(answers)
        except StopIteration:
            raise Dropped("no memory") from None

    timings = interleave({"side": run}, 5, 100.0, warm_up=0, clock=FakeClock())
    assert timings["side"] == Timing((0.5, 0.25), "no memory")


def test_operator_calls_are_counted() -> None:
    x = torch.ones(3)

    def run() -> None:
        (x + x).neg()

    def twice() -> None:
        run()
        run()

    assert (measure.count_operators(run), measure.count_operators(twice)) == (2, 4)


def test_peak_memory_sees_what_a_run_allocates() -> None:
    size = 2**26

    def run() -> None:
        torch.ones(size // 4).sum()

    found = measure.peak_memory(run)
    assert found is None or 0.9 * size < found < 2 * size


@pytest.mark.parametrize(("seconds", "count"), [(0.05, 10), (0.1, 7), (30.0, 2)])
def test_a_turn_is_several_steps_in_a_row(seconds: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as take about two seconds; the first, which finds nothing in the caches, stands apart."""
    done: list[float] = []

    class Side:
        def step(self) -> None:
            done.append(seconds if done else 3 * seconds)

    clock = SimpleNamespace(perf_counter=lambda: sum(done))
    monkeypatch.setattr(isolated, "time", clock)
    host = Direct("loop")
    host._side, host._device = Side(), torch.device("cpu")
    turn = host.turn()
    assert (turn.cold, len(turn.steps)) == (pytest.approx(3 * seconds), count)
    assert turn.mean == pytest.approx(seconds)


# --- the command ---


def planted(fault: str) -> sides.Factory:
    """The loop with a fault: gradients 1 % too large, a step that moves nothing, or a figure that is NaN."""

    class Faulty:
        def __init__(self, config: Config, batch: Episodes, parameters: sides.Parameters) -> None:
            self._side = sides.SIDES["loop"](config, batch, parameters)

        def step(self) -> None:
            if fault != "step":
                self._side.step()

        def gradients(self) -> tuple[float, dict[str, Tensor]]:
            loss, found = self._side.gradients()
            if fault == "gradient":
                found["head.bias"] = 1.01 * found["head.bias"]
            return (float("nan") if fault == "nan" else loss), found

        def parameters(self) -> dict[str, Tensor]:
            return self._side.parameters()

        def load(self, parameters: sides.Parameters) -> None:
            self._side.load(parameters)

    return Faulty


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["gradient", "step", "nan"])
def test_a_side_that_does_other_work_gets_no_figure(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sides.SIDES, "faulty", planted(fault))
    assert episodes.main([*QUICK, "--sides", "loop,faulty", "--out", str(tmp_path)]) == 1
    rows = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert "not the same work" in rows["| faulty"]
    assert rows["| faulty"].count("- |") == 7
    assert " | 1 (1-1) | " in rows["| loop"]
    (path,) = tmp_path.glob("*.json")
    side = json.loads(path.read_text())["cases"][0]["sides"][1]
    assert side["wrong"]
    assert "episodes_per_s" not in side


def test_every_float32_group_trips_at_one_percent() -> None:
    config = config_of(run__precision="float32", inner__steps=1)
    case = equal_work.make_case(config)
    right = equal_work.truth(case)

    class Planted:
        def __init__(self, group: str) -> None:
            self.group = group

        def build(self, *_: Any) -> None:
            pass

        def gradients(self) -> tuple[float, dict[str, Tensor]]:
            factor = {True: 1.01, False: 1.0}
            return right.loss, {
                name: factor[equal_work.group_of(name) == self.group] * gradient
                for name, gradient in right.gradients.items()
            }

    assert not equal_work.check_rounded(Planted("none"), [(case, right)]).failure  # type: ignore[arg-type]
    for group in ("convolutions", "norms", "head", "own"):
        assert group in equal_work.check_rounded(Planted(group), [(case, right)] * 2).failure  # type: ignore[arg-type]


def test_calm_parameters_keep_the_engine_within_the_timed_tolerance() -> None:
    config = config_of(run__precision="float32", outer__meta_batch=2, task__queries=5, model__filters=8)
    case = equal_work.make_case(config, calm=True)
    host = Direct("ours-reference")
    host.build(config, case.episodes, case.parameters)
    right = equal_work.truth(case)
    assert not equal_work.check_timed(host, case, right).failure
    wrong = {name: 1.3 * gradient for name, gradient in right.gradients.items()}
    assert equal_work.check_timed(host, case, equal_work.Truth(right.loss, wrong)).failure
    assert not equal_work.check_timed(host, case, right, "bfloat16").failure
    wrong = {name: 2 * gradient for name, gradient in right.gradients.items()}
    assert equal_work.check_timed(host, case, equal_work.Truth(right.loss, wrong), "bfloat16").failure


def test_bfloat16_is_a_side_beside_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no unit multiplies so it has a reason, rounded in software it would be a figure without meaning."""
    name = "ours-cpp-bfloat16-compiled"
    config = config_of(run__precision="float32", outer__meta_batch=2, task__queries=5, model__filters=8)
    assert sides.precision_of(name, config) == "bfloat16"
    assert sides.precision_of("ours-cpp-compiled", config) == "float32"
    assert sides.refusal(name, config_of()) == "beside float32, not float64"
    registration.load()
    try:
        torch.ops.cxgrad_fast.assume_tiles(False)
        assert "a CPU with AMX" in sides.refusal(name, config)
        monkeypatch.setenv("CXGRAD_ROUND_IN_SOFTWARE", "1")
        case = equal_work.make_case(config, calm=True)
        host = Direct(name)
        host.build(config, case.episodes, case.parameters)
        verdict = equal_work.check_timed(host, case, equal_work.truth(case), "bfloat16")
        assert not verdict.failure
        assert verdict.errors["bfloat16 convolutions"] > 1e-3
    finally:
        torch.ops.cxgrad_fast.assume_tiles(None)


@pytest.mark.slow
def test_result_file_and_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = "ours-reference,ours-triton,loop,func-vmap,higher"
    arguments = [*QUICK, "--sides", names, "--out", str(tmp_path), "--sweep", "outer.meta_batch=1,2"]
    assert episodes.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("| ours-triton | - |") == 2  # a side that cannot run keeps its row, with the reason
    assert printed.count("computes maml, not cxgrad") == 2
    (path,) = tmp_path.glob("*-episodes.json")
    content = json.loads(path.read_text())
    assert {"name", "machine", "command", "rounds", "limit_s", "cases", "quick"} <= set(content)
    assert set(content["machine"]) >= {"cpu", "cores", "threads", "gpu", "load", "torch", "commit", "date"}
    assert [case["config"]["outer.meta_batch"] for case in content["cases"]] == [1, 2]
    for case in content["cases"]:
        assert case["limit"]["floor_s"] > 0
        measured = [side for side in case["sides"] if not side["reason"]]
        assert [side["side"] for side in measured] == ["ours-reference", "loop", "func-vmap"]
        for side in measured:
            assert set(side["errors"]) >= {"float64 gradient", "float64 step", "float32 small own", "float32 own"}
            assert side["episodes_per_s"]["n"] == side["ratio_to_loop"]["n"] == 2
            assert side["seconds"]["p20"] <= side["seconds"]["median"] <= side["seconds"]["p80"]
            assert 0 < side["fraction_of_limit"] < 1
            assert side["operators"] > 100
            assert side["first_step_s"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sides", "nobody"], "--sides takes names of"),
        (["--sweep", "inner.steps"], "--sweep takes SETTING=V1,V2"),
        (["--run.precision", "bfloat16"], "no tolerance"),
        (["--inner.stepz", "3"], "did you mean 'inner.steps'"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episodes.main(words)


# --- the report ---


def made_up(folder: Path, stamp: str, rate: float, tasks: tuple[int, ...] = (1, 2, 4), **machine: Any) -> None:
    """A result file of two sides, as ``write_result`` writes it."""

    def spread(value: float) -> dict[str, Any]:
        return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value, "n": 3, "samples": [value] * 3}

    def case(count: int) -> dict[str, Any]:
        fast = {"side": "ours-cpp", "reason": "", "fraction_of_limit": 0.5, "peak_bytes": 2_000_000}
        fast |= {"episodes_per_s": spread(rate * count), "ratio_to_loop": spread(2.0)}
        absent = {"side": "jax-map", "reason": "not installed", "fraction_of_limit": None, "peak_bytes": None}
        settings = config_of(outer__meta_batch=count).flat()
        return {"device": "cpu", "config": settings, "sides": [fast, absent]}

    where = {"cpu": "Some CPU", "threads": 2, "gpu": None, "commit": "0123456789ab-dirty", "date": stamp} | machine
    content = {"name": "episodes", "machine": where, "quick": False, "cases": [case(count) for count in tasks]}
    (folder / f"{stamp}-episodes.json").write_text(json.dumps(content))


def test_report_renders_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    made_up(results, "2026-01-01T000000", 1.0)
    made_up(results, "2026-01-02T000000", 3.0, tasks=(1,))  # newer: wins where both measured
    (results / "2026-01-03T000000-compare.json").write_text(json.dumps({"name": "compare", "machine": {}}))
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    words = ["--results", str(results), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(words) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 3 (2.7-3.3) cpp | 2 (1.8-2.2) | 50.0 % | 2 / - | - |" in text
    assert "| 2 (1.8-2.2) cpp | 2 (1.8-2.2) | 50.0 % | 2 / - | - |" in text
    assert "01234567-dirty" in text
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"episodes-0.png", "limit-0.png", "scaling-meta_batch-0.png", "README.md"}
    page = (tmp_path / "plots" / "README.md").read_text()
    assert "| ours-cpp | 3 (2.7-3.3) | 2 (1.8-2.2) | 50.0 % | 2 |" in page
    assert "| jax-map | not installed | - | - | - |" in page
    assert "![scaling-meta_batch-0](scaling-meta_batch-0.png)" in page
    assert report.main(words) == 0
    assert readme.read_text() == text  # again, the same
    readme.write_text("no markers")
    assert report.main(words) == 0
    assert readme.read_text() == "no markers"
    assert "no markers" in capsys.readouterr().out


def test_a_case_shows_the_best_of_ours_and_of_other_programs(tmp_path: Path) -> None:
    made_up(tmp_path, "2026-01-01T000000", 1.0, tasks=(1,))
    (cpp, _) = report.read_figures(tmp_path)

    def side(name: str, rate: float) -> report.Figure:
        return replace(cpp, side=name, rate={"median": rate, "p20": rate, "p80": rate}, peak_bytes=int(rate * 1e6))

    figures = [side("ours-reference", 5), side("ours-cpp", 7), side("loop", 4), side("higher", 1), side("jax-map", 2)]
    figures.append(side("ours-cpp-bfloat16-compiled", 12))  # less exact: among all sides, not here
    row = report.summary(figures).splitlines()[-1]
    assert row.endswith(" | 7 (7-7) cpp | 2 (1.8-2.2) | 50.0 % | 7 / 4 | jax-map: 2 |")
    assert report.summary(figures[3:5]).splitlines()[-1].endswith(" | - | - | - | - | jax-map: 2 |")


def test_scaling_joins_what_differs_in_one_setting_only(tmp_path: Path) -> None:
    made_up(tmp_path, "2026-01-01T000000", 1.0)
    figures = [figure for figure in report.read_figures(tmp_path) if figure.rate]
    assert report.scaling(figures, "outer.meta_batch") == {"ours-cpp, cxgrad": [(1, 1.0), (2, 2.0), (4, 4.0)]}
    assert report.scaling(figures, "task.shots") == {}


def test_report_without_results_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run make bench first"):
        report.main(["--results", str(tmp_path)])
