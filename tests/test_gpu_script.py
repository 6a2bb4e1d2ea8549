"""bench/gpu.sh from end to end, tiny; its manners with stages that fail, behind an interpreter that only pretends."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import profile_step
import pytest

ROOT = Path(__file__).parent.parent
RIGHT = ("environment", "tests", "sanitizers")
FAST = ("launches", "operators", "episodes", "profile")


def run_script(
    folder: Path, python: str, size: str = "tiny", *parts: str
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The finished script, and the names in its archive."""
    # a benchmark that finds itself in a process of many is not run
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"OUT": str(folder / "out"), "PYTHON": python, "CXGRAD_GPU_SIZE": size}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *parts]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    archive = folder / "out" / "gpu-results.tar.gz"
    if not archive.exists():
        return done, set()
    with tarfile.open(archive) as tar:
        return done, {name.removeprefix("./") for name in tar.getnames()}


def pretender(folder: Path, otherwise: str, words: str = "nothing-has-this-name") -> str:
    """An interpreter that has no GPU, fails where its words contain ``words``, and else does ``otherwise``."""
    path = folder / "python"
    path.write_text(
        "#!/bin/bash\n"
        f'case "$*" in *torch.cuda*) exit 1 ;; *"{words}"*) echo "planted failure" >&2; exit 3 ;; esac\n'
        f"{otherwise}\n"
    )
    path.chmod(0o755)
    return str(path)


def test_all_stages_run(tmp_path: Path) -> None:
    # no pip: where this tree is not installed, the script's tree of links has to do
    python = pretender(tmp_path, f'exec {shlex.quote(sys.executable)} "$@"', "-m pip")
    done, names = run_script(tmp_path, python)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 stages failed: none" in done.stdout
    assert {f"{stage}.log" for stage in RIGHT + FAST} | {"operators.json", "summary.txt"} <= names
    out = tmp_path / "out"
    assert len(list(out.iterdir())) <= 8  # what comes back from a lent machine
    (table,) = out.glob("*-gpu-table.json")
    rows = json.loads(table.read_text())["rows"]
    measured = [row for row in rows if "why_not" not in row]
    assert {row["precision"] for row in measured} >= {"float64", "float32"}
    assert all(row["episodes_per_s"]["median"] > 0 and row["fraction_of_limit"] > 0 for row in measured)
    (profile,) = out.glob("*-profile.json")
    found = json.loads(profile.read_text())
    assert found["launches"] > 100
    assert found["top"][0]["ms"] >= found["top"][-1]["ms"] > 0
    benchmarks = json.loads((out / "operators.json").read_text())["benchmarks"]
    stages = {entry["extra_info"]["stage"] for entry in benchmarks}
    assert stages == {"forward", "backward", "double_backward"}


@pytest.mark.parametrize("broken", ["", "bench/test_operators.py"])
def test_a_failing_stage_does_not_stop_the_rest(tmp_path: Path, broken: str) -> None:
    python = pretender(tmp_path, "cat >/dev/null; exit 0", broken or "nothing-has-this-name")
    done, names = run_script(tmp_path, python)
    assert {f"{stage}.log" for stage in RIGHT + FAST} <= names
    assert "-- profile: done" in done.stdout
    if broken:
        assert done.returncode == 1
        assert "-- operators FAILED with code 3" in done.stdout
        assert "1 stages failed: operators" in done.stdout
    else:
        assert done.returncode == 0


def test_unknown_size(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, pretender(tmp_path, "exit 0"), size="huge")
    assert done.returncode == 2
    assert "takes full, small or tiny, got 'huge'" in done.stderr


@pytest.mark.parametrize(("part", "stages", "others"), [("right", RIGHT, FAST), ("fast", FAST, RIGHT)])
def test_parts(tmp_path: Path, part: str, stages: tuple[str, ...], others: tuple[str, ...]) -> None:
    done, names = run_script(tmp_path, pretender(tmp_path, "cat >/dev/null; exit 0"), "tiny", part)
    assert done.returncode == 0
    assert {f"{stage}.log" for stage in stages} <= names
    assert not {f"{stage}.log" for stage in others} & names


def test_unknown_part(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, pretender(tmp_path, "exit 0"), "tiny", "wrong")
    assert done.returncode == 2
    assert done.stderr == "bench/gpu.sh takes right, fast or nothing, got 'wrong'\n"


def test_limits_of_a_part_add_up_to_less_than_nine_minutes() -> None:
    lines = (ROOT / "bench" / "gpu.sh").read_text().splitlines()
    words = [line.split("stage ", 1)[1].split() for line in lines if "stage " in line and "()" not in line]
    limits = {name: int(limit) for name, limit, *_ in words if limit.isdigit()}
    assert set(limits) == {*RIGHT, *FAST, "roofline", "peers"}
    for stages in (RIGHT, (*FAST, "roofline", "peers")):
        assert 60 + sum(limits[name] for name in stages) < 9 * 60  # 60: building


def test_covered() -> None:
    assert profile_step.covered([]) == 0
    assert profile_step.covered([(3, 4), (0, 2), (1, 2.5), (1.2, 1.3)]) == 3.5
