"""conv_block in Triton, the general block: right in the interpreter and on CUDA, good machine code without a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import run_interpreted
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is there on Linux alone")
if triton.knobs.runtime.interpret:
    pytest.skip("machine code needs Triton's compiler: unset TRITON_INTERPRET", allow_module_level=True)

import triton_conv_block_child as child  # noqa: E402
from triton_blocks import assert_fast_contract, assert_fast_products  # noqa: E402

from cxgrad_fast.kernels import machine_code  # noqa: E402

EXACT = 1e-12  # measured 3e-15
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device too: the framework's ways are tests/test_ways.py's."""
    monkeypatch.setenv("CXGRAD_CONVOLUTION", "triton")


@pytest.fixture(scope="session")
def interpreted() -> dict[str, Any]:
    """What the child found."""
    return run_interpreted("triton_conv_block_child.py")


# --- the same numbers ---


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in child.COMBINED])
def test_float64_equals_the_cpp_operators(interpreted: dict[str, Any], name: str) -> None:
    errors = interpreted["contract"][name]
    assert len(errors) >= 17
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("name", [case.name for case in child.ROUNDED])
def test_float32_error_is_at_most_twice_torchs(interpreted: dict[str, Any], name: str) -> None:
    ratios = interpreted["rounding"][name]
    assert len(ratios) == 11
    # numpy adds the rows of a block one by one, a device in a tree: that shows in a plain sum
    assert_at_most_twice(ratios | {"d.bias": ratios["d.bias"] / 2})


def assert_at_most_twice(ratios: dict[str, float]) -> None:
    """Of one number a task, few tasks say little."""
    assert all(ratio <= (4 if name.endswith("eps") else 2) for name, ratio in ratios.items()), ratios


def test_fast_products_are_rounded_and_no_more(interpreted: dict[str, Any]) -> None:
    assert_fast_products(interpreted["low"])


def test_fast_products_equal_the_cpp_operators(interpreted: dict[str, Any]) -> None:
    assert_fast_contract(interpreted["cpp"])


def test_bits_repeat_and_tasks_do_not_see_each_other(interpreted: dict[str, Any]) -> None:
    assert interpreted["bits"] == []


def test_images_beyond_the_range_of_int32(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["far"].values()) < 1e-2  # bfloat16; a wrapped offset reads NaN


@GPU
@pytest.mark.parametrize("case", [*child.COMBINED, *child.LARGER], ids=lambda case: case.name)
def test_float64_on_cuda(case: Any) -> None:
    errors = child.contract_errors(case, "cuda", parts=True)
    assert max(errors.values()) < EXACT, errors


@GPU
@pytest.mark.parametrize("case", child.ROUNDED, ids=lambda case: case.name)
def test_float32_error_on_cuda(case: Any) -> None:
    assert_at_most_twice(child.rounding(case, "cuda", seeds=4))


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
@pytest.mark.parametrize("case", child.COMBINED, ids=lambda case: case.name)
def test_bits_on_cuda(case: Any) -> None:
    assert not child.different_bits(case, "cuda")


# --- machine code and launches ---

Shape = tuple[int, int, int, int, int, int, bool]  # T, S, Cin, Cout, H, k, pool
SHAPES: dict[str, Shape] = {
    "conv4-48/layer2": (2, 25, 48, 48, 42, 3, True),
    "conv4-48/layer4": (2, 25, 48, 48, 10, 3, True),
    "conv4-64/layer3": (2, 25, 64, 64, 21, 3, True),
    "glyphs-32/layer2": (2, 5, 32, 32, 14, 3, True),
    "resnet12/block1-first": (1, 5, 3, 64, 84, 3, False),
    "resnet12/block2-first": (1, 5, 64, 128, 42, 3, False),
    "resnet12/block2-shortcut": (1, 5, 64, 128, 42, 1, False),
    "resnet12/block3-shortcut": (1, 5, 128, 256, 21, 1, False),
    "resnet12/block4": (1, 5, 512, 512, 10, 3, False),
}


def launches_of(
    shape: Shape,
    architecture: str,
    dtype: torch.dtype = torch.float32,
    precision: str = "float32",
    *,
    on_x: bool = True,
    on_weight: bool = True,
) -> dict[str, list[machine_code.Launch]]:
    """What forward, backward, double backward and the outer pass through the forward launch, on meta tensors."""

    def empty(*size: int) -> Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    tasks, images, inputs, outputs, size, kernel, pool = shape
    options = (0.01 if pool else 1.0, pool)
    x = empty(tasks, images, size, size, inputs).permute(0, 1, 4, 2, 3)
    weight, affine = empty(tasks, outputs, inputs, kernel, kernel), [empty(tasks, outputs) for _ in range(2)]
    leaves, on = (x, weight, *affine, empty(tasks)), (x if on_x else None, weight if on_weight else None)
    found: dict[str, list[machine_code.Launch]] = {}
    with machine_code.recording(architecture) as found["forward"]:
        out, *saved = child.forward(*leaves, *options, precision=precision)
    with machine_code.recording(architecture) as found["backward"]:
        first = child.backward(out, None, *leaves, *saved, *options, True, True, precision=precision)
    with machine_code.recording(architecture) as found["double_backward"]:
        second = child.double_backward(
            *on, *affine, leaves[4], out, *leaves, *saved, *first[2:4], *options, True, True, precision=precision
        )
    with machine_code.recording(architecture) as found["outer"]:
        child.backward(out, second[5], *leaves, *saved, *options, True, True, precision=precision)
    return found


def convolution_units(launches: list[machine_code.Launch]) -> int:
    sources = [launch.options["SOURCES"] for launch in launches if launch.name == "_convolve"]
    return sum(sources) + sum(launch.name == "_weight_gradient" for launch in launches)


def test_six_units_of_convolution_in_the_outer_pass() -> None:
    found = launches_of(SHAPES["conv4-48/layer2"], "sm_90")
    units = {name: convolution_units(launches) for name, launches in found.items()}
    assert units == {"forward": 1, "backward": 2, "double_backward": 4, "outer": 2}


@pytest.mark.parametrize(
    ("on_x", "on_weight", "names"),
    [(True, False, ["_convolve", "_weight_gradient"]), (False, True, ["_convolve"] * 2), (False, False, [])],
)
def test_only_the_work_that_is_needed(on_x: bool, on_weight: bool, names: list[str]) -> None:
    found = launches_of(SHAPES["conv4-48/layer2"], "sm_90", on_x=on_x, on_weight=on_weight)["double_backward"]
    assert [launch.name for launch in found if launch.name in ("_convolve", "_weight_gradient")] == names
    assert convolution_units(found) == len(names)


def check(launch: machine_code.Launch, *, tensor_cores: bool = True) -> None:
    code = launch.compile()
    assert not code.spills, (launch.name, code)
    assert code.programs_per_sm, (launch.name, code)
    if tensor_cores and launch.name in ("_convolve", "_weight_gradient"):
        products = {"sm_90": ("HGMMA", "DMMA"), "sm_80": ("HMMA", "DMMA")}[launch.architecture]
        assert sum(code.count(name) for name in products), (launch.name, code)
        scalar = code.count("LDGSTS.E") - code.count("LDGSTS.E.BYPASS.128") - code.count("LDGSTS.E.BYPASS.LTC128B.128")
        if launch.options["CIN"] % 4 == 0:
            assert scalar <= 0, (launch.name, code.instructions)  # 16 bytes a thread


def heavy(found: dict[str, list[machine_code.Launch]]) -> list[machine_code.Launch]:
    """The launches with products, of which the outer pass repeats the first derivative's."""
    return [
        launch
        for name in ("forward", "backward", "double_backward")
        for launch in found[name]
        if launch.name in ("_convolve", "_weight_gradient")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_of_a_whole_block(architecture: str) -> None:
    for launches in launches_of(SHAPES["conv4-48/layer2"], architecture).values():
        for launch in launches:
            check(launch)


def most(launches: list[machine_code.Launch]) -> list[machine_code.Launch]:
    """The convolution of two pairs, of which others are parts, of single channels, and the weight gradient."""
    return [launch for launch in launches if launch.options.get("SOURCES") != 1 or launch.options["CIN"] % 8]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "conv4-48/layer2"])
def test_machine_code_of_products(name: str, architecture: str) -> None:
    for launch in most(heavy(launches_of(SHAPES[name], architecture))):
        check(launch)


@pytest.mark.parametrize("name", ["glyphs-32/layer2", "resnet12/block3-shortcut"])
def test_short_sums_are_not_unrolled(name: str) -> None:
    """With a loop whose end the compiler knows, these transposes had 16 and 6 spills."""
    transpose = next(launch for launch in launches_of(SHAPES[name], "sm_80")["backward"] if launch.name == "_convolve")
    check(transpose)
    assert transpose.compile().programs_per_sm == 3


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_long_sum_of_few_positions_is_cut_in_parts(architecture: str) -> None:
    """Which two small launches add up: 64 programs would leave half of the device idle."""
    found = launches_of(SHAPES["resnet12/block4"], architecture)["forward"]
    names = [launch.name for launch in found]
    assert names == ["_pack", "_convolve", "_add_parts", "_moments", "_merge_moments", "_activate"]
    convolve, add, moments = found[1:4]
    assert convolve.programs == 4 * 64
    for launch in (add, moments):
        check(launch)
        assert launch.compile().count("LDG.E.128"), launch.name


@pytest.mark.parametrize("name", ["conv4-48/layer2", "resnet12/block2-first"])
def test_machine_code_of_the_sums_behind_another_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXGRAD_CONVOLUTION", "unfold")
    for architecture in ("sm_80", "sm_90"):
        found = launches_of(SHAPES[name], architecture)
        names = [[launch.name for launch in found[what]] for what in ("forward", "double_backward")]
        assert names == [
            ["_moments", "_merge_moments", "_activate"],
            ["_channel_table", "_second", "_merge", "_second"],
        ]
        for launch in (found["forward"][0], found["double_backward"][1]):
            check(launch)
            assert launch.compile().programs_per_sm >= 2


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_machine_code_of_fast_products(precision: str) -> None:
    for launch in most(heavy(launches_of(SHAPES["conv4-48/layer2"], "sm_90", precision=precision))):
        check(launch)
        if precision == "tf32":  # what keeps a NaN one (tests/test_not_numbers.py)
            assert launch.compile().count("FFMA"), launch.name


def test_a_weight_gradient_of_tf32_fits_three_times_on_sm_80() -> None:
    (launch,) = heavy(launches_of(SHAPES["conv4-48/layer2"], "sm_80", precision="tf32"))[2:3]
    check(launch)
    assert launch.name == "_weight_gradient"
    assert launch.compile().programs_per_sm == 3


def test_blocks_of_a_float32_sum_are_added_outside_the_tensor_cores() -> None:
    """Which round towards zero: the compiler must not fold the addition into the product."""
    (launch,) = (launch for launch in heavy(launches_of(SHAPES["conv4-48/layer2"], "sm_90"))[:1])
    code = launch.compile()
    assert re.findall(r"tt\.dot.*maxNumImpreciseAcc = 1", code.ttir)
    assert code.count("FADD") >= 128 * 64 // (32 * code.num_warps)


def test_machine_code_in_float64() -> None:
    """For gradient checks on the device."""
    for launch in most(heavy(launches_of(SHAPES["conv4-48/layer4"], "sm_90", torch.float64))):
        check(launch)
