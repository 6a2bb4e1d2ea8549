"""The counts against hand-computed cases, torch's FLOP counter and MATH.md's table; regression of the engine's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import peaks
import pytest
import roofline
import torch
from helpers import config_of, gradients, random_episodes, require_cpp
from measure import count_operators
from roofline import Cost, Layer, Peaks, dense_cost, measured_peaks, step_cost, time_floor
from torch.utils.flop_counter import FlopCounterMode

from cxgrad_fast import Config, Learner, preset, reference

# one filter, grey 16x16: units of 4608, 1152, 288 and 72 FLOPs an image, a quarter of 1152 in the first, a head of 4
SMALL = {"model.filters": 1, "model.channels": 1, "model.image_size": 16, "task.ways": 2, "task.queries": 1}
CASES = {
    "cxgrad": {},
    "second_order_context": {"inner.initial_context_order": 2},
    "first_order": {"inner.order": 1},
    "maml": {"inner.algorithm": "maml"},
    "step_wise": {"inner.context_update": "step", "inner.initial_context_order": 2},
    "step_wise_first_order_context": {"inner.context_update": "step"},
    "no_step": {"inner.steps": 0, "inner.initial_context_order": 2},
    "group_norm": {"model.norm": "group", "model.norm_groups": 2},
    "five_shot_grey": {"task.shots": 5, "model.channels": 1, "task.ways": 2, "inner.steps": 1},
    "odd_rows_kept": {"model.pool_ceil": True},
    "resnet12": {"model.backbone": "resnet12", "model.filters": 2},
    "resnet12_released": {
        "model.backbone": "resnet12",
        "model.block_filters": "2,4,3,5",
        "inner.initial_context_order": 2,
        "model.pool_last": False,
        "model.pool_padding": "0,0,1,1",
    },
}


def by_hand(**overrides: Any) -> Config:
    settings = SMALL | {"inner.steps": 1, "outer.meta_batch": 1}
    return config_of(**overrides).override(settings)


def of_case(case: str) -> Config:
    return config_of(inner__steps=2, outer__meta_batch=1).override(CASES[case])


def flops_of(run: Callable[[], object]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}


def convolutions(counts: dict[str, int]) -> int:
    return sum(count for operator, count in counts.items() if "conv" in operator)


def test_flops_by_hand() -> None:
    others = 1152 + 288 + 72
    head = 4
    assert {name: flops for name, (flops, _) in step_cost(by_hand()).by("phase").items()} == {
        "context pass": 2 * (4608 + 2 * (others + head)),
        "support passes": 2 * (4608 + 1152 + 3 * (others + head)),
        "second backward": 2 * (1152 + 1152 + 6 * (others + head)),
        "query pass": 2 * (4608 + 1152 + 3 * (others + head)),
        "updates": 0,
    }
    assert {name: flops for name, (flops, _) in dense_cost(by_hand()).by("phase").items()} == {
        "context pass": 2 * (2 * 4608 + 3 * others + 2 * head),
        "support passes": 2 * (2 * 4608 + 3 * (others + head)),
        "second backward": 2 * (2 * 4608 + 6 * (others + head)),
        "query pass": 2 * (2 * 4608 + 3 * (others + head)),
        "updates": 0,
    }
    again = step_cost(by_hand(inner__initial_context_order=2)).by("phase")["second backward"][0]
    assert again - step_cost(by_hand()).by("phase")["second backward"][0] == 2 * (1152 + 4 * (others + head))


def test_bytes_by_hand() -> None:
    """First-order MAML in float32: one support and one query pass of two images each, one step."""
    config = by_hand(inner__algorithm="maml", inner__order=1, run__precision="float32")
    layers = {name: moved for name, (_, moved) in step_cost(config).by("layer").items()}
    # closed: x 256, w 9 -> p 64 and its arg-max bytes; back: x, p, arg-max, q 64 -> dw 9
    assert layers["features.0"] == 4 * (4 * (256 + 64) + 64 + 4 * (256 + 64 + 64) + 64) + 2 * 4 * (9 + 9)
    # x 64, w 9 -> y 64, p 16; back: x, w, y, q 16 -> dx 64, dw 9
    assert layers["features.1"] == 4 * 4 * (64 + 64 + 16 + 64 + 64 + 16 + 64) + 2 * 4 * (9 + 9 + 9)
    adapted = 4 * 9 + 2
    assert layers["all"] == 4 * (3 * adapted + 7 * adapted)


def test_second_backward_bytes_by_hand() -> None:
    layer = Layer("", weight=9, positions=64, read=64, written=64, pooled=16)
    work = layer.second_backward(True)
    tangent = 64 + 64 + 64 + 16 + 64 + 16  # x, X, y, q -> u, next X
    assert work.elements == tangent + 64 + 64 + 64 + 64 + 16 + 16 + 64  # x, X, y, u, q, p' -> x'
    assert (work.weights, work.single, work.flops) == (5 * 9, 0, 6 * 2 * 9 * 64)  # w, W twice -> w'


def test_residual_end_counts_traffic_alone() -> None:
    parts = [part for part in step_cost(of_case("resnet12")).parts if part.layer.endswith(".end")]
    assert parts
    assert all(part.flops == 0 < part.bytes for part in parts)


@pytest.mark.parametrize(("shots", "dense", "least"), [(5, 149, 139), (1, 49, 46)])
def test_table_of_the_mathematics(shots: int, dense: int, least: int) -> None:
    """MATH.md 4, which has one sparse weight gradient of the first layer a support pass where two are needed."""
    config = preset(f"released-mini-5w{shots}s", {"outer.meta_batch": 1})
    assert round(dense_cost(config).flops / 1e9) == dense
    quarter = 2 * 27 * 48 * 42 * 42
    forgotten = config.inner.steps * 5 * shots * quarter
    assert round((step_cost(config).flops - forgotten) / 1e9) == least
    assert forgotten < 0.005 * step_cost(config).flops


@pytest.mark.parametrize("case", CASES)
def test_dense_is_what_torch_counts_of_the_oracle(case: str) -> None:
    """Exactly, but for one thing: where a weight gradient is differentiated, the framework also computes the gradient
    in its input, for the images too, which nobody asked for: one unit of each layer on the images."""
    config = of_case(case)
    learner, episodes = Learner(config), random_episodes(config, tasks=1)

    def oracle() -> None:
        gradients(reference.meta_loss(config, learner.meta_parameters, episodes).loss, learner.meta_parameters)

    counted = flops_of(oracle)
    by_layer = dense_cost(config).by("layer")
    head = by_layer["head"][0]
    assert sum(count for operator, count in counted.items() if "conv" not in operator) == head
    assert convolutions(counted) == dense_cost(config).flops - head + unasked(config)


def unasked(config: Config) -> int:
    """FLOPs of the images' gradient in the framework's differentiation of weight gradients."""
    inner, units = config.inner, 0
    if inner.order == 1 or not inner.steps:
        return 0
    contexts = {"task": 1, "step": inner.steps}[inner.context_update] if inner.algorithm == "cxgrad" else 0
    for layer in roofline.layers(config):
        if isinstance(layer, Layer) and layer.on_images:
            differentiated = inner.steps + (
                contexts if contexts and layer.scaled and inner.initial_context_order == 2 else 0
            )
            units += differentiated * layer.unit
    return units * config.task.ways * config.task.shots


@pytest.mark.parametrize("case", CASES)
def test_the_engine_never_needs_more(case: str) -> None:
    """Regression of the engine's own convolution FLOPs (exact form, reference operators, one task).

    It saves the context pass's weight gradients (from the second layer on where the first folds its scale into the
    weight), and two of six units where that pass is differentiated. The C++ operators: tests/test_engine_counts.py.
    """
    config = of_case(case).override({"run.backend": "reference"})
    learner, episodes = Learner(config), random_episodes(config, tasks=1)
    counted = convolutions(
        flops_of(lambda: gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)),
    )
    inner, saved = config.inner, 0
    contexts = {"task": 1, "step": inner.steps}[inner.context_update] if inner.algorithm == "cxgrad" else 0
    again = bool(contexts) and inner.order == 2 and inner.initial_context_order == 2 and inner.steps > 0
    for layer in roofline.layers(config):
        if isinstance(layer, Layer) and layer.scaled and not layer.closed:
            # first: wgrad; again: conv(x, W) and, but on images, dgrad(dy, W), with the framework's unasked one there
            saved += contexts * (1 + 2 * again) * layer.unit
    dense = dense_cost(config)
    expected = dense.flops - dense.by("layer")["head"][0] + unasked(config)
    assert counted == expected - saved * config.task.ways * config.task.shots


def test_operator_calls_of_a_meta_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a layer and pass, one normalisation a step, whatever the number of tasks."""
    calls: dict[str, int] = {}
    for name in ("conv_block", "normalize_weights", "patch_statistics", "scale_weights", "residual_end"):
        module = importlib.import_module(f"cxgrad_fast.kernels.{name}.op")
        for backend, function in module._IMPLEMENTATIONS.items():

            def counting(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
                calls[_name] = calls.get(_name, 0) + 1
                return _function(*args, **kwargs)

            monkeypatch.setitem(module._IMPLEMENTATIONS, backend, counting)
    config = config_of(inner__steps=5)
    Learner(config).meta_step(random_episodes(config, tasks=3))
    assert calls == {"conv_block": 4 * (1 + 5 + 1), "normalize_weights": 1 + 5, "patch_statistics": 2}


@pytest.mark.parametrize(("backend", "written"), [("reference", 7077), ("cpp", 2523)])
def test_launches_do_not_grow_with_tasks(backend: str, written: int) -> None:
    """All tasks are one tensor program, but where the framework differentiates a grouped convolution: it slices by
    group. And five steps do not grow unnoticed: that many operators reached the dispatcher when this was written."""
    if backend == "cpp":
        require_cpp()

    def launches(tasks: int) -> int:
        config = config_of(inner__steps=5, run__backend=backend)
        learner, episodes = Learner(config), random_episodes(config, tasks)
        return count_operators(lambda: gradients(learner.meta_loss(episodes).loss, learner.meta_parameters))

    two = launches(2)
    assert two == launches(2) <= 1.05 * written
    assert launches(4) < (1.03 if backend == "reference" else 1.0001) * two


def test_scaling() -> None:
    config = preset("glyphs-5w1s", {"outer.meta_batch": 2})
    two, four = step_cost(config), step_cost(config.override({"outer.meta_batch": 4}))
    assert four.flops == 2 * two.flops
    assert two.tasks == 2
    half = step_cost(config.override({"run.precision": "bfloat16"}))
    assert half.flops == two.flops
    assert two.bytes / 2 < half.bytes < two.bytes  # arg-max bytes stay
    for settings in ({"inner.steps": 6}, {"task.shots": 2}, {"task.queries": 16}, {"model.filters": 33}):
        assert step_cost(config.override(settings)).flops > two.flops
    assert step_cost(config).flops < dense_cost(config).flops
    assert step_cost(config).bytes < dense_cost(config).bytes


def test_time_floor() -> None:
    cost = Cost(1, (roofline.Part("query pass", "head", 1000, 10),))
    assert time_floor(cost, Peaks(flops=100, bandwidth=100)) == 10
    assert time_floor(cost, Peaks(flops=100, bandwidth=0.5)) == 20


def test_peaks_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "WIDEST", 512)
    single, double = (measured_peaks("cpu", dtype) for dtype in (torch.float32, torch.float64))
    assert single is measured_peaks("cpu", torch.float32)
    assert min(single.flops, double.flops, single.bandwidth) > 1e8
    assert single.flops > 0.7 * double.flops
    assert single.bandwidth == double.bandwidth
    peaks._measured_peaks.cache_clear()


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(roofline, "peaks_for", lambda precision, device: Peaks(1e9, 1e9))
    assert roofline.main(["--preset", "released-mini-5w5s", "--run.device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "an episode: 140.02 GFLOP" in printed
    assert "second backward" in printed
    assert "bfloat16" in printed
    assert roofline.main(["--preset", "released-mini-5w5s", "--dense", "--run.device", "cpu"]) == 0
    assert "an episode: 149.04 GFLOP" in capsys.readouterr().out
