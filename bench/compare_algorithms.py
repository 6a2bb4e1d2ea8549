"""The README's accuracy table: CxGrad and MAML on the same budget, on glyphs and on the never-seen digits.

    python bench/compare_algorithms.py [--out runs/compare] [--shots 1 5] [--seeds 0]

Trains what is missing with ``python -m cxgrad_fast.train`` (a run that stands in the folder is continued or read, so
that the command may be stopped and repeated), then prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ALGORITHMS = {"cxgrad": "CxGrad", "maml": "MAML"}


def result(folder: Path, preset: str, **settings: object) -> dict[str, Any]:
    """The result of one run, trained now if it is not there; ``run__seed=1`` is the setting run.seed."""
    if not (folder / "result.json").exists():
        command = [sys.executable, "-m", "cxgrad_fast.train"]
        if (folder / "latest.pt").exists():
            command += ["--resume", str(folder)]
        else:
            command += ["--compile", "--preset", preset, "--out", str(folder)]
            for name, value in settings.items():
                command += [f"--{name.replace('__', '.')}", str(value)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads((folder / "result.json").read_text())


def cell(scores: list[dict[str, Any]]) -> str:
    """Mean accuracy over the runs, and its two intervals for one run or the runs' range for several."""
    accuracy = 100 * mean(score["accuracy"] for score in scores)
    if len(scores) == 1:
        return (
            f"{accuracy:.1f} ± {100 * scores[0]['tasks_interval']:.1f} (± {100 * scores[0]['images_interval']:.1f}) %"
        )
    found = [100 * score["accuracy"] for score in scores]
    return f"{accuracy:.1f} % ({min(found):.1f} to {max(found):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    rows = ["| algorithm | task | glyphs, unseen letters | digits, unseen domain |", "|---|---|---|---|"]
    for shots in options.shots:
        for algorithm, name in ALGORITHMS.items():
            runs = [
                result(
                    options.out / f"{algorithm}-5w{shots}s-seed{seed}",
                    f"glyphs-5w{shots}s",
                    inner__algorithm=algorithm,
                    run__seed=seed,
                )
                for seed in options.seeds
            ]
            cells = [cell([run[part] for run in runs]) for part in ("test", "cross-domain")]
            rows.append(f"| {name} | 5-way {shots}-shot | {cells[0]} | {cells[1]} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
