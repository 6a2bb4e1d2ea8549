from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast import Config, InputError, preset
from cxgrad_fast.config import PRESETS, MAMLConfig, from_toml
from cxgrad_fast.printable import shown

SETTINGS = sorted(Config().flat())


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
        ("model.pool_padding", "", r"'model.pool_padding' takes four of 0 or 1, one a block, got \(\)"),
        ("data.source", "folders", "takes one of 'glyphs', 'digits', 'folder'"),
        ("data.root", "", "setting 'data.root' is needed with data.source = folder"),
        ("data.root", "/data/\udcff", r"setting 'data.root' must be UTF-8 text without NUL, got '/data/\\udcff'"),
        ("data.root", "/data/\0", r"setting 'data.root' must be UTF-8 text without NUL, got '/data/\\x00'"),
        ("model.pool_padding", "0,0,1,0.5", "takes a value of type list of whole numbers, got '0,0,1,0.5'"),
        ("model.pool_padding", [0, 0, 1, 0.5], "takes a value of type list of whole numbers"),
        ("model.pool_padding", [0, 0, 1, True], "takes a value of type list of whole numbers"),
        ("model.pool_padding", b"\0\0\1\1", "takes a value of type list of whole numbers"),
        (
            "model.pool_padding",
            "0," * 2000 + "1",
            r"takes four of 0 or 1, one a block, got \(0, 0, 0, 0, 0, 0, \.\.\.\)",
        ),
        ("task.shots", "５", "takes a value of type int, got '５'"),
        ("inner.learning_rate", "０.５", "takes a value of type float, got '０.５'"),
        ("task.shots", 10**5000, "'task.shots' must be at most 100000, got a number of 16610 bits"),
        ("task.shots", "9" * 5000, r"takes a value of type int, got '9{30,60}\.\.\.9{30,60}'$"),
        ("task.shots", float("inf"), "takes a value of type int, got inf"),
        ("task.shots", torch.ones(3), "takes a value of type int"),
        ("task.shots", np.ones(3), "takes a value of type int"),
        ("task.shots", None, "takes a value of type int, got None"),
        ("outer.iterations", 2**53 + 1, "'outer.iterations' must be at most 1000000000, got 9007199254740993"),
        ("inner.learning_rate", "1e301", r"'inner.learning_rate' must be at most 1e\+300, got 1e\+301"),
        (
            "inner.learning_rate",
            1e39,
            r"'inner.learning_rate' \(=1e\+39\) must be at most 1e\+38 with run.precision = float32",
        ),
        ("inner.learning_rate", "1e999", "takes a value of type float, got '1e999'"),
        ("inner.learning_rate", 10**400, "takes a value of type float, got a number of 1329 bits"),
        ("model.norm_eps", "1e-40", "'model.norm_eps' must be at least 1e-30, got 1e-40"),
        ("run.seed", 2**32 - 104, "'run.seed' must be at most 4294967191, got 4294967192"),
        ("data.seed", 2**32, "'data.seed' must be at most 4294967191"),
        ("run.device", "mps", r"setting 'run.device' takes auto, cpu or cuda\[:index\], got 'mps'"),
        ("run.device", "meta", "setting 'run.device' takes auto, cpu or cuda"),
        ("run.device", "cuda:-1", "setting 'run.device' takes auto, cpu or cuda"),
        ("run.device", "cuda:１", "setting 'run.device' takes auto, cpu or cuda"),
        ("run.device", "cpu\n", r"setting 'run.device' takes auto, cpu or cuda\[:index\], got 'cpu\\n'"),
        ("inner.algorithm", "\x1b[31m", r"takes one of 'alfa', .*'maml'.*, got '\\x1b\[31m'"),
        ("\x1b[31m" + "x" * 5000, 1, r"^unknown setting '\\x1b\[31mx{20,60}\.\.\.x{20,60}': did you mean"),
    ],
    ids=shown,
)
def test_bad_settings(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preset("released-mini-5w1s", {name: value})


def test_each_algorithm_has_its_own_settings() -> None:
    assert preset("glyphs-5w1s", {"inner.algorithm": "fomaml"}).inner.order == 1
    with pytest.raises(InputError, match=r"'inner.context_update' belongs to cxgrad, not to maml .*which has 'inner"):
        preset("glyphs-5w1s", {"inner.algorithm": "maml", "inner.context_update": "step"})
    with pytest.raises(InputError, match=r"'inner.context_dim' belongs to cavia, cxgrad, modgrad, not to maml"):
        preset("glyphs-5w1s", {"inner.algorithm": "maml"}).override({"inner.context_dim": 3})
    with pytest.raises(InputError, match="takes one of 1, got 2"):
        preset("glyphs-5w1s", {"inner.algorithm": "fomaml", "inner.order": 2})
    with pytest.raises(InputError, match="got 'mamel': did you mean 'maml'"):
        preset("glyphs-5w1s", {"inner.algorithm": "mamel"})


def test_a_layer_that_changes_the_algorithm() -> None:
    """Words of the layers below that the new algorithm does not have are dropped, those it has stay."""
    assert preset("paper-mini-5w1s", {"inner.algorithm": "maml"}).inner == MAMLConfig("maml")
    lower = {"inner.context_dim": 3, "inner.steps": 2}
    config = preset("glyphs-5w1s", lower, {"inner.algorithm": "maml"})
    assert (config.inner.algorithm, config.inner.steps) == ("maml", 2)
    with pytest.raises(InputError, match="belongs to cavia, cxgrad, modgrad"):
        preset("glyphs-5w1s", {"inner.algorithm": "maml"}, lower)
    with pytest.raises(InputError, match=r"unknown setting 'inner.contxt_dim'"):
        preset("glyphs-5w1s", {"inner.contxt_dim": 3}, {"inner.algorithm": "maml"})
    # a Config does not say which of its values were named: what differs from the default was
    changed = preset("glyphs-5w1s", {"inner.steps": 3, "inner.order": 1, "inner.learning_rate": 0.5})
    assert changed.override({"inner.algorithm": "maml"}).inner == MAMLConfig("maml", 3, 1, 0.5)
    assert preset("glyphs-5w1s", {"inner.order": 2}).override({"inner.algorithm": "fomaml"}).inner.order == 1


def test_settings_that_do_not_fit_together() -> None:
    with pytest.raises(InputError, match=r"'model.norm_groups' \(=8\) must divide 'model.filters' \(=12\)"):
        preset("glyphs-5w1s", {"model.norm": "group", "model.filters": 12})
    with pytest.raises(InputError, match=r"needs model\.norm = batch"):
        preset("glyphs-5w1s", {"model.norm": "layer", "evaluation.statistics": "support"})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model.backbone": "conv4"}, r"'model.block_filters' \(=4,6,8,10\) is of resnet12 alone: all layers of conv4"),
        (
            {"model.block_filters": "4,6,8"},
            r"takes four numbers from 1 to 100000, one a block, or none, got \(4, 6, 8\)",
        ),
        ({"model.block_filters": "4,0,8,10"}, r"takes four numbers from 1 to 100000, .* got \(4, 0, 8, 10\)"),
        ({"model.block_filters": "4,6,8,100001"}, "takes four numbers from 1 to 100000"),
        ({"model.norm": "group", "model.norm_groups": 4}, r"'model.norm_groups' \(=4\) must divide .*block_filters"),
        ({"model.block_filters": "1,1,1,100000", "model.image_size": 10_000}, "more memory than any machine has"),
    ],
)
def test_filters_of_blocks_that_do_not_fit(settings: dict[str, object], told: str) -> None:
    resnet12 = {"model.backbone": "resnet12", "model.block_filters": (4, 6, 8, 10)}
    assert preset("glyphs-5w1s", resnet12).model.filters_by_block == (4, 6, 8, 10)
    with pytest.raises(InputError, match=told):
        preset("glyphs-5w1s", resnet12 | settings)


def test_filters_of_blocks_double_where_none_are_given() -> None:
    for none in ("", "[]", ()):
        config = preset("glyphs-5w1s", {"model.backbone": "resnet12", "model.filters": 3, "model.block_filters": none})
        assert config.model.filters_by_block == (3, 6, 12, 24)


def test_image_sizes_that_just_do() -> None:
    assert preset("glyphs-5w1s", {"model.image_size": 1, "model.pool_ceil": True}).model.sizes_by_block() == (
        1,
        1,
        1,
        1,
    )
    for name in ("pool_ceil", "channels_last"):
        with pytest.raises(InputError, match=f"setting 'model.{name}' is of conv4 alone, not of resnet12"):
            preset("glyphs-5w1s", {f"model.{name}": True, "model.backbone": "resnet12"})
    assert preset("glyphs-5w1s", {"model.image_size": 16}).model.image_size == 16
    small = {"model.backbone": "resnet12", "model.image_size": 8, "model.pool_last": False}
    assert preset("glyphs-5w1s", small).model.image_size == 8
    with pytest.raises(InputError, match="pools to nothing in resnet12"):
        preset("glyphs-5w1s", small | {"model.pool_last": True})


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="unknown preset 'glyph-5w1s': did you mean 'glyphs-5w1s'"):
        preset("glyph-5w1s")


@pytest.mark.parametrize("value", [3, 3.0, "3", " 3 ", "+3", np.int64(3), np.float32(3), Fraction(3)])
def test_whole_numbers_of_every_kind(value: object) -> None:
    assert Config().override({"task.ways": value, "inner.learning_rate": value}).task.ways == 3


def test_float64_takes_larger_numbers() -> None:
    config = preset("glyphs-5w1s", {"run.precision": "float64", "outer.learning_rate": 1e300})
    assert config.outer.learning_rate == 1e300


def test_the_largest_seed() -> None:
    assert preset("glyphs-5w1s", {"run.seed": 2**32 - 105}).run.seed == 2**32 - 105


def test_sizes_that_no_machine_has() -> None:
    for changes in (
        {"outer.meta_batch": 10**9},
        {"evaluation.tasks_per_batch": 10**9, "evaluation.test_tasks": 10**9},
        {"task.ways": 10**5, "task.queries": 10**5, "model.image_size": 10**4},
    ):
        with pytest.raises(InputError, match="need more memory than any machine has"):
            preset("glyphs-5w1s", changes)
    assert preset("glyphs-5w1s", {"evaluation.tasks_per_batch": 10**9}).evaluation.test_tasks == 600


def test_the_released_programs_seeds_come_to_an_end() -> None:
    with pytest.raises(InputError, match=r"data\.sampler = released has seeds for 4293967296 tasks"):
        preset("released-mini-5w1s", {"outer.iterations": 10**9, "outer.meta_batch": 5})
    assert preset("glyphs-5w1s", {"outer.iterations": 10**9, "outer.meta_batch": 5})


# any text or value is a setting's, or refused


def taken_or_told(action: Callable[[], Config]) -> Config | None:
    """What ``action`` returns, or None where it raises an InputError of one printable line; any other error fails."""
    try:
        return action()
    except InputError as error:
        told = str(error)
    assert told.isprintable()
    return None


_VALUES = st.one_of(
    st.text(st.characters(), max_size=30),
    st.from_regex(r"[-+]?[0-9_]{0,25}(\.[0-9]{0,5})?([eE][-+]?[0-9]{1,4})?", fullmatch=True),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.binary(max_size=8),
    st.recursive(st.integers(0, 1) | st.floats() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=5)),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(object),
)


@examples(500)
@given(st.sampled_from(SETTINGS) | st.text(max_size=20), _VALUES)
@example("data.root", 'a\nb\x7f\u2028 \\ " \U0001f600')
@example("outer.iterations", "1" * 5000)
def test_any_value_is_taken_or_refused_in_one_line(name: str, value: object) -> None:
    config = taken_or_told(lambda: Config().override({name: value}))
    if config is None:
        return
    tables = tomllib.loads(config.to_toml().encode().decode())
    settings = {f"{group}.{key}": v for group, table in tables.items() for key, v in table.items()}
    assert Config().override(settings) == config


@pytest.mark.parametrize("name", PRESETS)
def test_toml_gives_the_same_back(name: str, tmp_path: Path) -> None:
    config = preset(name, {"model.pool_padding": "0,0,1,1", "data.root": 'odd "folder"\\name\n\x1b[31m\x7f 文'})
    (tmp_path / "c.toml").write_bytes(config.to_toml().encode())
    settings = from_toml(tmp_path / "c.toml")
    assert preset(str(settings.pop("preset")), settings) == config


def test_bad_toml(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the settings file"):
        from_toml(tmp_path / "missing.toml")
    (tmp_path / "c.toml").write_text("[task\n")
    with pytest.raises(InputError, match=r"c.toml' is not TOML"):
        from_toml(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a = " + b"[" * 5000 + b"]" * 5000, r"c.toml' nests too deep: settings are group.field = value$"),
        (b"a." * 5000 + b"b = 1", "c.toml' nests too deep|unknown setting"),
        (b'[data]\nroot = "\xff"', r"c.toml' is not UTF-8 text: byte 15 is no character$"),
        ("[task]\n".encode("utf-16"), "c.toml' is not UTF-8 text"),
        (b"[task]\nways = " + b"9" * 5000, r"c.toml' is not TOML"),
        (b"\0", "c.toml' is not TOML"),
        (b"#" * (2**20 + 1), "c.toml' is not a settings file: it is larger than 1 MiB"),
        (b'[task]\n"ways\\u001b[31m" = 1', r"unknown setting 'task.ways\\x1b\[31m'"),
        (b"[[task]]\nways = 1", "unknown setting 'task': did you mean"),
        (b"[task]\nways = 1979-05-27", r"takes a value of type int, got datetime.date\(1979, 5, 27\)"),
        (b"[task.ways]\nx = 1", r"takes a value of type int, got \{'x': 1\}"),
    ],
    ids=shown,
)
def test_odd_settings_files_are_told_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "c.toml").write_bytes(data)
    with pytest.raises(InputError, match=message) as told:
        preset("glyphs-5w1s", from_toml(tmp_path / "c.toml"))
    assert str(told.value).isprintable()


@examples(200)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"[task]\nways = 5")
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(data)
    taken_or_told(lambda: preset("glyphs-5w1s", from_toml(file)))


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task.shots = 3  # type: ignore[misc]
