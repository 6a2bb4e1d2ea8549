"""The README's speed table, docs/bench/README.md and the plots beside it, from everything in bench/results/.

    python bench/report.py [--results DIR] [--readme FILE] [--plots DIR]

Reads the results of ``bench/episodes.py`` and ``bench/gpu_table.py``; trials (``--quick``) and files of other commands
are passed over. Of one side in one case on one machine the newest figure counts. The table, a row a case, goes between
the markers ``<!-- bench:start -->`` and ``<!-- bench:end -->``; a README without them is left alone, and the table is
printed. The page in docs/bench/ has a row for every side.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS

from cxgrad_fast import InputError
from cxgrad_fast.checkpoints import write_atomic
from cxgrad_fast.cli import run_command

ROOT = Path(__file__).parents[1]
START, END = "<!-- bench:start -->", "<!-- bench:end -->"
SCALINGS = {
    "outer.meta_batch": "tasks of a meta-batch",
    "task.shots": "shots",
    "inner.steps": "inner steps",
    "model.image_size": "image size",
}
# what does not change the work or the way it is done
_INCIDENTAL = (
    "data.",
    "evaluation.",
    "outer.iterations",
    "outer.validate_every",
    "run.checkpoint_every",
    "run.backend",
    "run.compile",
)


@dataclass(frozen=True)
class Figure:
    """One side in one case on one machine: its rate, or the reason why there is none."""

    hardware: str
    commit: str
    date: str
    settings: tuple[tuple[str, Any], ...]
    side: str
    rate: Mapping[str, Any] | None
    gain: Mapping[str, Any] | None
    share: float | None
    peak_bytes: int | None
    reason: str

    @property
    def case(self) -> str:
        """The case in words."""
        s = dict(self.settings)
        return (
            f"{s['inner.algorithm']} {s['task.ways']}w{s['task.shots']}s, {s['outer.meta_batch']} tasks, "
            f"{s['model.backbone']}/{s['model.filters']}, {s['model.image_size']}x{s['model.image_size']}, "
            f"{s['inner.steps']} steps, {s['run.precision']}"
        )


def read_figures(folder: Path) -> list[Figure]:
    """All figures, the newest of each side, case and machine, in the order of first appearance.

    Raises:
        InputError: a file that is not JSON.
    """
    found: dict[tuple[Any, ...], Figure] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"the result file '{path}' is not JSON: {error}") from None
        for figure in _figures(content):
            key = (figure.hardware, figure.settings, figure.side)
            known = found.get(key)
            # a reason why there is none does not displace a figure: a peer may just not be installed this time
            if not known or (figure.date >= known.date and (figure.rate or not known.rate)):
                found[key] = figure
    return list(found.values())


def _figures(content: Mapping[str, Any]) -> Iterable[Figure]:
    if content.get("quick"):
        return
    if content.get("name") == "episodes":
        for case in content["cases"]:
            for side in case["sides"]:
                yield _figure(content["machine"], case["device"], case["config"], side["side"], side)
    if content.get("name") == "gpu-table":
        for row in content["rows"]:
            side = {**row, "reason": row.get("why_not", ""), "peak_bytes": row.get("peak_memory_bytes")}
            device = "cuda" if content["machine"]["gpu"] else "cpu"
            way = "ours-compiled" if row.get("compiled") else "ours"
            yield _figure(content["machine"], device, row["config"], way, side)


def _figure(
    machine: Mapping[str, Any], device: str, config: Mapping[str, Any], side: str, entry: Mapping[str, Any]
) -> Figure:
    hardware = machine["gpu"]["name"] if device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    settings = {key: value for key, value in settings.items() if not key.startswith(_INCIDENTAL)}
    return Figure(
        hardware,
        machine["commit"],
        machine["date"],
        tuple(sorted(settings.items())),
        side,
        entry.get("episodes_per_s"),
        entry.get("ratio_to_loop"),
        entry.get("fraction_of_limit"),
        entry.get("peak_bytes"),
        entry["reason"],
    )


def summary(figures: Sequence[Figure]) -> str:
    """A table for every machine: a row for every case that was measured, ours beside the loop and the best other."""
    lines = []
    for hardware, cases in _by_case(figures).items():
        lines += [_heading(hardware, [figure for sides in cases.values() for figure in sides]), ""]
        lines += ["| case | ours, episodes/s | x loop | of limit | peak MB, ours / loop | best other program |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [_summary_line(case, sides) for case, sides in cases.items() if any(side.rate for side in sides)]
        lines.append("")
    return "\n".join(lines)


def details(figures: Sequence[Figure]) -> str:
    """A table for every machine: a row for every side of every case."""
    lines = []
    for hardware, cases in _by_case(figures).items():
        lines += [_heading(hardware, [figure for sides in cases.values() for figure in sides]), ""]
        lines += ["| case | side | episodes/s | x loop | of limit | peak MB |", "|---|---|---|---|---|---|"]
        lines += [_line(figure) for sides in cases.values() for figure in sides]
        lines.append("")
    return "\n".join(lines)


def _by_case(figures: Sequence[Figure]) -> dict[str, dict[str, list[Figure]]]:
    """Hardware -> case -> its sides."""
    found: dict[str, dict[str, list[Figure]]] = {}
    for figure in figures:
        found.setdefault(figure.hardware, {}).setdefault(figure.case, []).append(figure)
    return found


def _heading(hardware: str, figures: Sequence[Figure]) -> str:
    commits = ", ".join(dict.fromkeys(_short(figure.commit) for figure in figures))
    latest = max(figure.date for figure in figures)[:10]
    return f"**{hardware}** ({latest}, commit {commits}); median (20-80 % quantiles)"


def _summary_line(case: str, sides: Sequence[Figure]) -> str:
    rates = {figure.side: figure.rate["median"] for figure in sides if figure.rate}
    by_name = {figure.side: figure for figure in sides}
    exact = [name for name in rates if name.startswith("ours") and "bfloat16" not in name]
    ours = max(exact, key=rates.__getitem__, default=None)
    others = [name for name in rates if name != "loop" and not name.startswith("ours")]
    best = max(others, key=rates.__getitem__, default=None)
    cells = [case, "-", "-", "-", "-", f"{best}: {rates[best]:.3g}" if best else "-"]
    if ours:
        figure = by_name[ours]
        label = "" if ours == "ours" else f" {ours.removeprefix('ours-')}"
        cells[1:4] = [_spread(figure.rate) + label, _spread(figure.gain), _percent(figure.share)]
        cells[4] = f"{_megabytes(figure)} / {_megabytes(by_name['loop']) if 'loop' in by_name else '-'}"
    return f"| {' | '.join(cells)} |"


def _line(figure: Figure) -> str:
    if not figure.rate:
        return f"| {figure.case} | {figure.side} | {figure.reason} | - | - | - |"
    cells = [figure.case, figure.side, _spread(figure.rate), _spread(figure.gain)]
    return f"| {' | '.join([*cells, _percent(figure.share), _megabytes(figure)])} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _megabytes(figure: Figure) -> str:
    return "-" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f}"


def _spread(timing: Mapping[str, Any] | None) -> str:
    return f"{timing['median']:.3g} ({timing['p20']:.3g}-{timing['p80']:.3g})" if timing else "-"


def _short(commit: str) -> str:
    return commit[:8] + ("-dirty" if commit.endswith("-dirty") else "")


def update_readme(readme: Path, table: str) -> bool:
    """Put the table between the markers; False where there are none."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not (start and end):
        return False
    write_atomic(readme, f"{head}{START}\n\n{table}\n{END}{tail}".encode())
    return True


def draw(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """The plots that the figures suffice for: rates and shares of the limit by side, and scalings."""
    measured = [figure for figure in figures if figure.rate]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, hardware in enumerate(dict.fromkeys(figure.hardware for figure in measured)):
        mine = [figure for figure in measured if figure.hardware == hardware]
        paths.append(_bars(mine, folder / f"episodes-{index}.png", "episodes/s", lambda f: f.rate["median"]))
        limited = [figure for figure in mine if figure.share is not None]
        if limited:
            paths.append(_bars(limited, folder / f"limit-{index}.png", "% of the limit", lambda f: 100 * f.share))
        for setting, words in SCALINGS.items():
            curves = scaling(mine, setting)
            if curves:
                name = f"scaling-{setting.rpartition('.')[2]}-{index}.png"
                paths.append(_curves(curves, hardware, words, folder / name))
    return paths


def scaling(figures: Sequence[Figure], setting: str) -> dict[str, list[tuple[float, float]]]:
    """Curves (value of the setting, episodes/s) of figures that differ in nothing else; three points or more."""
    groups: dict[tuple[Any, ...], list[Figure]] = {}
    for figure in figures:
        others = tuple(pair for pair in figure.settings if pair[0] not in (setting, "run.seed"))
        groups.setdefault((figure.side, others), []).append(figure)
    curves = {}
    for (side, others), members in groups.items():
        if len(members) >= 3:
            points = sorted((dict(figure.settings)[setting], figure.rate["median"]) for figure in members)
            label = f"{side}, {dict(others).get('inner.algorithm', '')}"
            curves[label if label not in curves else f"{label} ({len(curves)})"] = points
    return curves


def _bars(figures: Sequence[Figure], path: Path, words: str, value: Any) -> Path:
    """Horizontal bars, a group for every case, a colour for every side."""
    sides = list(dict.fromkeys(figure.side for figure in figures))
    drawing, axes = _axes((9, 1.2 + 0.28 * len(figures)))
    labels = [f"{figure.side}   {figure.case}" for figure in figures]
    axes.barh(range(len(figures)), [value(f) for f in figures], color=[f"C{sides.index(f.side)}" for f in figures])
    axes.set_yticks(range(len(figures)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(words)
    axes.set_title(figures[0].hardware, fontsize=9)
    drawing.savefig(path, dpi=110)
    return path


def _curves(curves: Mapping[str, list[tuple[float, float]]], hardware: str, words: str, path: Path) -> Path:
    drawing, axes = _axes((6, 4))
    for label, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xlabel=words, ylabel="episodes/s", xscale="log", yscale="log")
    axes.set_title(hardware, fontsize=9)
    axes.legend(fontsize=7)
    drawing.savefig(path, dpi=110)
    return path


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Drawing  # without pyplot it needs no display

    drawing = Drawing(figsize=size, layout="constrained")
    return drawing, drawing.add_subplot()


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "bench")
    options = parser.parse_args(argv)
    figures = read_figures(options.results)
    if not figures:
        raise InputError(f"no results of bench/episodes.py in '{options.results}': run make bench first")
    table = summary(figures)
    if update_readme(options.readme, table):
        print(f"{options.readme}: table of {len({(figure.hardware, figure.case) for figure in figures})} cases")
    else:
        print(f"{table}\n('{options.readme}' has no markers {START} {END}: left as it is)")
    plots = draw(figures, options.plots)
    page = options.plots / "README.md"
    images = "\n".join(f"![{path.stem}]({path.name})" for path in plots)
    text = f"# Episodes per second, every side\n\nMade by `make bench-report`.\n\n{details(figures)}\n{images}\n"
    write_atomic(page, text.encode())
    print(*plots, page, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
