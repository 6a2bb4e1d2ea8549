"""bench/golden.py: every golden file is reproduced; misreadings, damaged files and other files are told."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import golden
import golden_rules
import numpy as np
import pytest
from golden_files import Golden, read
from helpers import GOLDEN, config_of

from cxgrad_fast import InputError, Learner, released

FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
_METRIC = tuple(name for name in FILES if name.startswith(("protonet", "matchingnet", "relationnet")))
ON_THE_ENGINE = ("cxgrad_5w1s_a", "fomaml_shown", "maml_5w1s", "maml_resnet12_shown", "reptile_shown", *_METRIC)


def outside(file: Golden) -> list[str]:
    return [row.key for row in golden.check(file) if row.is_outside]


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def written(path: Path, arrays: Mapping[str, Any]) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def test_files_are_all_there() -> None:
    assert len(FILES) == 28


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    rows = golden.check(read(GOLDEN / f"{name}.npz"))
    assert not [row for row in rows if row.is_outside]
    assert not [row.key for row in rows if "oracle" not in row.errors]  # not one array is left out
    if name in ON_THE_ENGINE:
        assert [row.key for row in rows if "engine" not in row.errors] in ([], ["support_logits"])
    # far below the bounds, where nothing cancels: only what Adam makes of rounding and dL/dnu are above this
    assert all(error < 1e-10 for row in rows for error in row.errors.values() if not row.vanishing)


# a file, and what a misreading of its formulas would put in the place of its settings
MISREADINGS: dict[str, tuple[str, dict[str, object]]] = {
    "maml-first-order": ("maml_5w1s", {"second_order": False}),
    "fomaml-second-order": ("fomaml_shown", {"second_order": True}),
    "cxgrad-first-order": ("cxgrad_5w1s_a", {"second_order": False}),
    "resnet12-first-order": ("maml_resnet12_shown", {"second_order": False}),
    "slope": ("maml_5w1s", {"leaky_relu_slope": 0.0}),
    "eps": ("boil_shown", {"bn_eps": 1e-3}),
    "anil-joint": ("anil_shown", {"batch_statistics": "together"}),
    "anil-apart": ("anil_joint_shown", {"batch_statistics": "apart"}),
    "boil-head-moves": ("boil_shown", {"classifier_step_size": 0.5}),
    "metasgd-first-order": ("metasgd_shown", {"second_order": False}),
    "mamlpp-next-epoch": ("mamlpp_shown", {"epoch": 7}),
    "mamlpp-last-only": ("mamlpp_shown", {"multi_step_loss": False}),
    "mamlpp-weights-after-their-epochs": ("mamlpp_last_shown", {"multi_step_loss": True}),
    "mamlpp-momentum": ("mamlpp_shown", {"bn_momentum": 0.9}),
    "l2f-embedding-in-graph": ("l2f_shown", {"embedding_in_graph": True}),
    "l2f-mean": ("l2f_shown", {"outer_reduction": "mean"}),
    "l2f-alfa-embedding-constant": ("l2f_alfa_shown", {"embedding_in_graph": False}),
    "alfa-conditioning-in-graph": ("alfa_shown", {"conditioning_gradient_in_graph": True}),
    "alfa-first-order": ("alfa_random_init_shown", {"second_order": False}),
    "cavia-first-order": ("cavia_shown", {"second_order": False}),
    "cavia-no-context-at-a-block": ("cavia_all_shown", {"context_in": [True, True, True, False, True]}),
    "modgrad-half-the-rounds": ("modgrad_rounds_shown", {"inner_step": 1}),
    "reptile-eps": ("reptile_shown", {"bn_eps": 1e-5}),
    "protonet-unsquared": ("protonet_shown", {"distance": "Euclidean (not squared)"}),
    "protonet-apart": ("protonet_shown", {"batch_statistics": "apart"}),
    "protonet-momentum": ("protonet_shown", {"bn_momentum": 0.2}),
    "matchingnet-no-context": ("matchingnet_shown", {"fce": False}),
    "relationnet-apart": ("relationnet_closerlook_shown", {"batch_statistics": "apart"}),
    "relationnet-cross-entropy": ("relationnet_closerlook_shown", {"loss_type": "softmax"}),
    "relationnet-momentum": ("relationnet_closerlook_shown", {"relation_bn_momentum": 0.1}),
}


@pytest.mark.parametrize("misreading", MISREADINGS)
def test_a_misreading_is_told(misreading: str) -> None:
    name, said = MISREADINGS[misreading]
    file = read(GOLDEN / f"{name}.npz")
    assert outside(replace(file, config={**file.config, **said}))


@pytest.mark.parametrize(
    ("name", "rule", "setting"),
    [
        ("modgrad_rounds_shown", "modgrad", {"added": True}),
        ("cxgrad_5w1s_a", "cxgrad", {"initial_context_order": 2}),
        ("cxgrad_5w1s_a", "cxgrad", {"context_update": "step"}),
    ],
)
def test_a_misreading_of_the_rule_is_told(
    name: str, rule: str, setting: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden_rules, rule, partial(getattr(golden_rules, rule), **setting))
    assert outside(read(GOLDEN / f"{name}.npz"))


def test_added_contexts_show_from_the_second_round_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the released number of rounds, set and added give the same: the README says so."""
    monkeypatch.setattr(golden_rules, "modgrad", partial(golden_rules.modgrad, added=True))
    assert not outside(read(GOLDEN / "modgrad_shown.npz"))


@pytest.mark.parametrize("name", ["alfa_shown", "l2f_shown"])
def test_rows_go_by_inner_parameters(name: str, tmp_path: Path) -> None:
    """A file may store its parameters in any order: ``inner_parameters`` says which row of a generator is whose."""
    arrays = stored(name)
    path = written(tmp_path / "reversed.npz", dict(reversed(arrays.items())))
    assert not outside(read(path))
    config = json.loads(str(arrays["config"]))
    config["inner_parameters"].reverse()
    assert outside(read(written(path, arrays | {"config": np.array(json.dumps(config))})))


OF_ALL_TASKS = ("grad/", "after/", "buffer_after/", "outer_loss", "eval_query_logits")


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("reptile")])  # its Adam goes on
def test_one_task_its_images_in_another_order(name: str, tmp_path: Path) -> None:
    """What a file stores for its second task is what that task alone gives: labels say which image is whose."""
    arrays = {key: array for key, array in stored(name).items() if not key.startswith(OF_ALL_TASKS)}
    for key in arrays:
        if key not in ("config", "msl_weights") and not key.startswith("param/"):
            arrays[key] = arrays[key][1:]
    turned = {"x_query": 1, "y_query": 1, "query_logits": 1, "step_query_logits": 2}
    if not name.startswith("matchingnet"):  # to which the supports are a sequence
        turned |= {"x_support": 1, "y_support": 1, "embedding_logits": 1, "support_logits": 2}
    arrays |= {key: np.flip(arrays[key], axis) for key, axis in turned.items() if key in arrays}
    rows = golden.check(read(written(tmp_path / "one.npz", arrays)))
    assert {"trace_loss", "query_logits"} <= {row.key for row in rows}
    assert not [row for row in rows if row.is_outside]


def other_shapes(name: str) -> dict[str, np.ndarray]:
    """The inputs of a file with other numbers of images, ways and steps, and larger images, for the same parameters."""
    arrays = {key: array for key, array in stored(name).items() if key.startswith(("param/", "x_", "y_"))}
    config = json.loads(str(stored(name)["config"]))
    if name.startswith("reptile"):
        batches = np.arange(2 * 3 * 5).reshape(2, 3, 5) % arrays["x_support"].shape[1]
        for key in ("x_support", "x_query"):  # as many features, by pools that keep odd rows
            arrays[key] = np.pad(arrays[key], [(0, 0)] * 3 + [(0, 1), (0, 1)])
        return arrays | {"batches": batches, "config": np.array(json.dumps(config)), "trace_loss": np.ones((2, 3))}
    for key in ("x", "y"):  # five of the queries become supports
        support, query = arrays[f"{key}_support"], arrays[f"{key}_query"]
        arrays[f"{key}_support"] = np.concatenate([support, query[:, :5]], 1)
        arrays[f"{key}_query"] = query[:, 5:]
    larger = {key: np.pad(arrays[key], [(0, 0)] * 3 + [(0, 1), (0, 1)]) for key in ("x_support", "x_query")}
    config |= {"image_size": larger["x_query"].shape[-1], "steps": min(config["steps"], 3)}
    return arrays | larger | {"config": np.array(json.dumps(config)), "trace_loss": np.ones((2, 1))}


@pytest.mark.parametrize("name", FILES)
def test_other_shapes(name: str, tmp_path: Path) -> None:
    """Nothing leans on the shapes and steps of the files that are here."""
    file = read(written(tmp_path / "other.npz", other_shapes(name)))
    found = golden_rules.oracle(file)
    assert all(tensor.isfinite().all() for tensor in found.values())
    if "query_logits" in found:
        assert found["query_logits"].shape == (2, file.episodes.query_x.shape[1], 5)
    for ours, tensor in file.parameters.items():
        assert found.get(f"grad/{file.table[ours]}", tensor).shape == tensor.shape


@pytest.mark.parametrize("name", ["maml_resnet12_shown", "reptile_shown"])
def test_other_shapes_on_the_engine(name: str, tmp_path: Path) -> None:
    """It computes what the oracle does, though no released program has computed it."""
    inputs = other_shapes(name)
    computed = golden_rules.oracle(read(written(tmp_path / "other.npz", inputs)))
    arrays = inputs | {key: tensor.detach().numpy() for key, tensor in computed.items()}
    rows = golden.check(read(written(tmp_path / "computed.npz", arrays)))
    assert not [row.key for row in rows if row.is_outside]
    compared = {row.key for row in rows if "engine" in row.errors}
    assert compared >= {key for key in computed if key != "support_logits"}


# --- files that are none ---


def _no_config(arrays: dict[str, Any]) -> None:
    del arrays["config"]


def _config(**said: object) -> Callable[[dict[str, Any]], None]:
    def plant(arrays: dict[str, Any]) -> None:
        arrays["config"] = np.array(json.dumps(json.loads(str(arrays["config"])) | said))

    return plant


def _array(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    def plant(arrays: dict[str, Any]) -> None:
        arrays[key] = change(arrays[key])

    return plant


WEIGHT = "param/classifier.layer_dict.conv1.conv.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no config": (_no_config, "it holds no 'config'"),
    "no labels": (lambda arrays: arrays.pop("y_query"), "it holds no 'y_query'"),
    "config of words": (_array("config", lambda _: np.array("words")), "its 'config' is no JSON object"),
    "config of a list": (_array("config", lambda _: np.array("[1]")), "its 'config' is no JSON object"),
    "unknown algorithm": (_config(algorithm="mamble"), "unknown algorithm 'mamble': known are cxgrad, maml"),
    "no steps": (_config(steps=None), "its config has no 'steps', which maml needs"),
    "steps in words": (_config(steps="five"), "'steps' of its config must be a number, got 'five'"),
    "half a step": (_config(steps=0.5), "'steps' of its config must be a whole number from 0 on, got 0.5"),
    "endless rate": (_config(alpha=float("inf")), "'alpha' of its config must be a number, got inf"),
    "a rate of hundreds of digits": (_config(alpha=10**400), "must be a number, got a number of 1329 bits"),
    "a number that Python refuses": (_array("config", lambda _: np.array("[" + "1" * 5000)), "is no JSON object"),
    "an algorithm of two lines": (_config(algorithm="a\nb"), "unknown algorithm 'a\\nb'"),
    "deep config": (_array("config", lambda _: np.array("[" * 10**5)), "its 'config' is no JSON object"),
    "numbers for names": (_config(inner_parameters=[[1], 2, "none"], steps="1"), "'steps' of its config must be"),
    "second order in words": (_config(second_order="yes"), "'second_order' of its config must be true or false"),
    "unknown parameter": (
        lambda arrays: arrays.update({"param/other.weight": np.ones(3)}),
        "no program of maml has a parameter 'other.weight'",
    ),
    "missing parameter": (
        lambda arrays: arrays.pop(WEIGHT),
        "maml needs a parameter 'features.1.weight', which it lacks",
    ),
    "parameter of another shape": (_array(WEIGHT, lambda w: w[:, 1:]), "its arrays do not fit each other: "),
    "labels of another number": (_array("y_query", lambda y: y[:, 1:]), "x_query must be [T, S, C, H, W] and y_query"),
    "tasks of another number": (_array("x_query", lambda x: x[1:]), "x_query must be [T, S, C, H, W] and y_query"),
    "labels out of range": (_array("y_support", lambda y: y + 7), "its arrays do not fit each other: "),
    "negative labels": (_array("y_support", lambda y: y - 1), "y_support must hold labels from 0 on"),
    "broken labels": (_array("y_support", lambda y: y + 0.5), "y_support must hold labels from 0 on"),
    "words for numbers": (_array("trace_loss", lambda x: x.astype(str)), "'trace_loss' must hold numbers, got <U"),
    "objects": (_array("trace_loss", lambda x: x.astype(object)), "a damaged .npz (Object arrays cannot be loaded"),
    "no image": (_array("x_support", lambda x: x[:, :, :0]), "x_support holds no image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_golden_file(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant, message = FAULTS[fault]
    arrays: dict[str, Any] = stored("maml_5w1s")
    plant(arrays)
    path = written(tmp_path / "file.npz", arrays)
    assert golden.main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(f"{path}: ")
    assert message in err
    assert err.count("\n") == 1


def test_rates_of_parameters_that_there_are_not(tmp_path: Path) -> None:
    arrays = stored("metasgd_shown")
    for said in ({"lrs.0": ["module.classifier.weight"]}, {"lrs.0": "module.classifier.bias"}):
        config = json.loads(str(arrays["config"])) | {"lr_of": said}
        file = written(tmp_path / "file.npz", arrays | {"config": np.array(json.dumps(config))})
        assert golden.main([str(file)]) == 2


def test_batches_of_reptile(tmp_path: Path) -> None:
    arrays = stored("reptile_shown")
    for batches, message in (
        (arrays["batches"] + 1, "must hold places in x_support, 0 to 14"),
        (arrays["batches"][0], "must be whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            read(written(tmp_path / "file.npz", arrays | {"batches": batches}))


def test_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.ones(3))
    for path, message in (
        (tmp_path / "missing.npz", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "text.npz", "not a golden file: no .npz"),
        (tmp_path / "empty.npz", "not a golden file: no .npz"),
        (tmp_path / "array.npy", "not a golden file: no .npz"),
    ):
        assert golden.main([str(path)]) == 2
        assert capsys.readouterr().err == f"{path}: {message}\n"


def test_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut short, or with bytes turned: one line, or a file that is read all the same."""
    whole, draw = (GOLDEN / "anil_shown.npz").read_bytes(), random.Random(0)
    path = tmp_path / "damaged.npz"
    messages = []
    for number in range(60):
        damaged = bytearray(whole)
        if number % 2:
            del damaged[draw.randrange(len(whole)) :]
        for _ in range(10 if damaged else 0):
            damaged[draw.randrange(-min(len(damaged), 6000), 0)] = draw.randrange(256)
        path.write_bytes(damaged)
        if golden.main([str(path)]) == 2:
            messages.append(capsys.readouterr().err)
    assert len(messages) > 30
    assert all(message.startswith(f"{path}: ") and message.count("\n") == 1 for message in messages)


# --- the command ---


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(GOLDEN / "boil_shown.npz")
    assert golden.main([good]) == 0
    assert "all within their bounds" in capsys.readouterr().out
    arrays = stored("boil_shown")
    arrays["grad/classifier.weight"] = arrays["grad/classifier.weight"] * (1 + 3e-7)
    bad = str(written(tmp_path / "bad.npz", arrays))
    assert golden.main([bad, good]) == 1
    assert "above the bound: grad/classifier.weight\n" in capsys.readouterr().out
    assert golden.main([bad, str(tmp_path / "missing.npz"), good]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("within") == 1
    assert "missing.npz: cannot be read" in captured.err


@pytest.mark.parametrize(
    ("key", "factor", "code"),
    [
        ("trace_loss", 1 + 3e-10, 0),
        ("trace_loss", 1 + 3e-9, 1),
        ("query_logits", 1 + 3e-9, 1),
        ("outer_loss", 1 + 3e-9, 1),
        ("adapted/classifier.weight", 1 + 3e-8, 0),
        ("adapted/classifier.weight", 1 + 3e-7, 1),
        ("trace_loss", float("nan"), 1),
    ],
)
def test_bounds(key: str, factor: float, code: int, tmp_path: Path) -> None:
    arrays = stored("boil_shown")
    arrays[key] = arrays[key] * factor
    assert golden.main([str(written(tmp_path / "file.npz", arrays))]) == code


def test_what_is_zero_is_compared_in_the_largest_gradient(tmp_path: Path) -> None:
    arrays = stored("boil_shown")
    largest = max(np.abs(array).max() for key, array in arrays.items() if key.startswith("grad/"))
    bias = "grad/features.2.0.bias"
    for part, code in ((3e-8, 0), (3e-7, 1)):
        path = written(tmp_path / "file.npz", arrays | {bias: arrays[bias] + part * largest})
        assert golden.main([str(path)]) == code


def test_arrays_that_nobody_computes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "file.npz", stored("boil_shown") | {"something": np.ones(3)})
    assert golden.main([str(path)]) == 0
    assert "not compared" in next(line for line in capsys.readouterr().out.splitlines() if "something" in line)


# --- names ---


def test_tables_are_one_to_one() -> None:
    tables = {name: table for name, table in vars(released).items() if name.isupper() and isinstance(table, dict)}
    assert len(tables) == 16
    for table in tables.values():
        assert released.ours(released.ours(table)) == table


@pytest.mark.parametrize("algorithm", ["cxgrad", "maml"])
def test_names_are_the_learners(algorithm: str) -> None:
    names = Learner(config_of(inner__algorithm=algorithm)).released_names()
    assert names == {name: released.CXGRAD[name] for name in names}


def test_rates_of_metasgd_are_numbered_as_the_file_says() -> None:
    file = read(GOLDEN / "metasgd_shown.npz")
    said = {ours: rate for rate, of in file.config["lr_of"].items() for ours in [released.ours(file.table)[of]]}
    assert said == {name.removeprefix("rates."): released.METASGD[name] for name in released.METASGD if "rates" in name}
