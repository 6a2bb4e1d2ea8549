"""The presets: what they hold, and that each released value names its source."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from cxgrad_fast import Config, preset
from cxgrad_fast.config import PRESETS, from_toml

_SAME_PROGRAM = {  # what MAML++, ALFA and L2F share with CxGrad's program
    "task.queries": 15,
    "model.filters": 48,
    "model.slope": 0.01,
    "model.image_size": 84,
    "inner.steps": 5,
    "inner.order": 2,
    "outer.learning_rate": 1e-3,
    "outer.iterations": 50_000,
    "outer.validate_every": 500,
    "outer.reduction": "mean",
    "outer.schedule": "constant",
    "outer.restart_every": 0,
    "data.sampler": "released",
    "evaluation.ensemble": 5,
    "evaluation.validation_tasks": 600,
    "evaluation.test_tasks": 600,
    "evaluation.statistics": "transductive",
}
_OTHER_PROGRAMS = _SAME_PROGRAM | {  # 64 filters, ReLU, biases, one model tested
    "model.filters": 64,
    "model.slope": 0.0,
    "model.conv_bias": True,
    "outer.clip_value": 0.0,
    "data.sampler": "counter",
    "evaluation.ensemble": 1,
}
_PLAIN = {"model.conv_bias": False, "outer.clip_value": 0.0, "data.normalize": "none"}
_CLAMPED = {"outer.clip_value": 10.0, "outer.clip": "network", "outer.clip_norm": 0.0, "data.normalize": "imagenet"}
# of the released programs, miniImageNet: what is the same for 1 and 5 shots, and outer.meta_batch of 1 and of 5 shots
_RELEASED: dict[str, tuple[dict[str, object], int, int]] = {
    "maml": (_SAME_PROGRAM | _PLAIN | {"inner.learning_rate": 0.01}, 4, 2),
    "fomaml": (_SAME_PROGRAM | _PLAIN | {"inner.learning_rate": 0.01, "inner.order": 1}, 4, 2),
    "mamlpp": (
        _SAME_PROGRAM
        | _CLAMPED
        | {
            "model.conv_bias": True,
            "inner.learning_rate": 0.1,
            "inner.first_order_iterations": 0,
            "inner.multi_step_iterations": 7500,
            "inner.multi_step_epoch": 500,
        },
        2,
        2,
    ),
    "l2f": (
        _SAME_PROGRAM
        | _CLAMPED
        | {
            "model.conv_bias": False,
            "inner.learning_rate": 0.01,
            "inner.first_order_iterations": 5500,
            "inner.embedding_in_graph": False,
            "outer.reduction": "sum",
            "outer.iterations": 30_000,
            "evaluation.ensemble": 3,
        },
        4,
        2,
    ),
    "alfa": (
        _SAME_PROGRAM
        | _PLAIN
        | {
            "model.conv_bias": True,
            "inner.learning_rate": 0.01,
            "inner.weight_decay": 0.0005,
            "inner.random_init": False,
            "inner.first_order_iterations": 0,
            "data.normalize": "imagenet",
        },
        4,
        2,
    ),
    "boil": (
        _OTHER_PROGRAMS
        | {
            "inner.steps": 1,
            "inner.learning_rate": 0.5,
            "inner.head_learning_rate": 0.0,
            "outer.iterations": 30_000,
            "outer.validate_every": 100,
            "outer.restart_every": 100,
            "data.normalize": "none",
            "evaluation.validation_tasks": 100,
            "evaluation.test_tasks": 10_000,
        },
        4,
        4,
    ),
    "anil": (
        {name: value for name, value in _OTHER_PROGRAMS.items() if name != "task.queries"}  # as many as shots
        | {
            "inner.joint": True,
            "inner.learning_rate": 0.1,
            "outer.iterations": 1000,
            "outer.validate_every": 50,
            "data.normalize": "none",
        },
        32,
        32,
    ),
    "metasgd": (
        _OTHER_PROGRAMS
        | {
            "task.queries": 10,
            "inner.steps": 1,
            "inner.learning_rate": 1e-3,
            "outer.iterations": 60_000,
            "outer.validate_every": 100,
            "data.normalize": "none",
            "evaluation.validation_tasks": 100,
        },
        4,
        2,
    ),
    "cavia": (
        _OTHER_PROGRAMS
        | {
            "model.filters": 32,
            "inner.steps": 2,
            "inner.learning_rate": 1.0,
            "inner.context_dim": 100,
            "inner.layers": [2],
            "inner.hidden": False,
            "inner.context_at_head": False,
            "outer.iterations": 60_000,
            "outer.validate_every": 100,
            "outer.schedule": "step",
            "outer.schedule_every": 5000,
            "outer.schedule_factor": 0.9,
            "outer.clip_value": 10.0,
            "outer.clip": "all",
            "data.normalize": "imagenet",
            "evaluation.validation_tasks": 500,
            "evaluation.test_tasks": 500,
        },
        4,
        2,
    ),
    "modgrad": (
        _OTHER_PROGRAMS
        | {
            "inner.steps": 2,
            "inner.learning_rate": 0.1,
            "inner.context_dim": 300,
            "inner.mixtures": 5,
            "inner.layers": [-2, -1],
            "outer.iterations": 16_500,
            "outer.validate_every": 990,
            "outer.reduction": "sum",
            "outer.schedule": "step",
            "outer.schedule_every": 6600,
            "outer.schedule_factor": 0.5,
            "data.normalize": "imagenet",
            "evaluation.validation_tasks": 400,
            "evaluation.test_tasks": 1000,
        },
        3,
        3,
    ),
}
_WITHOUT_INNER_LOOP: dict[str, object] = {  # one task a step, scored under running statistics
    name: value for name, value in _OTHER_PROGRAMS.items() if not name.startswith(("inner.", "task."))
} | {"outer.validate_every": 100, "evaluation.validation_tasks": 100, "evaluation.statistics": "running"}
_RELEASED["protomaml"] = (
    {name: value for name, value in _OTHER_PROGRAMS.items() if name != "model.conv_bias"}
    | {
        "inner.learning_rate": 0.01,
        "inner.order": 1,
        "outer.learning_rate": 1e-4,
        "outer.iterations": 75_000,
        "data.normalize": "none",
        "evaluation.statistics": "support",
    },
    1,
    1,
)
_RELEASED["protonet"] = (
    _WITHOUT_INNER_LOOP
    | {
        "task.queries": 15,
        "task.train_shots": 0,
        "task.train_queries": 15,
        "inner.distance": "squared",
        "inner.joint": True,
        "inner.statistics_momentum": 0.1,
        "outer.iterations": 1_000_000,
        "outer.schedule": "step",
        "outer.schedule_every": 2000,
        "outer.schedule_factor": 0.5,
        "data.normalize": "none",
    },
    1,
    1,
)
_RELEASED["reptile"] = (
    _OTHER_PROGRAMS
    | {
        "task.queries": 1,
        "task.train_shots": 15,
        "model.filters": 32,
        "model.norm_eps": 1e-3,
        "model.pool_ceil": True,
        "model.channels_last": True,
        "inner.steps": 8,
        "inner.batch": 10,
        "inner.learning_rate": 1e-3,
        "inner.order": 1,
        "inner.reduction": "sum",
        "inner.optimizer": "adam",
        "inner.moments": "carried",
        "outer.optimizer": "sgd",
        "outer.learning_rate": 1.0,
        "outer.final_learning_rate": 0.0,
        "outer.schedule": "linear",
        "outer.iterations": 100_000,
        "outer.validate_every": 1000,
        "data.normalize": "none",
        "evaluation.steps": 50,
        "evaluation.validation_tasks": 100,
        "evaluation.test_tasks": 10_000,
    },
    5,
    5,
)
_RELEASED["matchingnet"] = (
    _WITHOUT_INNER_LOOP
    | {
        "task.queries": 15,
        "task.train_ways": 0,
        "task.train_queries": 16,
        "inner.full_context": True,
        "inner.attention": "cosine",
        "inner.joint": True,
        "inner.statistics_momentum": 0.1,
        "data.normalize": "imagenet",
    },
    1,
    1,
)
_RELEASED["relationnet"] = (
    _WITHOUT_INNER_LOOP
    | {
        "task.train_ways": 0,
        "inner.joint": False,
        "inner.shots_rule": "sum",
        "inner.relation_padding": 0,
        "inner.loss": "mse",
        "inner.statistics_momentum": 1.0,
        "inner.relation_momentum": 1.0,
        "outer.iterations": 500_000,
        "outer.validate_every": 5000,
        "outer.schedule": "step",
        "outer.schedule_every": 100_000,
        "outer.clip_norm": 0.5,
        "outer.clip": "apart",
        "data.normalize": "relationnet",
        "evaluation.validation_tasks": 600,
        "evaluation.statistics": "transductive",
    },
    1,
    1,
)
# what differs between 1 and 5 shots beside the shots
_BY_SHOTS: dict[str, dict[int, dict[str, object]]] = {
    "anil": {1: {"task.queries": 1}, 5: {"task.queries": 5}},
    "protonet": {1: {"task.train_ways": 30}, 5: {"task.train_ways": 20}},
    "matchingnet": {1: {"outer.iterations": 60_000}, 5: {"outer.iterations": 40_000}},
    "relationnet": {
        1: {"task.queries": 3, "task.train_queries": 15},
        5: {"task.queries": 5, "task.train_queries": 10},
    },
    "reptile": {1: {"inner.evaluation_batch": 5}, 5: {"inner.evaluation_batch": 15}},
}
# where tieredImageNet has other values than miniImageNet
_RELEASED_TIERED = {name: {"outer.iterations": 125_000, "model.filters": 64} for name in ("maml", "fomaml")}


@pytest.mark.parametrize("algorithm", _RELEASED)
def test_released_presets_of_the_other_algorithms(algorithm: str) -> None:
    same, one_shot, five_shots = _RELEASED[algorithm]
    for shots, batch in ((1, one_shot), (5, five_shots)):
        for dataset, changed in (("mini", {}), ("tiered", _RELEASED_TIERED.get(algorithm, {}))):
            flat = preset(f"released-{algorithm}-{dataset}-5w{shots}s").flat()
            expected = same | changed | {"inner.algorithm": algorithm, "task.ways": 5, "task.shots": shots}
            expected |= {"outer.meta_batch": batch, "data.root": f"datasets/{dataset}_imagenet"}
            expected |= _BY_SHOTS.get(algorithm, {}).get(shots, {})
            assert {name: flat[name] for name in expected} == expected


@pytest.mark.parametrize("algorithm", _RELEASED)
def test_glyphs_presets_have_one_budget(algorithm: str) -> None:
    for shots in (1, 5):
        base, config = preset(f"glyphs-5w{shots}s"), preset(f"glyphs-{algorithm}-5w{shots}s")
        assert config.inner.algorithm == algorithm
        few = algorithm == "reptile" and shots == 1  # images for its minibatches
        task = dataclasses.replace(base.task, train_shots=5) if few else base.task
        assert (config.task, config.data) == (task, base.data)
        assert (config.model.filters, config.model.image_size) == (32, 28)
        assert (config.outer.meta_batch, config.outer.iterations) == (base.outer.meta_batch, base.outer.iterations)
    one, five = (preset(f"glyphs-{algorithm}-5w{shots}s").inner for shots in (1, 5))
    assert (one.steps, one.learning_rate, one.order) == (five.steps, five.learning_rate, five.order)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("released-")])
def test_every_value_of_a_released_preset_names_its_source(name: str) -> None:
    lines = PRESETS[name].read_text().splitlines()
    for before, line in itertools.pairwise(["", *lines]):
        if line and not line.startswith("["):
            assert "#" in line or before.startswith("#"), line


def test_released_and_paper_presets_of_cxgrad() -> None:
    for shots, batch in ((1, 4), (5, 2)):
        for dataset, iterations in (("mini", 50_000), ("tiered", 125_000)):
            config = preset(f"released-{dataset}-5w{shots}s")
            assert (config.task.ways, config.task.shots, config.task.queries) == (5, shots, 15)
            assert (config.model.filters, config.model.slope, config.model.image_size) == (48, 0.01, 84)
            assert (config.outer.meta_batch, config.outer.iterations) == (batch, iterations)
            assert (config.outer.learning_rate, config.inner.learning_rate) == (1e-3, 0.01)
            assert (config.inner.steps, config.inner.context_learning_rate, config.inner.context_dim) == (5, 1.0, 100)
            assert (config.inner.initial_context_order, config.outer.reduction) == (1, "mean")
            assert (config.data.normalize, config.data.sampler) == ("none", "released")
            paper = preset(f"paper-{dataset}-5w{shots}s")
            assert (paper.model.slope, paper.outer.reduction, paper.inner.initial_context_order) == (0.0, "sum", 2)


def test_presets_are_settings_files() -> None:
    """Each reads as ``--config`` reads a file, and each is based on presets that there are."""
    for name, path in PRESETS.items():
        settings = from_toml(path)
        base = settings.pop("preset", None)
        expected = preset(str(base), settings) if base else Config().override(settings)
        assert dataclasses.replace(expected, preset=name) == preset(name)
