"""Work and traffic of recorded launches, by hand-computed numbers; nothing is compiled."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is there on Linux alone")
if triton.knobs.runtime.interpret:
    pytest.skip("machine code needs Triton's compiler: unset TRITON_INTERPRET", allow_module_level=True)

import triton_kernels  # noqa: E402

from cxgrad_fast import InputError, preset  # noqa: E402

TASKS, IMAGES, FILTERS = 2, 5, 32


@pytest.fixture(scope="module")
def rows() -> dict[str, list[triton_kernels.Row]]:
    """Of glyphs-5w1s, 28x28, by layer and pass."""
    found: dict[str, list[triton_kernels.Row]] = {}
    for row in triton_kernels.rows(preset("glyphs-5w1s"), TASKS, "sm_90", "float32"):
        found.setdefault(row.where, []).append(row)
    return found


def test_units_of_convolution(rows: dict[str, list[triton_kernels.Row]]) -> None:
    for layer, size, inputs in ((1, 28, 3), (2, 14, FILTERS), (3, 7, FILTERS), (4, 3, FILTERS)):
        unit = 2 * TASKS * IMAGES * size**2 * 9 * inputs * FILTERS
        units = [
            sum(row.flops for row in rows[f"layer {layer}, {what}"]) / unit for what in ("forward", "first", "second")
        ]
        assert units == ([1, 1, 1] if layer == 1 else [1, 2, 4])


def test_traffic_of_a_pass(rows: dict[str, list[triton_kernels.Row]]) -> None:
    """The second layer's activation: y in, output, selected value and a byte out, and a table of channels."""
    (row,) = (row for row in rows["layer 2, forward"] if row.launch.name == "_activate")
    pooled = TASKS * IMAGES * FILTERS * 7 * 7
    expected = 4 * pooled * 4 + (4 + 4 + 1) * pooled
    assert expected < row.traffic < expected + 10_000
    assert row.floor("float32") == row.traffic / 3.0e12


def test_weights_are_one_launch(rows: dict[str, list[triton_kernels.Row]]) -> None:
    assert [len(rows[f"weights, {what}"]) for what in ("scaled", "first", "second")] == [1, 1, 1]


def test_every_launch_fuses_products_and_sums(rows: dict[str, list[triton_kernels.Row]]) -> None:
    """Which Triton's default does not say from 3.10 on."""
    assert all(row.launch.options["enable_fp_fusion"] for found in rows.values() for row in found)


def test_other_backbones_are_refused() -> None:
    with pytest.raises(InputError, match="goes through conv4's blocks"):
        next(triton_kernels.rows(preset("glyphs-5w1s", {"model.backbone": "resnet12"}), 1, "sm_90", "float32"))


def test_a_tensor_counts_once() -> None:
    x = torch.empty(10, 10, device="meta")
    launch = triton_kernels.machine_code.Launch(None, (1,), (x, x[1:], 3), {"LISTS": [x.t(), None]}, "sm_90")
    assert triton_kernels.Row("", launch, 0.0).traffic == 400
