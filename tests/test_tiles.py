"""bfloat16 on AMX: the machine code of such a CPU, here by an emulator of its instructions where there is none."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import require_cpp
from tiles_child import SHAPES

from cxgrad_fast.kernels import registration

CPUINFO = Path("/proc/cpuinfo")


def has_amx() -> bool:
    words = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return "amx_bf16" in words and "amx_tile" in words


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the child found, on the instructions themselves or on their emulator."""
    require_cpp()
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("tiles_child.py"))]
    if not has_amx():
        command.append(str(_emulator(tmp_path_factory.mktemp("amx"))))
    environment = os.environ | {"CXGRAD_ROUND_IN_SOFTWARE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def _emulator(folder: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "clang++"]
    source, library = Path(__file__).with_name("amx_emulator.cpp"), folder / "amx_emulator.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-march=native",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
    ]
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    return library


def test_the_cpu_is_asked() -> None:
    require_cpp()
    registration.load()
    assert torch.ops.cxgrad_fast.has_tiles() == has_amx()


def _tile_products(shape: tuple[int, ...]) -> int:
    """Positions by outputs by a filter's row of inputs, in tiles of 16 by 16 by 32, of every group of images."""
    tasks, images, inputs, outputs, height, width, kernel = shape
    size = max(1, 96 // max(1, -(-height // 2) * -(-width // 2)))  # images a group: csrc/convolution.h
    pad, made = kernel // 2, 0
    for first in range(0, images, size):
        positions = min(size, images - first) * (height + pad) * (width + pad)
        made += -(-positions // 16) * -(-outputs // 16) * kernel * -(-kernel * inputs // 32)
    return tasks * made


@pytest.mark.parametrize("name", list(SHAPES))
def test_convolutions(found: dict[str, Any], name: str) -> None:
    """Sums in float32 of exact products: float64 of the same factors, to rounding. And no product too many."""
    result = found["convolutions"][name]
    assert result["tiles"] < 3e-7
    assert result["software"] < 1e-6  # Winograd's sums
    assert result["products"] in (None, _tile_products(SHAPES[name]))


def test_derivatives_equal_those_of_rounding_in_software(found: dict[str, Any]) -> None:
    """A gradient next to a tie may be rounded up by one, down by the other: hence the room above float32's errors."""
    for name, errors in found["blocks"].items():
        assert len(errors["software"]) >= 9
        assert max(errors["software"].values()) < 1e-4, (name, errors["software"])
        assert 3e-4 < errors["float64"]["out"] < 1e-2, name
        assert max(errors["float64"].values()) < 0.2, (name, errors["float64"])


def test_bits_do_not_depend_on_threads_and_float64_is_not_touched(found: dict[str, Any]) -> None:
    assert found["bits"] == []


def test_a_tiny_cxgrad_trains_on_tiles(found: dict[str, Any]) -> None:
    losses, errors = found["training"]["losses"], found["training"]["errors"]
    assert losses["compiled"] == losses["tiles"]
    assert len(set(losses["tiles"])) > 5  # it does train
    first = abs(losses["tiles"][1] / losses["float64"][1] - 1)  # before anything is adapted
    assert 1e-6 < first < 3e-2
    assert errors["software"] < 1e-5, errors
    assert 1e-4 < errors["float64"] < 1, errors
