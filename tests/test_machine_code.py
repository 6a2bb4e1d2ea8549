"""Machine code without a GPU: what is read out of it, for kernels that leave no doubt about what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import launch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("machine code needs Triton's compiler", allow_module_level=True)
tl = pytest.importorskip("triton.language")
machine_code = pytest.importorskip("cxgrad_fast.kernels.machine_code")


@triton.jit
def _product(a, b, c, count, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for _ in range(count):
        there = tl.load(a + row * SIZE + column), tl.load(b + row + SIZE * column)
        total = tl.dot(there[0], there[1], total, input_precision=PRECISION)
        a += SIZE * SIZE
        b += SIZE * SIZE
    tl.store(c + row * SIZE + column, total)


@triton.jit
def _double(x, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < count), mask=at < count)


def double(x: torch.Tensor) -> torch.Tensor:
    """As the operators launch: settings asked, an output made, a grid."""
    out = torch.empty_like(x)
    settings = launch.settings("double", {"BLOCK": 512, "num_warps": 4}, count=x.numel())
    _double[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel(), **settings, **launch.FUSED)
    return out


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(("architecture", "own", "other"), [("sm_90", "HGMMA", "HMMA"), ("sm_80", "HMMA", "HGMMA")])
def test_tensor_cores(architecture: str, own: str, other: str) -> None:
    options = {"architecture": architecture, "num_stages": 3, **launch.FUSED}
    code = machine_code.compile(_product, meta(4), meta(4), meta(4), 9, SIZE=64, PRECISION="tf32", **options)
    assert (code.kernel, code.architecture, code.num_warps) == ("_product", architecture, 4)
    assert code.count(own)
    assert not code.count(other)
    assert code.count("LDGSTS")  # loads ahead of the product, into shared memory
    assert not code.spills
    assert code.shared_memory >= 2 * 2 * 64 * 64 * 4
    assert 1 <= code.programs_per_sm <= 65536 // (code.registers * 128)
    assert "tt.dot" in code.ttir
    assert f".target {architecture}" in code.ptx
    exact = machine_code.compile(_product, meta(4), meta(4), meta(4), 9, SIZE=64, PRECISION="ieee", **options)
    assert exact.count("FFMA") > 100
    assert not exact.count(own)


def test_spills_are_seen() -> None:
    given = {"SIZE": 64, "PRECISION": "ieee", "architecture": "sm_80", "maxnreg": 32, **launch.FUSED}
    code = machine_code.compile(_product, meta(4), meta(4), meta(4), 9, **given)
    assert code.registers <= 32
    assert code.spills > 100
    assert code.stack > 100


def test_arguments_are_specialised_as_by_a_launch() -> None:
    def loads(x: torch.Tensor, count: int) -> tuple[int, int]:
        code = machine_code.compile(_double, x, meta(4), count, BLOCK=512, architecture="sm_90", **launch.FUSED)
        return code.count("LDG"), code.count("LDG.E.128")

    whole = torch.empty(4096)
    assert loads(whole, 4096) == (1, 1)  # aligned to 16 bytes, and so is the mask
    assert loads(whole, 4095) == (4, 0)
    assert loads(whole[1:], 4096) == (4, 0)
    assert loads(meta(4096).double(), 4096)[1] == 2  # two doubles a load


def test_the_same_again_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile() -> Any:
        return machine_code.compile(_double, meta(4), meta(4), 4096, BLOCK=512, architecture="sm_90", **launch.FUSED)

    first = compile()
    monkeypatch.setattr(triton, "compile", None)
    assert compile() is first


def test_recording_writes_launches_down() -> None:
    with machine_code.recording("sm_80") as launches, launch.trying("double", {"num_warps": 8}):
        assert double(meta(5000)).shape == (5000,)
    (found,) = launches
    assert (found.name, found.grid, found.programs) == ("_double", (10,), 10)
    assert (found.options["BLOCK"], found.architecture) == (512, "sm_80")
    assert found.compile().num_warps == 8
    with pytest.raises(RuntimeError):  # launches are launches again, and there is no device
        double(meta(5000))


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "programs"),
    [(32, 4, 0, 16), (33, 4, 0, 12), (255, 8, 0, 1), (16, 1, 0, 32), (32, 4, 50 << 10, 4), (32, 4, 228 << 10, 0)],
)
def test_programs_per_multiprocessor(registers: int, warps: int, shared: int, programs: int) -> None:
    code = machine_code.MachineCode("k", "sm_90", warps, registers, 0, shared, {}, "", "", "")
    assert code.programs_per_sm == programs
    if shared == 50 << 10:
        assert replace(code, architecture="sm_80").programs_per_sm == 3


def test_other_architectures_and_the_interpreter_are_refused() -> None:
    with pytest.raises(InputError, match="architecture takes one of sm_80, sm_90, got 'sm_70'"):
        machine_code.compile(_double, meta(4), meta(4), 4, BLOCK=16, architecture="sm_70")
    script = "from cxgrad_fast.kernels import machine_code\nwith machine_code.recording('sm_90'): pass"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stderr.endswith("InputError: machine code needs Triton's compiler: unset TRITON_INTERPRET\n")
