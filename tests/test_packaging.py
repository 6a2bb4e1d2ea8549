"""A wheel owns one top-level name and holds all of the package; bench and tests stay out."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    tracked = ("pyproject.toml", "setup.py", "README.md", "cxgrad_fast", "kernels", "csrc")
    source = tmp_path / "source"
    source.mkdir()
    for name in tracked:  # a copy: building leaves folders behind
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        check=True,
        cwd=source,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"cxgrad_fast"}
    ours = [*(ROOT / "cxgrad_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    wanted = {
        str(path.relative_to(ROOT)).replace("kernels/", "cxgrad_fast/kernels/", 1)
        if path.relative_to(ROOT).parts[0] == "kernels"
        else str(path.relative_to(ROOT))
        for path in ours
    }
    assert wanted <= names
    assert "cxgrad_fast/py.typed" in names
    assert {f"cxgrad_fast/csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert {f"cxgrad_fast/kernels/built/{name}" for name in ("operators.so", "facts.json")} <= names

    # installed, it runs what was packaged: there is neither a compiler nor a cache to find another in
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    alone = {"PYTHONPATH": str(installed), "PATH": "/nonexistent", "CXGRAD_CACHE": str(tmp_path / "cache")}
    script = "from cxgrad_fast.kernels import backends; print(backends.details()['cpp'])"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | alone, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.endswith(f", {installed}/cxgrad_fast/kernels/built/operators.so\n")


@pytest.mark.slow
def test_an_install_that_cannot_compile_is_an_install(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "cxgrad_fast", "kernels", "csrc"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "built"]
    environment = os.environ | {"CXX": "no-such-compiler"}
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    kernels = tmp_path / "built" / "cxgrad_fast" / "kernels"
    assert (kernels / "building.py").exists()
    assert not (kernels / "built").exists()


@pytest.mark.slow
def test_importable_from_anywhere(tmp_path: Path) -> None:
    script = "from cxgrad_fast.kernels.conv_block import reference as r; print(r.__name__)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "cxgrad_fast.kernels.conv_block.reference"


def test_the_newest_versions_have_an_environment_of_their_own() -> None:
    """What ``make test-newest`` would do: pip without a cap on versions, then the recipe of ``make test-all``."""
    shown = [
        subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for words in (["test-newest", "ARGS=-x"], ["-W", "setup.py", "setup"])
    ]
    assert "PIP_CONSTRAINT=/dev/null" in shown[0]
    assert (
        ".venv-newest/bin/python -m pip install -q --upgrade --upgrade-strategy eager --no-build-isolation" in shown[0]
    )
    assert "OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n auto --dist loadfile" in shown[0]
    assert shown[0].count(" -x\n") == 1
    assert "constraints.txt" not in shown[0]
    assert ".venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation" in shown[1]
