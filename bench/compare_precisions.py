"""The README's table of precisions: what CxGrad reaches with products of tf32 and bfloat16, beside float32's.

    python bench/compare_precisions.py [--out runs/precisions] [--presets glyphs-5w1s glyphs-5w5s] [--seeds 0 1 2]

Trains what is missing, as bench/compare_algorithms.py does. Where no unit of the machine multiplies so, the factors are
rounded in software, which gives the same accuracy and no speed. A precision whose mean lies below float32's worst seed
is labelled.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from typing import Any

from compare_algorithms import cell, result

PRECISIONS = ("float32", "tf32", "bfloat16")
_TASKS = {"test": "letters", "cross-domain": "digits"}


def costs(scores: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> bool:
    """Whether runs are worse than float32's by more than its own seeds differ."""
    return mean(score["accuracy"] for score in scores) < min(score["accuracy"] for score in baseline)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """Markdown of results by preset and precision, one a seed."""
    rows = ["| task | products | unseen letters | digits, unseen domain | |", "|---|---|---|---|---|"]
    for preset, of_precision in results.items():
        for precision, runs in of_precision.items():
            parts = {part: [run[part] for run in runs] for part in _TASKS}
            baseline = of_precision["float32"]
            worse = [_TASKS[part] for part in parts if costs(parts[part], [run[part] for run in baseline])]
            label = f"costs accuracy on {' and '.join(worse)}" if worse else ""
            cells = [preset, precision, *map(cell, parts.values()), label]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/precisions"))
    parser.add_argument("--presets", nargs="+", default=["glyphs-5w1s", "glyphs-5w5s"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    os.environ["CXGRAD_ROUND_IN_SOFTWARE"] = "1"
    results = {
        preset: {
            precision: [
                result(
                    options.out / f"{precision}-{preset}-seed{seed}", preset, run__precision=precision, run__seed=seed
                )
                for seed in options.seeds
            ]
            for precision in PRECISIONS
        }
        for preset in options.presets
    }
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
