"""The report of the episodes bench, from result files that are made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report
from helpers import config_of


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
