"""The operators on weights in Triton: their numbers in the interpreter and on CUDA, their machine code."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import triton_weights_child as child
from helpers import run_interpreted
from torch import Tensor

from cxgrad_fast.kernels.cases import CONV4, RESNET12

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
EXACT = 1e-13  # relative, float64


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the child found."""
    return run_interpreted("triton_weights_child.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", child.BY_NAME)
def test_float64_equals_the_definition(name: str, interpreted: dict[str, Any]) -> None:
    assert max(interpreted["float64"][name].values()) < EXACT


@pytest.mark.parametrize("name", child.ROUNDED)
def test_float32_error_is_at_most_twice_the_definition_s(name: str, interpreted: dict[str, Any]) -> None:
    assert max(interpreted["rounding"][name].values()) <= 1


@pytest.mark.parametrize("name", child.CHANGED)
def test_bits_repeat_and_tasks_do_not_see_each_other(name: str, interpreted: dict[str, Any]) -> None:
    assert interpreted["bits"][name] == []


def test_bfloat16_is_rounded_once(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["bfloat16"].values()) < 2**-7


def test_a_weight_of_zeros_is_no_number_and_spoils_no_other(interpreted: dict[str, Any]) -> None:
    assert all(interpreted["zero"])


@on_cuda
@pytest.mark.parametrize("name", child.BY_NAME)
def test_on_cuda(name: str) -> None:
    case = child.BY_NAME[name]
    assert max(child.errors(case, "cuda").values()) < EXACT
    if case.tasks:
        assert max(child.rounding(case, "cuda").values()) <= 1
    if case.tasks > 1 and not case.shared_affine:
        assert child.different_bits(case, "cuda") == []


# --- machine code ---


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_machine_code_of_a_step(architecture: str) -> None:
    """One launch forward and two backward, without spills."""
    from cxgrad_fast.kernels import machine_code
    from cxgrad_fast.kernels.gradient_step.triton import chain

    weights = [torch.empty((2, *shape), device="meta") for shape in (*CONV4, (5, 1200), (5,))]
    table = torch.empty((2, len(CONV4)), device="meta")
    with machine_code.recording(architecture) as found:
        chain.forward(weights, weights, 0.01, None, table, table)
        chain.backward(weights, weights, 0.01, None, table, table, weights, (True, True, False, True, True))
    assert [launch.name for launch in found] == ["_step", "_step", "_numbers"]
    for launch in found:
        code = launch.compile()
        assert code.spills == 0, code
        assert code.programs_per_sm >= 4, code


def launches(architecture: str, shapes: tuple[tuple[int, ...], ...], tasks: int, shared: bool) -> list[Any]:
    """Of value, backward and double backward of both operators, at a network's shapes."""
    from cxgrad_fast.kernels import machine_code
    from cxgrad_fast.kernels.normalize_weights.triton import chain as normalize
    from cxgrad_fast.kernels.scale_weights.triton import chain as scale

    def rows(count: int) -> list[Tensor]:
        return [torch.empty((count, *shape), device="meta") for shape in shapes]

    weights, v, table = rows(1 if shared else tasks), rows(tasks), torch.empty((tasks, len(shapes)), device="meta")
    with machine_code.recording(architecture) as found:
        scale.forward(weights, table)
        scale.backward(weights, table, v)
        scale.double_backward(weights, table, v, weights, table)
        if not shared:
            normalize.forward(weights)
            normalize.backward(weights, v, table)
            normalize.double_backward(weights, v, table, weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize("network", ["conv4-48", "resnet12-64"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_machine_code(network: str, shared: bool, architecture: str) -> None:
    """One launch for short rows; no spills, wide loads, room for a program of 512 threads."""
    found = launches(architecture, CONV4 if network == "conv4-48" else RESNET12, 2, shared)
    two = [launch.name for launch in found].count("_sum_blocks")  # of three calls, or six
    assert two == {"conv4-48": 2 if shared else 0, "resnet12-64": 3 if shared else 6}[network]
    # one architecture in full; of the other the largest
    for launch in found if architecture == "sm_90" else found[4:5]:
        code = launch.compile()
        assert code.spills == 0, code
        assert code.programs_per_sm >= 1, code
        assert code.registers * 32 * code.num_warps <= 65536, code
        assert code.count("LDG.E.128"), code
        assert code.count("DFMA"), "inner products are float64"
