"""The right digest over content that no run has: one line, or a checkpoint that can be used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import random_episodes
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast import checkpoints
from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_checkpoint
from cxgrad_fast.config import InputError, preset
from cxgrad_fast.learner import Learner
from cxgrad_fast.torch_files import read_torch_file

CONFIG = preset(
    "glyphs-5w1s",
    {"model.filters": 2, "model.image_size": 16, "task.ways": 2, "inner.context_dim": 3, "run.device": "cpu"},
)


def message(path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> dict[str, Any]:
    """The content of a checkpoint after two meta-steps, to be copied and changed."""
    learner = Learner(CONFIG)
    for _ in range(2):
        learner.meta_step(random_episodes(CONFIG))
    file = tmp_path_factory.mktemp("content") / "latest.pt"
    state = Checkpoint(
        config=CONFIG,
        state=learner.state_dict(),
        iteration=5,
        validated=4,
        best=(Best(4, 0.5), Best(2, 0.25)),
        fingerprints={"train": "abc"},
        rng={"cpu": torch.get_rng_state()},
        source="a commit",
        episode={"tasks": [10, 11], "query_y": torch.tensor([[0, 1]]), "ways": 2},
    )
    write_checkpoint(file, state)
    return read_torch_file(file)


def write_with_digest(path, content: dict[str, Any]) -> None:
    """The content with the digest that its reader finds."""
    content.pop("sha256", None)
    torch.save(content, path)
    torch.save(content | {"sha256": checkpoints._digest(read_torch_file(path))}, path)


def _set(place: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets what ``place``, keys and indices with slashes between them, names; ``state/optimizer/state/0/step``."""

    def change(content: Any) -> None:
        *ways, last = [int(word) if word.isdecimal() else word for word in place.split("/")]
        for way in ways:
            content = content[way]
        content[last] = value(content[last]) if callable(value) else value

    return change


def _drop(place: str) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        *ways, last = [int(word) if word.isdecimal() else word for word in place.split("/")]
        for way in ways:
            content = content[way]
        del content[last]

    return change


PARAMETER, ADAM = "state/parameters/features.0.weight", "state/optimizer"
GROUP, MOMENTS = f"{ADAM}/param_groups/0", f"{ADAM}/state/0"

WRONG = {
    **{
        f"no {name}": (_drop(name), f"has no '{name.rpartition('/')[2]}'")
        for name in (
            "version",
            "config",
            "preset",
            "state",
            "iteration",
            "validated",
            "best",
            "fingerprints",
            "rng",
            "rng/cpu",
            "source",
            "episode",
            "next_task",
            "state/parameters",
            "state/statistics",
            "state/steps_averaged",
            "state/optimizer",
            f"{ADAM}/state",
            f"{ADAM}/param_groups",
            f"{GROUP}/lr",
            f"{GROUP}/betas",
            f"{GROUP}/params",
            f"{MOMENTS}/step",
            f"{MOMENTS}/exp_avg",
            f"{MOMENTS}/exp_avg_sq",
        )
    },
    "version 0": (_set("version", 0), "version must be a whole number from 1 to 1, got 0"),
    "version as text": (_set("version", "1"), "version must be a whole number from 1 to 1, got '1'"),
    "version true": (_set("version", True), "version must be a whole number from 1 to 1, got True"),
    "config a list": (_set("config", []), "config must be a dictionary, got []"),
    "config of a tensor": (_set("config/task.ways", torch.ones(3)), "setting 'task.ways' takes a value of type int"),
    "config out of range": (_set("config/task.ways", -1), "setting 'task.ways' must be at least 2, got -1"),
    "config NaN": (_set("config/model.slope", float("nan")), "takes a value of type float, got nan"),
    "config unknown": (_set("config/task.lays", 1), "unknown setting 'task.lays'"),
    "config other filters": (_set("config/model.filters", 100_000), "parameter 'features.0.weight' must be [100000, 3"),
    "config other algorithm": (_set("config/inner.algorithm", "maml"), "is not on both sides"),
    "config no algorithm": (_set("config/inner.algorithm", None), "setting 'inner.algorithm' takes one of"),
    "preset a number": (_set("preset", 5), "preset must be printable text of at most 200 characters, got 5"),
    "preset of many lines": (
        _set("preset", "a\nb"),
        r"preset must be printable text of at most 200 characters, got 'a\nb'",
    ),
    "iteration negative": (_set("iteration", -1), "iteration must be a whole number from 0 to 1000000000, got -1"),
    "iteration huge": (_set("iteration", 10**30), "iteration must be a whole number from 0 to 1000000000, got 1000"),
    "iteration a fraction": (_set("iteration", 5.0), "iteration must be a whole number from 0 to 1000000000, got 5.0"),
    "iteration text": (_set("iteration", "5"), "iteration must be a whole number from 0 to 1000000000, got '5'"),
    "iteration a tensor": (_set("iteration", torch.tensor(5)), "got a tensor [] of torch.int64"),
    "iteration None": (_set("iteration", None), "iteration must be a whole number from 0 to 1000000000, got None"),
    "validated later": (_set("validated", 6), "validated must be a whole number from 0 to 5, got 6"),
    "next_task elsewhere": (_set("next_task", 11), "next_task must be a whole number from 10 to 10, got 11"),
    "best a dictionary": (_set("best", {}), "best must be a list, got {}"),
    "best of one": (_set("best", [[4]]), "best[0] must be a list of 2, got [4]"),
    "best NaN": (_set("best/0/1", float("nan")), "best[0][1] must be a number from 0 to 1, got nan"),
    "best above one": (_set("best/0/1", 1.5), "best[0][1] must be a number from 0 to 1, got 1.5"),
    "best text": (_set("best/1/1", "0.25"), "best[1][1] must be a number from 0 to 1, got '0.25'"),
    "best elsewhere": (_set("best/0/0", "../../4"), "best[0][0] must be a whole number from 1 to 4, got '../../4'"),
    "best later": (_set("best/0/0", 5), "best[0][0] must be a whole number from 1 to 4, got 5"),
    "best twice": (_set("best", [[4, 0.5], [4, 0.5]]), "best must be different models, best first"),
    "best unordered": (_set("best", [[2, 0.25], [4, 0.5]]), "best must be different models, best first"),
    "fingerprints a list": (_set("fingerprints", ["abc"]), "fingerprints must be a dictionary"),
    "fingerprints numbers": (_set("fingerprints/train", 3), "fingerprints['train'] must be printable text"),
    "fingerprints under numbers": (_set("fingerprints", {1: "a"}), "a key of fingerprints must be printable text"),
    "rng of another type": (_set("rng/cpu", torch.zeros(5056)), "rng['cpu'] must be a tensor of uint8"),
    "rng of another size": (
        _set("rng/cpu", torch.zeros(7, dtype=torch.uint8)),
        "rng.cpu must be a state of torch's generator",
    ),
    "rng of no state": (
        _set("rng/cpu", torch.full_like(torch.get_rng_state(), 255)),
        "must be a state of torch's generator",
    ),
    "rng a table": (_set("rng/cpu", lambda t: t.view(2, -1)), "with 1 dimensions"),
    "source a list": (_set("source", []), "source must be printable text"),
    "source long": (_set("source", "x" * 5000), "source must be printable text of at most 200 characters, got 'xxx"),
    "source escapes": (_set("source", "\x1b[31m"), r"got '\x1b[31m'"),
    "source half a pair": (_set("source", "\udcff"), r"got '\udcff'"),
    "episode a list": (_set("episode", []), "episode must be a dictionary"),
    "episode text": (_set("episode/tasks", "abc"), "episode['tasks'] must be a tensor of"),
    "state a list": (_set("state", []), "state must be a dictionary"),
    "parameters a list": (_set("state/parameters", []), "state.parameters must be a dictionary"),
    "parameter missing": (_drop(PARAMETER), "parameter 'features.0.weight' is not on both sides"),
    "parameter more": (_set("state/parameters/x", torch.ones(1)), "parameter 'x' is not on both sides"),
    "parameter numbered": (
        _set("state/parameters/3", torch.ones(1)),
        "a key of state.parameters must be printable text",
    ),
    "parameter a list": (_set(PARAMETER, lambda t: t.tolist()), "parameter 'features.0.weight' must be a tensor of"),
    "parameter of another shape": (
        _set(PARAMETER, lambda t: t[:1]),
        "must be [2, 3, 3, 3] by the config, got [1, 3, 3, 3]",
    ),
    "parameter complex": (
        _set(PARAMETER, lambda t: t.to(torch.complex64)),
        "or float64, got a tensor [2, 3, 3, 3] of torch.complex64",
    ),
    "parameter whole": (_set(PARAMETER, lambda t: t.long()), "got a tensor [2, 3, 3, 3] of torch.int64"),
    "parameter bool": (_set(PARAMETER, lambda t: t > 0), "got a tensor [2, 3, 3, 3] of torch.bool"),
    "parameter of unsigned": (
        _set(PARAMETER, lambda t: t.to(torch.uint16)),
        "got a tensor [2, 3, 3, 3] of torch.uint16",
    ),
    "parameter quantized": (
        _set(PARAMETER, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8)),
        "got Unread(name='torch._utils _rebuild_qtensor')",
    ),
    "parameter sparse": (
        _set(PARAMETER, lambda t: t.to_sparse()),
        "got Unread(name='torch._utils _rebuild_sparse_tensor')",
    ),
    "parameter meta": (
        _set(PARAMETER, lambda t: t.to("meta")),
        "got Unread(name='torch._utils _rebuild_meta_tensor_no_storage')",
    ),
    "statistics of another size": (
        _set("state/statistics/features.0", torch.ones(2, 5)),
        "the statistics of 'features.0' must be a tensor [2, 2] of",
    ),
    "statistics missing": (
        _drop("state/statistics/features.0"),
        "the statistics of 'features.0' are not on both sides",
    ),
    "statistics numbers": (_set("state/statistics/features.0", 0.5), "the statistics of 'features.0' must be a tensor"),
    "steps negative": (_set("state/steps_averaged", -1), "state.steps_averaged must be a whole number"),
    "steps NaN": (_set("state/steps_averaged", float("nan")), "state.steps_averaged must be a whole number"),
    "optimizer a list": (_set(ADAM, []), "state.optimizer must be a dictionary"),
    "optimizer state a list": (_set(f"{ADAM}/state", []), "state.optimizer.state must be a dictionary"),
    "optimizer state of one": (
        _set(f"{ADAM}/state", lambda s: {0: s[0]}),
        "state.optimizer.state must be empty or of 18 parameters, got [0]",
    ),
    "optimizer state named": (
        _set(f"{ADAM}/state", lambda s: {"a": s[0]}),
        "a key of state.optimizer.state must be a whole",
    ),
    "moments a list": (_set(MOMENTS, []), "state.optimizer.state[0] must be a dictionary"),
    "moments of another shape": (
        _set(f"{MOMENTS}/exp_avg", torch.ones(3)),
        "state.optimizer.state[0].exp_avg must be a tensor [2, 3, 3, 3] of",
    ),
    "moments complex": (
        _set(f"{MOMENTS}/exp_avg_sq", lambda t: t * 1j),
        "state.optimizer.state[0].exp_avg_sq must be a tensor",
    ),
    "moments numbers": (_set(f"{MOMENTS}/exp_avg", 0.5), "state.optimizer.state[0].exp_avg must be a tensor"),
    "step a table": (_set(f"{MOMENTS}/step", torch.ones(2)), "state.optimizer.state[0].step must be a tensor [] of"),
    "step negative": (
        _set(f"{MOMENTS}/step", torch.tensor(-1.0)),
        "state[0].step must be a number from 0 on, got -1.0",
    ),
    "step NaN": (
        _set(f"{MOMENTS}/step", torch.tensor(float("nan"))),
        "state[0].step must be a number from 0 on, got nan",
    ),
    "no group": (_set(f"{ADAM}/param_groups", []), "state.optimizer.param_groups must be a list of 1, got []"),
    "two groups": (
        _set(f"{ADAM}/param_groups", lambda g: [*g, *g]),
        "state.optimizer.param_groups must be a list of 1",
    ),
    "group a list": (_set(GROUP, []), "state.optimizer.param_groups[0] must be a dictionary"),
    "rate text": (_set(f"{GROUP}/lr", "fast"), "param_groups[0].lr must be a number from 0 to 1e+300, got 'fast'"),
    "rate NaN": (_set(f"{GROUP}/lr", float("nan")), "param_groups[0].lr must be a number from 0 to 1e+300, got nan"),
    "rate negative": (_set(f"{GROUP}/lr", -0.1), "param_groups[0].lr must be a number from 0 to 1e+300, got -0.1"),
    "betas one": (_set(f"{GROUP}/betas", (0.9, 1.0)), "param_groups[0].betas[1] must be a number from 0 to 0.99"),
    "betas three": (_set(f"{GROUP}/betas", (0.9, 0.9, 0.9)), "param_groups[0].betas must be a list of 2"),
    "decay infinite": (_set(f"{GROUP}/weight_decay", float("inf")), "weight_decay must be a number from 0 to 1e+300"),
    "other parameters": (
        _set(f"{GROUP}/params", [0, 1]),
        "param_groups[0].params must be the 18 parameters, got [0, 1]",
    ),
    "nested without end": (_set("episode/tasks", [[[[[[1]]]]]]), "episode['tasks'] must be a tensor of"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_content_that_no_run_has_is_one_line(content, tmp_path, kind: str) -> None:
    change, told = WRONG[kind]
    content = copy.deepcopy(content)
    change(content)
    write_with_digest(tmp_path / "latest.pt", content)
    text = message(tmp_path / "latest.pt")
    assert text.startswith(f"checkpoint '{tmp_path / 'latest.pt'}' does not hold a run: ")
    assert told in text
    assert text.isprintable()


def test_the_content_is_right_where_nothing_is_changed(content, tmp_path) -> None:
    write_with_digest(tmp_path / "latest.pt", dict(content))
    back = read_checkpoint(tmp_path / "latest.pt")
    learner = back.learner(tmp_path, optimizer=True)
    wanted = Learner(CONFIG)
    for _ in range(2):
        wanted.meta_step(random_episodes(CONFIG))
    for each in (learner, wanted):
        each.meta_step(random_episodes(CONFIG, seed=3))
    for name, tensor in wanted.meta_parameters.items():
        assert torch.equal(tensor, learner.meta_parameters[name]), name


def test_keys_of_a_later_program_are_passed_over(content, tmp_path) -> None:
    changed = copy.deepcopy(content)
    changed["later"] = changed["state"]["later"] = changed["state"]["optimizer"]["param_groups"][0]["later"] = {"x": 1}
    write_with_digest(tmp_path / "latest.pt", changed)
    learner = read_checkpoint(tmp_path / "latest.pt").learner(tmp_path, optimizer=True)
    learner.meta_step(random_episodes(CONFIG))


def test_a_checkpoint_without_statistics_or_moments_is_one_of_a_start(content, tmp_path) -> None:
    changed = copy.deepcopy(content)
    changed["state"]["statistics"] = changed["state"]["optimizer"]["state"] = {}
    write_with_digest(tmp_path / "latest.pt", changed)
    learner = read_checkpoint(tmp_path / "latest.pt").learner(tmp_path, optimizer=True)
    learner.meta_step(random_episodes(CONFIG))


def test_a_checkpoint_is_read_before_a_learner_takes_its_memory(content, tmp_path, monkeypatch) -> None:
    changed = copy.deepcopy(content)
    changed["config"]["task.ways"] = 100_000
    changed["config"]["model.filters"] = 100_000
    write_with_digest(tmp_path / "latest.pt", changed)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: pytest.fail(f"takes memory for {size}"))
    assert "must be [100000, 3, 3, 3] by the config, got [2, 3, 3, 3]" in message(tmp_path / "latest.pt")


def _places(content: Any, place: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where something stands in a content."""
    parts = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place, *(found for key, part in parts for found in _places(part, (*place, key)))]


_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(st.characters(), max_size=10),
    st.builds(dict),
    st.lists(st.integers(0, 3) | st.floats(0, 1) | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(0, 3), st.integers(), max_size=2),
    st.builds(
        lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        st.lists(st.integers(0, 3), max_size=4),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.complex64, torch.bool]),
    ),
    st.sampled_from(["drop", "twice", "tuple"]),
)


@pytest.mark.slow
@examples(300)
@given(st.data())
def test_any_change_of_the_content_is_told_or_makes_a_usable_checkpoint(content, tmp_path_factory, data) -> None:
    changed = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        *ways, last = data.draw(st.sampled_from(sorted((p for p in _places(changed) if p), key=repr)))
        odd = data.draw(_ODD)
        holder = changed
        for way in ways:
            holder = holder[way]
        if odd == "drop":
            del holder[last]
        elif odd == "twice":
            holder[last] = [holder[last], holder[last]]
        else:
            holder[last] = (holder[last],) if odd == "tuple" else odd
    file = tmp_path_factory.getbasetemp() / "changed.pt"
    write_with_digest(file, changed)
    try:
        saved = read_checkpoint(file)
    except InputError as error:
        told = str(error)
    else:
        learner = saved.learner(file, optimizer=True)
        learner.state_dict()
        saved.config.to_toml().encode()
        return
    assert told.isprintable()
    assert str(file) in told
