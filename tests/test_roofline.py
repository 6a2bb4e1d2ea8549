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
from layers import Asked, Layer, layers
from measure import count_operators
from passes import passes_of
from roofline import Cost, Peaks, dense_cost, measured_peaks, step_cost, time_floor
from torch.utils.flop_counter import FlopCounterMode

from cxgrad_fast import Config, Learner, preset, reference
from cxgrad_fast.config import ALGORITHMS

# one filter, grey 16x16: units of 4608, 1152, 288 and 72 FLOPs an image, a quarter of 1152 in the first, a head of 4
SMALL = {"model.filters": 1, "model.channels": 1, "model.image_size": 16, "task.ways": 2, "task.queries": 1}
CASES: dict[str, dict[str, object]] = {
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
# the other algorithms; their settings where the defaults would leave something out
OTHERS: dict[str, dict[str, object]] = {
    **{name: {"inner.algorithm": name} for name in ("alfa", "anil", "cavia", "fomaml", "l2f", "metasgd", "modgrad")},
    **{name: {"inner.algorithm": name} for name in ("protomaml", "protonet")},
    "protomaml_first_order": {"inner.algorithm": "protomaml", "inner.order": 1},
    "anil_joint": {"inner.algorithm": "anil", "inner.joint": True},
    "anil_first_order": {"inner.algorithm": "anil", "inner.order": 1},
    "anil_joint_first_order": {"inner.algorithm": "anil", "inner.joint": True, "inner.order": 1},
    "boil": {"inner.algorithm": "boil", "inner.head_learning_rate": 0.1},
    "cavia_first_layer_and_head": {
        "inner.algorithm": "cavia",
        "inner.layers": "0,3",
        "inner.context_at_head": True,
        "inner.hidden": True,
    },
    "cavia_head": {"inner.algorithm": "cavia", "inner.layers": "3", "inner.context_at_head": True, "inner.order": 1},
    "l2f_embedding_in_graph": {"inner.algorithm": "l2f", "inner.embedding_in_graph": True},
    "mamlpp": {"inner.algorithm": "mamlpp", "inner.multi_step_iterations": 10, "inner.first_order_iterations": 1},
    "modgrad_three_rounds": {"inner.algorithm": "modgrad", "inner.steps": 3, "inner.layers": "0,2"},
    "modgrad_first_order": {"inner.algorithm": "modgrad", "inner.order": 1},
    "l2f_resnet12": {"inner.algorithm": "l2f", "model.backbone": "resnet12", "model.filters": 2},
    "anil_resnet12": {"inner.algorithm": "anil", "model.backbone": "resnet12", "model.filters": 2},
}
CASES |= OTHERS


def by_hand(**overrides: Any) -> Config:
    settings = SMALL | {"inner.steps": 1, "outer.meta_batch": 1}
    return config_of(**overrides).override(settings)


def of_case(case: str) -> Config:
    config = config_of(inner__algorithm=CASES[case].get("inner.algorithm", "cxgrad"), outer__meta_batch=1)
    return config.override({"inner.steps": 2} if "inner.steps" in config.flat() else {}, CASES[case])


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


FIRST = 1152  # of the first layer's units, what is needed where the pool chose


@pytest.mark.parametrize(
    ("settings", "once", "passes", "second"),
    [
        # a layer: forward and backward; of a pass, forward and the gradients that lead on; twice differentiated
        ({"algorithm": "anil"}, 4608 + FIRST + 3 * (1152 + 288 + 72), 2 * 4, 4 * 4),
        ({"algorithm": "anil", "order": 1}, 4608 + 1152 + 288 + 72, 2 * 4, 0),
        ({"algorithm": "cavia", "layers": "2"}, 4608 + FIRST + 3 * (1152 + 288), 2 * (72 + 4), 4 * (72 + 4)),
        ({"algorithm": "cavia", "layers": "2", "order": 1}, 4608 + 1152 + 288, 2 * (72 + 4), 0),
        (
            {"algorithm": "modgrad", "layers": "2,3", "mixtures": 2},
            4608 + FIRST + 3 * 1152,
            2 * 288 + 3 * 72 + 2 * 4,
            4 * 288 + 6 * 72 + 4 * 4,
        ),
    ],
)
def test_what_all_passes_have_in_common_is_computed_once(
    settings: dict[str, Any], once: int, passes: int, second: int
) -> None:
    config = by_hand(**{f"inner__{name}": value for name, value in settings.items()})
    query = 4608 + FIRST + 3 * (1152 + 288 + 72 + 4)
    expected = {"computed once": once, "support passes": passes, "second backward": second, "query pass": query}
    found = {name: flops for name, (flops, _) in step_cost(config).by("phase").items()}
    assert found == {name: 2 * flops for name, flops in expected.items() if flops} | {"updates": 0}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_a_limit(algorithm: str) -> None:
    config = config_of(inner__algorithm=algorithm)
    assert 0 < step_cost(config).flops <= dense_cost(config).flops
    assert 0 < step_cost(config).bytes <= dense_cost(config).bytes


def test_the_query_set_is_asked_after_every_step_of_mamlpp_s_first_phase() -> None:
    config = config_of(inner__algorithm="mamlpp", inner__steps=3, inner__multi_step_iterations=5)
    late, early = (step_cost(config, iteration).by("phase")["query pass"] for iteration in (None, 4))
    assert early == tuple(3 * count for count in late)
    assert step_cost(config, 5) == step_cost(config)


def test_the_tasks_of_meta_training_are_counted() -> None:
    """ProtoNet trains on more classes than it is tested on."""
    trained, tested = ({"task__train_ways": 7, "task__train_shots": 3}, {"task__ways": 7, "task__shots": 3})
    costs = [step_cost(config_of(inner__algorithm="protonet", **words)) for words in (trained, tested)]
    assert costs[0] == costs[1]


def test_first_order_iterations_have_no_second_backward() -> None:
    config = config_of(inner__algorithm="l2f", inner__first_order_iterations=5)
    assert "second backward" not in step_cost(config, 4).by("phase")
    assert step_cost(config, 5) == step_cost(config)


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
    layer = Layer("", weight=9, positions=64, read=64, written=64, below=frozenset({"images"}), pooled=16)
    work = layer.second_backward(Asked(below=True, weight=True, here=True))
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


@pytest.mark.parametrize("iteration", [None, 0])
@pytest.mark.parametrize("case", CASES)
def test_dense_is_what_torch_counts_of_the_oracle(case: str, iteration: int | None) -> None:
    """Exactly, but for one thing: where a weight gradient is differentiated, the framework also computes the gradient
    in its input, for the images too, which nobody asked for: one unit of each layer on the images."""
    config = of_case(case)
    learner, episodes = Learner(config), random_episodes(config, tasks=1)

    def oracle() -> None:
        loss = reference.meta_loss(config, learner.meta_parameters, episodes, iteration).loss
        gradients(loss, learner.meta_parameters)

    counted = flops_of(oracle)
    dense = dense_cost(config, iteration)
    head = dense.by("layer").get("head", (0, 0))[0]
    if config.inner.algorithm != "modgrad":  # whose masks, which are not counted, are matrix products too
        assert sum(count for operator, count in counted.items() if "conv" not in operator) == head
    assert convolutions(counted) == dense.flops - head + unasked(config, iteration)


def unasked(config: Config, iteration: int | None = None) -> int:
    """FLOPs of the images' gradient in the framework's differentiation of weight gradients."""
    units = 0
    for layer in layers(config):
        if isinstance(layer, Layer) and not layer.below:
            passes = passes_of(config, iteration, dense=True).passes
            units += sum(each.times * each.second for each in passes if layer.name in each.weights) * layer.unit
    return units * config.task.ways * config.task.shots


@pytest.mark.parametrize("case", [case for case in CASES if case not in OTHERS])
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
    for layer in layers(config):
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
