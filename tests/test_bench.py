"""The episodes bench: its clockwork by hand-computed numbers, its refusals by planted faults, its files by reading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import episodes
import equal_work
import isolated
import measure
import pytest
import result_file
import rows
import sides
import torch
from helpers import config_of
from isolated import Direct
from measure import Dropped, Timing, interleave, ratio
from torch import Tensor

from cxgrad_fast import Config, Episodes
from cxgrad_fast.config import ALGORITHMS
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
    assert len(host.turn(0.0).steps) == 2


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
    assert rows["| faulty"].count("- |") == 8
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


@pytest.mark.parametrize("word", ["glyphs*-5w1s", "glyphs*-5w5s", "released*-mini-5w5s"])
def test_a_star_is_every_algorithm(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is added is measured without a word in bench/."""
    measured: list[str] = []

    def run_case(config: Config, *_: Any) -> tuple[list[rows.Row], dict[str, Any]]:
        measured.append(config.inner.algorithm)
        return [], {"reason": "not asked for"}

    monkeypatch.setattr(episodes, "run_case", run_case)
    assert episodes.main(["--preset", word, "--no-save", "--quick"]) == 0
    assert set(measured) == set(ALGORITHMS)
    assert len(measured) == len(set(measured))


def test_a_command_that_was_stopped_takes_its_file_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every case is in the file as soon as it is measured; other words, or a file that is whole, are a new start."""
    asked: list[str] = []
    stop_at = "glyphs-anil-5w1s"

    def run_case(config: Config, *_: Any) -> tuple[list[rows.Row], dict[str, Any]]:
        if config.preset == stop_at:
            raise KeyboardInterrupt
        asked.append(config.preset)
        return [rows.Row("loop", "not timed", seconds=Timing((1.0,)))], {"reason": "not asked for"}

    here, starts = measure.machine(), count()
    monkeypatch.setattr(result_file, "machine", lambda: {**here, "date": f"2026-01-01T00:00:{next(starts):02}+00:00"})
    monkeypatch.setattr(episodes, "run_case", run_case)
    (tmp_path / "2020-01-01T000000-episodes.json").write_text("[]")  # somebody else's
    command = ["--preset", "glyphs-maml-5w1s,glyphs-cavia-5w1s,glyphs-anil-5w1s", "--out", str(tmp_path)]

    def files() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*-episodes.json"))[1:]]

    with pytest.raises(KeyboardInterrupt):
        episodes.main(command)
    (content,) = files()
    assert [case["preset"] for case in content["cases"]] == ["glyphs-maml-5w1s", "glyphs-cavia-5w1s"]
    assert content["complete"] is False
    with pytest.raises(KeyboardInterrupt):
        episodes.main([*command, "--rounds", "2"])
    assert len(asked) == 4
    stop_at = ""
    assert episodes.main(command) == 0
    assert asked[4:] == ["glyphs-anil-5w1s"]
    first, second = files()
    assert (len(first["cases"]), first["complete"]) == (3, True)
    assert (len(second["cases"]), second["complete"]) == (2, False)
    assert first["machine"] == content["machine"]
    assert episodes.main(command) == 0
    assert len(asked) == 5 + 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "nothing*"], "no preset matches 'nothing"),
        (["--sides", "nobody"], "--sides takes names of"),
        (["--sweep", "inner.steps"], "--sweep takes SETTING=V1,V2"),
        (["--run.precision", "bfloat16"], "no tolerance"),
        (["--inner.stepz", "3"], "did you mean 'inner.steps'"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episodes.main(words)
