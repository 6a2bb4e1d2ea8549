"""bfloat16 on AMX: the machine code of such a CPU, here by an emulator of its instructions where there is none."""

from __future__ import annotations

import ctypes
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
from tiles_child import CASES

from cxgrad_fast.kernels import registration
from cxgrad_fast.kernels.cases import Case

CPUINFO = Path("/proc/cpuinfo")


def has_amx() -> bool:
    """Whether the processor has the instructions and the system lets this process use them."""
    words = CPUINFO.read_text().split() if CPUINFO.exists() else []
    if "amx_bf16" not in words or "amx_tile" not in words:
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


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


def _tile_products(case: Case) -> int:
    """Positions by outputs by a filter's row of inputs, in tiles of 16 by 16 by 32, of every group of images."""
    size = max(1, 96 // max(1, -(-case.height // 2) * -(-case.width // 2)))  # images a group: csrc/convolution.h
    pad, made = case.kernel // 2, 0
    for first in range(0, case.images, size):
        positions = min(size, case.images - first) * (case.height + pad) * (case.width + pad)
        made += -(-positions // 16) * -(-case.out // 16) * case.kernel * -(-case.kernel * case.channels // 32)
    return case.tasks * made


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_convolutions(found: dict[str, Any], name: str) -> None:
    """Sums in float32 of exact products: float64 of the same factors, to rounding. And no product too many."""
    result = found["convolutions"][name]
    assert result["tiles"] < 3e-7
    assert result["software"] < 1e-6  # Winograd's sums
    assert result["products"] in (None, _tile_products(CASES[name]))


def test_derivatives_equal_those_of_rounding_in_software(found: dict[str, Any]) -> None:
    """A gradient next to a tie may be rounded up by one, down by the other: hence the room above float32's errors."""
    for name, errors in found["blocks"].items():
        assert len(errors["software"]) >= 9
        assert max(errors["software"].values()) < 1e-4, (name, errors["software"])
        assert 3e-4 < errors["float64"]["output.0"] < 1e-2, name
        assert max(errors["float64"].values()) < 0.2, (name, errors["float64"])


def test_bits_do_not_depend_on_threads_and_float64_is_not_touched(found: dict[str, Any]) -> None:
    assert found["bits"] == []


@pytest.mark.slow
def test_what_is_not_a_number_stays_so(found: dict[str, Any]) -> None:
    assert found["lost"] == []


def test_a_tiny_cxgrad_trains_on_tiles(found: dict[str, Any]) -> None:
    losses, errors = found["training"]["losses"], found["training"]["errors"]
    assert losses["compiled"] == losses["tiles"]
    assert len(set(losses["tiles"])) > 5  # it does train
    first = abs(losses["tiles"][1] / losses["float64"][1] - 1)  # before anything is adapted
    assert 1e-6 < first < 3e-2
    assert errors["software"] < 1e-5, errors
    assert 1e-4 < errors["float64"] < 1, errors
