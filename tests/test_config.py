from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cxgrad_fast import Config, InputError, preset
from cxgrad_fast.config import PRESETS, from_toml


def test_overrides_of_every_kind() -> None:
    config = preset(
        "released-mini-5w1s",
        {
            "model.filters": "8",
            "task.shots": 5,
            "inner.learning_rate": "1e-2",
            "run.compile": "true",
            "model.pool_padding": "0,0,1,1",
            "data.root": Path("somewhere"),
            "outer.iterations": 3.0,
        },
    )
    assert (config.model.filters, config.task.shots, config.inner.learning_rate) == (8, 5, 0.01)
    assert (config.run.compile, config.model.pool_padding, config.data.root) == (True, (0, 0, 1, 1), "somewhere")
    assert config.outer.iterations == 3
    assert config.override({"data.seed": 7}).run.seed == 7


def test_released_presets_say_what_the_program_does() -> None:
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task.shot", 1, "unknown setting 'task.shot': did you mean 'task.shots'?"),
        ("modle.filters", 1, "did you mean 'model.filters'"),
        ("shots", 1, "did you mean 'task.shots'"),
        ("task.shots", "five", "setting 'task.shots' takes a value of type int, got 'five'"),
        ("task.shots", 1.5, "takes a value of type int, got 1.5"),
        ("task.shots", True, "takes a value of type int, got True"),
        ("run.compile", "yes", "setting 'run.compile' takes a value of type bool, got 'yes'"),
        ("inner.learning_rate", "nan", "takes a value of type float, got 'nan'"),
        ("data.root", 3, "takes a value of type str, got 3"),
        ("task.ways", 1, "setting 'task.ways' must be at least 2, got 1"),
        ("outer.learning_rate", 0, "setting 'outer.learning_rate' must be greater than 0, got 0.0"),
        ("inner.order", 3, "setting 'inner.order' takes one of 1, 2, got 3"),
        ("model.backbone", "conv5", "takes one of 'conv4', 'resnet12', got 'conv5'"),
        ("model.image_size", 15, r"setting 'model.image_size' \(=15\) pools to nothing in conv4"),
        ("model.pool_padding", "0,1", "setting 'model.pool_padding' takes four of 0 or 1"),
        ("model.pool_padding", "0,x", "takes a value of type list of whole numbers"),
        ("data.source", "folders", "takes one of 'glyphs', 'digits', 'folder'"),
        ("data.root", "", "setting 'data.root' is needed with data.source = folder"),
    ],
)
def test_bad_settings(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preset("released-mini-5w1s", {name: value})


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(InputError, match=r"'model.norm_groups' \(=8\) must divide 'model.filters' \(=12\)"):
        preset("glyphs-5w1s", {"model.norm": "group", "model.filters": 12})
    with pytest.raises(InputError, match=r"needs model\.norm = batch"):
        preset("glyphs-5w1s", {"model.norm": "layer", "evaluation.statistics": "support"})


def test_image_sizes_that_just_do() -> None:
    assert preset("glyphs-5w1s", {"model.image_size": 16}).model.image_size == 16
    small = {"model.backbone": "resnet12", "model.image_size": 8, "model.pool_last": False}
    assert preset("glyphs-5w1s", small).model.image_size == 8
    with pytest.raises(InputError, match="pools to nothing in resnet12"):
        preset("glyphs-5w1s", small | {"model.pool_last": True})


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="unknown preset 'glyph-5w1s': did you mean 'glyphs-5w1s'"):
        preset("glyph-5w1s")


@pytest.mark.parametrize("name", PRESETS)
def test_toml_gives_the_same_back(name: str, tmp_path: Path) -> None:
    config = preset(name, {"model.pool_padding": "0,0,1,1", "data.root": 'odd "folder"\\name'})
    (tmp_path / "c.toml").write_text(config.to_toml())
    settings = from_toml(tmp_path / "c.toml")
    assert preset(str(settings.pop("preset")), settings) == config


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the settings file"):
        from_toml(tmp_path / "missing.toml")
    (tmp_path / "c.toml").write_text("[task\n")
    with pytest.raises(InputError, match=r"c.toml' is not TOML"):
        from_toml(tmp_path / "c.toml")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task.shots = 3  # type: ignore[misc]
