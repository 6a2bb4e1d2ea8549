"""The Triton kernels that read images: the first layer, patch statistics, and the end of a residual block.

Right in the interpreter and on CUDA, good machine code without a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import require_cpp, run_interpreted
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is there on Linux alone")
if triton.knobs.runtime.interpret:
    pytest.skip("machine code needs Triton's compiler: unset TRITON_INTERPRET", allow_module_level=True)

import triton_first_layer_child as child  # noqa: E402
from triton_blocks import assert_fast_contract, assert_fast_products  # noqa: E402

from cxgrad_fast.kernels import machine_code  # noqa: E402

EXACT = 1e-12  # measured 5e-15
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="session")
def interpreted() -> dict[str, Any]:
    """What the child found."""
    require_cpp()
    return run_interpreted("triton_first_layer_child.py")


# --- the same numbers ---


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in child.COMBINED])
def test_float64_equals_the_cpp_operators(interpreted: dict[str, Any], name: str) -> None:
    errors = interpreted["contract"][name]
    assert len(errors) >= 23
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("name", [case.name for case in child.ROUNDED])
def test_float32_error_is_at_most_twice_torchs(interpreted: dict[str, Any], name: str) -> None:
    ratios = interpreted["rounding"][name]
    assert len(ratios) == 9
    assert max(ratios.values()) <= 2, ratios


def test_fast_products_are_rounded_and_no_more(interpreted: dict[str, Any]) -> None:
    assert_fast_products(interpreted["low"])


def test_fast_products_equal_the_cpp_operators(interpreted: dict[str, Any]) -> None:
    assert_fast_contract(interpreted["cpp"])


@pytest.mark.parametrize("name", [case.name for case in child.PATCH_CASES])
def test_patch_statistics(interpreted: dict[str, Any], name: str) -> None:
    """Of float32 images to float64 accuracy; an empty set's are compared for shape alone."""
    errors = interpreted["patches"][name]
    assert max(errors.values()) < 1e-14, errors


@pytest.mark.parametrize("name", list(child.ENDS))
def test_residual_end_equals_the_definition(interpreted: dict[str, Any], name: str) -> None:
    """To the last place in float32 and float64: both are sums of two numbers, then selections."""
    for what, error in interpreted["ends"][name].items():
        assert error <= (0.05 if "bfloat16" in what else 0.0), what


def test_what_is_not_a_number_wins_its_window(interpreted: dict[str, Any]) -> None:
    assert interpreted["missing"] == [True, True]


def test_bits_repeat_and_tasks_do_not_see_each_other(interpreted: dict[str, Any]) -> None:
    assert interpreted["bits"] == []


def test_values_beyond_the_range_of_int32(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["far"].values()) < 1e-2, interpreted["far"]  # bfloat16; a wrapped offset reads ones


@GPU
@pytest.mark.parametrize("case", child.COMBINED, ids=lambda case: case.name)
def test_float64_on_cuda(case: Any) -> None:
    require_cpp()
    errors = child.contract_errors(case, "cuda", parts=True)
    assert max(errors.values()) < EXACT, errors


@GPU
@pytest.mark.parametrize("case", child.ROUNDED, ids=lambda case: case.name)
def test_float32_error_on_cuda(case: Any) -> None:
    ratios = child.rounding(case, "cuda", seeds=4)
    assert max(ratios.values()) <= 2, ratios


@GPU
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "tf32"), (torch.float32, "bfloat16"), (torch.bfloat16, "float32")],
    ids=str,
)
def test_fast_products_on_cuda(dtype: torch.dtype, precision: str) -> None:
    errors = child.low_precision(dtype, precision, "cuda")
    assert max(errors.values()) < (1e-2 if dtype == torch.float32 else 2), errors


@GPU
@pytest.mark.parametrize("case", child.PATCH_CASES, ids=lambda case: case.name)
def test_patch_statistics_on_cuda(case: Any) -> None:
    errors = child.patch_errors(case, "cuda")
    assert max(errors.values()) < 1e-14, errors


@GPU
@pytest.mark.parametrize("case", child.ENDS.values(), ids=lambda case: case.name)
def test_residual_end_on_cuda(case: Any) -> None:
    for what, error in child.end_errors(case, "cuda").items():
        assert error <= (0.05 if "bfloat16" in what else 0.0), what
    assert child.missing_numbers("cuda") == [True, True]


@GPU
@pytest.mark.parametrize("case", child.COMBINED, ids=lambda case: case.name)
def test_bits_on_cuda(case: Any) -> None:
    assert not child.different_bits(case, "cuda")


# --- memory, launches, machine code ---

Shape = tuple[int, int, int, int, int]  # T, S, Cin, Cout, H
SHAPES: dict[str, Shape] = {
    "conv4-48": (2, 25, 3, 48, 84),
    "conv4-64": (2, 25, 3, 64, 84),
    "glyphs-32": (10, 5, 3, 32, 28),
    "grey-16": (10, 5, 1, 16, 28),
}
PASSES = ("_forward", "_reduce", "_second")


def launches_of(
    shape: Shape,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    *,
    need_weight: bool = True,
    on_weight: bool = True,
) -> dict[str, list[machine_code.Launch]]:
    """What the three functions launch, on meta tensors."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    tasks, images, inputs, outputs, size = shape
    weight, affine, eps = empty(tasks, outputs, inputs, 3, 3), [empty(tasks, outputs) for _ in range(2)], empty(tasks)
    leaves = (empty(tasks, images, inputs, size, size), weight, *affine, eps)
    length = 9 * inputs
    patches = (empty(tasks, length, dtype=torch.float64), empty(tasks, length, length, dtype=torch.float64))
    found: dict[str, list[machine_code.Launch]] = {}
    with machine_code.recording(architecture) as found["forward"]:
        out, _, *saved = child.first_layer.forward(*leaves, 0.01, *patches, precision=precision)
    arguments = (out, *leaves, *saved)
    with machine_code.recording(architecture) as found["backward"]:
        first = child.first_layer.backward(*arguments, 0.01, *patches, need_weight, precision=precision)
    on = (weight if on_weight else None, *affine, eps)
    sums = (first[2], first[3], first[5])
    with machine_code.recording(architecture) as found["double_backward"]:
        child.first_layer.double_backward(
            *on, *arguments, *sums, 0.01, *patches, need_weight and on_weight, precision=precision
        )
    return found


def check(launch: machine_code.Launch) -> None:
    code = launch.compile()
    assert not code.spills, (launch.name, code)
    # the small kernels in front of a pass and behind it run alone
    assert code.programs_per_sm >= (2 if launch.name in PASSES else 1), (launch.name, code)
    products = {"sm_90": ("HGMMA", "HMMA", "DMMA"), "sm_80": ("HMMA", "DMMA")}[launch.architecture]
    multiplies = launch.name in ("_forward", "_products", "_moments")
    if launch.name in ("_reduce", "_second"):  # without the weight's part they only sum or select
        multiplies = launch.arguments[5 if launch.name == "_reduce" else 1] is not None
    assert multiplies <= any(code.count(name) for name in products), (launch.name, code)


@pytest.mark.parametrize(
    ("need_weight", "on_weight", "names"),
    [
        (True, True, [["_moments", "_forward"], ["_reduce", "_finish"], ["_coefficients", "_second"]]),
        (False, False, [["_moments", "_forward"], ["_reduce", "_finish"], ["_coefficients", "_second"]]),
        # a context pass had no D: it is made when the outer pass wants it
        (
            False,
            True,
            [["_moments", "_forward"], ["_reduce", "_finish"], ["_reduce", "_finish", "_coefficients", "_second"]],
        ),
    ],
)
def test_two_launches_a_derivative(need_weight: bool, on_weight: bool, names: list[list[str]]) -> None:
    found = launches_of(SHAPES["conv4-48"], "sm_90", need_weight=need_weight, on_weight=on_weight)
    assert [[launch.name for launch in launches] for launches in found.values()] == names


def test_nothing_of_the_images_size_is_stored() -> None:
    tasks, images, _, outputs, size = shape = SHAPES["conv4-48"]
    pooled = tasks * images * outputs * (size // 2) ** 2
    for launches in launches_of(shape, "sm_90").values():
        for launch in launches:
            sizes = [argument.numel() for argument in launch.arguments if isinstance(argument, Tensor)]
            assert max(sizes) <= pooled, launch.name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_of_the_whole_layer(architecture: str) -> None:
    for launches in launches_of(SHAPES["conv4-48"], architecture).values():
        for launch in launches:
            check(launch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "precision"),
    [
        ("conv4-64", "sm_90", "float32"),
        ("glyphs-32", "sm_90", "float32"),
        ("glyphs-32", "sm_90", "tf32"),
        ("conv4-48", "sm_90", "bfloat16"),
    ],
)
def test_machine_code_of_the_passes(name: str, architecture: str, precision: str) -> None:
    for launches in launches_of(SHAPES[name], architecture, precision=precision).values():
        for launch in launches:
            if launch.name in PASSES:
                check(launch)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_machine_code_of_other_types(dtype: torch.dtype) -> None:
    """float64 is for gradient checks on the device; the compiler has no way from bytes or bfloat16 to its products."""
    for launches in launches_of(SHAPES["grey-16"], "sm_90", dtype).values():
        for launch in launches:
            check(launch)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_of_patch_statistics(architecture: str) -> None:
    with machine_code.recording(architecture) as launches:
        child.patch_statistics(torch.empty(2, 25, 3, 84, 84, device="meta"))
    assert [launch.name for launch in launches] == ["_products", "_merge"]
    for launch in launches:
        check(launch)


def test_machine_code_of_residual_end() -> None:
    """Each pass reads and writes 16 bytes a thread, in one launch."""
    x = torch.empty(1, 5, 84, 84, 64, device="meta").permute(0, 1, 4, 2, 3).requires_grad_()
    with machine_code.recording("sm_90") as launches:
        out = child.residual_end(x, x, slope=0.1, pool=True, padding=0)
        (first,) = torch.autograd.grad(out, x, torch.empty_like(out, requires_grad=True), create_graph=True)
        first.sum().backward()
    names = [launch.name for launch in launches]
    assert names[:2] == ["_forward", "_backward"]
    for launch in launches:
        check_pass(launch.compile())


def check_pass(code: machine_code.MachineCode) -> None:
    assert not code.spills, code
    assert code.programs_per_sm >= 8, code
    assert math.prod(code.count(name) for name in ("STG.E.128", "LDG.E.128")), code.instructions
