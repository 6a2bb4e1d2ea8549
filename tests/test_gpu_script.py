"""bench/gpu.sh from end to end, tiny; with stages that fail, and as on a GPU, behind programs that only pretend."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import profile_step
import pytest

from cxgrad_fast.kernels.conv_block import choice

ROOT = Path(__file__).parent.parent
PARTS = {
    "right": ("environment", "precompile", "tests"),
    "fast": ("precompile", "capture", "number"),
    "precisions": ("precompile", "precisions"),
    "kernels": ("precompile", "counters", "launches"),
    "safe": ("precompile", "sanitizers", "training"),
    "table": ("precompile", "operators", "roofline", "episodes", "peers"),
}
STAGES = {stage for stages in PARTS.values() for stage in stages} | {"build"}
TINY = STAGES - {"roofline", "peers"}


def run_script(
    folder: Path, python: str, size: str = "tiny", *parts: str, path: str = ""
) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The finished script, and the names in its archive."""
    # a benchmark that finds itself in a process of many is not run
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"OUT": str(folder / "out"), "PYTHON": python, "CXGRAD_GPU_SIZE": size}
    environment |= {"TRITON_CACHE_DIR": str(folder / "triton"), "PATH": f"{path}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *parts]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    archive = folder / "out" / "gpu-results.tar.gz"
    if not archive.exists():
        return done, set()
    with tarfile.open(archive) as tar:
        return done, {name.removeprefix("./") for name in tar.getnames()}


def logs(names: set[str]) -> set[str]:
    """The stages that ran."""
    return {name.removesuffix(".log") for name in names if name.endswith(".log")}


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


@pytest.mark.slow
def test_all_stages_run(tmp_path: Path) -> None:
    # no pip: where this tree is not installed, the script's tree of links has to do
    python = pretender(tmp_path, f'exec {shlex.quote(sys.executable)} "$@"', "-m pip")
    done, names = run_script(tmp_path, python)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 stages failed: none" in done.stdout
    assert logs(names) >= TINY
    assert {"operators.json", "summary.txt"} <= names
    out = tmp_path / "out"
    assert len(list(out.iterdir())) <= 8  # what comes back from a lent machine
    (table,) = out.glob("*-gpu-table.json")
    rows = json.loads(table.read_text())["rows"]
    measured = [row for row in rows if "why_not" not in row]
    assert {row["precision"] for row in measured} >= {"float64", "float32"}
    assert all(row["episodes_per_s"]["median"] > 0 and row["fraction_of_limit"] > 0 for row in measured)
    (profile,) = [name for name in names if name.startswith("steps/cpu/") and name.endswith("-profile.json")]
    with tarfile.open(out / "gpu-results.tar.gz") as tar:
        found = json.load(tar.extractfile(f"./{profile}"))
    assert found["launches"] > 100
    assert found["top"][0]["ms"] >= found["top"][-1]["ms"] > 0
    benchmarks = json.loads((out / "operators.json").read_text())["benchmarks"]
    stages = {entry["extra_info"]["stage"] for entry in benchmarks}
    assert stages == {"forward", "backward", "double_backward"}


@pytest.mark.parametrize("broken", ["", "bench/test_operators.py"])
def test_a_failing_stage_does_not_stop_the_rest(tmp_path: Path, broken: str) -> None:
    python = pretender(tmp_path, "cat >/dev/null; exit 0", broken or "nothing-has-this-name")
    done, names = run_script(tmp_path, python)
    assert logs(names) == TINY
    assert "-- episodes: done" in done.stdout
    told = (tmp_path / "out" / "summary.txt").read_text()
    assert told == f"device cpu, size tiny\nfailed: {'operators' if broken else 'none'}\n"
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


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), ("fast", "right")], ids="-".join)
def test_parts(tmp_path: Path, parts: tuple[str, ...]) -> None:
    done, names = run_script(tmp_path, pretender(tmp_path, "cat >/dev/null; exit 0"), "tiny", *parts)
    assert done.returncode == 0
    assert logs(names) == {"build", *(stage for part in parts for stage in PARTS[part])} & TINY


def test_unknown_part(tmp_path: Path) -> None:
    done, _ = run_script(tmp_path, pretender(tmp_path, "exit 0"), "tiny", "right", "wrong")
    assert done.returncode == 2
    assert done.stderr == f"bench/gpu.sh takes some of {' '.join(PARTS)}, got 'wrong'\n"
    assert not (tmp_path / "out").exists()


def test_limits_of_a_part_add_up_to_less_than_nine_minutes() -> None:
    lines = (ROOT / "bench" / "gpu.sh").read_text().splitlines()
    calls = [line for line in lines if "stage " in line and not line.startswith(("#", "stage()"))]
    words = [line.split("stage ", 1)[1].split() for line in calls]
    limits = {name: int(limit) for name, limit, *_ in words if limit.isdigit()}
    assert set(limits) == STAGES
    for part, stages in PARTS.items():
        assert sum(limits[name] for name in ("build", *stages)) < 9 * 60, part


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """What the script prints on a machine that says it has a GPU and all tools, and every command that it gives them.

    A command is what decides how it runs, of its environment, and its words.
    """
    folder = tmp_path_factory.mktemp("full")
    told, tools = folder / "told", folder / "tools"
    tools.mkdir()
    (folder / "triton").mkdir()
    variables = ("CXGRAD_CONVOLUTION", "CXGRAD_LAUNCH", "PYTORCH_NO_CUDA_MEMORY_CACHING", "TRITON_CACHE_DIR")
    shown = " ".join(f"{name}=${{{name}-}}" for name in variables)
    for name in ("python", "ncu", "compute-sanitizer", "nvidia-smi", "nproc"):
        answer = "echo 3" if name == "nproc" else "[ -t 0 ] || cat >/dev/null"
        (tools / name).write_text(f'#!/bin/bash\n{answer}\necho "{shown} {name} $*" >>{shlex.quote(str(told))}\n')
        (tools / name).chmod(0o755)
    done, _ = run_script(folder, str(tools / "python"), "full", path=f"{tools}:")
    assert done.returncode == 1, done.stdout  # no run was written that could be compared
    return done.stdout, told.read_text().splitlines()


def commands(pretended: tuple[str, list[str]], *parts: str) -> list[str]:
    return [line for line in pretended[1] if all(part in line for part in parts)]


def test_stages_of_a_gpu_come_in_the_plan_s_order(pretended: tuple[str, list[str]]) -> None:
    stages = [line.removeprefix("== ") for line in pretended[0].splitlines() if line.startswith("== ")]
    assert stages[:-1] == [
        *("build", "environment", "precompile", "tests", "capture", "number", "precisions", "counters", "launches"),
        *("sanitizers", "training", "operators", "roofline", "episodes", "peers"),
    ]
    assert stages[-1].startswith("1 stages failed: training;")


def test_the_cache_is_filled_by_all_processors_before_all_else(pretended: tuple[str, list[str]]) -> None:
    found = commands(pretended, "precompile.py")
    shares = [f"{each} 3 float32,tf32,bfloat16 {name}" for name in ("conv4", "resnet12") for each in range(3)]
    assert sorted(line.partition("precompile.py ")[2].removesuffix(" --size full") for line in found) == sorted(shares)
    first_test = next(index for index, line in enumerate(pretended[1]) if "-m pytest" in line)
    assert all(pretended[1].index(line) < first_test for line in found if "conv4" in line)
    (cache,) = {word for line in pretended[1] for word in line.split() if word.startswith("TRITON_CACHE_DIR=")}
    assert cache.endswith("/triton")


def test_the_number_is_taken_of_every_way(pretended: tuple[str, list[str]]) -> None:
    found = commands(pretended, "profile_step.py", "/steps/")
    by_folder = {line.partition("/steps/")[2].split()[0]: line for line in found}
    for way in choice.WAYS:
        assert f"CXGRAD_CONVOLUTION={way} " in by_folder[way]
    assert "CXGRAD_CONVOLUTION= " in by_folder["measured"]
    assert "--run.compile true" not in by_folder["uncompiled"]
    others = ("tf32", "bfloat16", "16-tasks", "resnet12", "without-the-table")
    assert set(by_folder) == {*choice.WAYS, "measured", "uncompiled", *others}


def test_sanitizers_see_every_tensor_and_production_s_kernels(pretended: tuple[str, list[str]]) -> None:
    found = commands(pretended, " compute-sanitizer --tool ")
    assert [line.partition("--tool ")[2].split()[0] for line in found] == ["memcheck", "initcheck", "racecheck"]
    for line in found:
        assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1 " in line
        assert "float32_error_on_cuda and (48_channels or first_layer)" in line


@pytest.mark.slow
def test_the_sanitizers_cases_are_there() -> None:
    script = (ROOT / "bench" / "gpu.sh").read_text()
    cases = "".join(re.findall(r'cases\+?="(.*)"', script))
    (files,) = re.findall(r"tests=\((.*)\)", script)
    command = [sys.executable, "-m", "pytest", "--collect-only", *files.split(), "-k", cases]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("float32_error_on_cuda[48_channels]", "float32_error_on_cuda[first_layer]", "tf32]", "two_layers]"):
        assert name in found


def test_heavy_shapes_alone_are_tuned(pretended: tuple[str, list[str]]) -> None:
    found = commands(pretended, "kernels.tune", "--where")
    assert [line.partition("--kernel ")[2].split()[0] for line in found] == [
        "conv_block_convolve",
        "conv_block_weight_gradient",
    ]
    assert all("--where size=42,21,10 --where tasks=2 --where images=25,75" in line for line in found)


def test_covered() -> None:
    assert profile_step.covered([]) == 0
    assert profile_step.covered([(3, 4), (0, 2), (1, 2.5), (1.2, 1.3)]) == 3.5
