"""Launch settings: which of several tables decides, what is refused, and what measuring does with candidates."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import give_away
from torch import Tensor

from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import backends, launch, tune

DEFAULTS = {"BLOCK": 64, "num_warps": 4}
SHAPE = {"inputs": 48, "count": 100}


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and a repository of their own, tables read anew."""
    monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "REPOSITORY", tmp_path / "repository")
    launch.reload()
    yield
    launch.reload()


def put(file: Path, text: str | dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text if isinstance(text, str) else json.dumps(text), errors="surrogateescape")
    launch.reload()
    return file


def user_file(architecture: str = "sm_90") -> Path:
    file = launch.user_file(architecture)
    assert file is not None
    return file


def ask(architecture: str = "sm_90", **changed: Any) -> launch.Settings:
    with launch.on_architecture(architecture):
        return launch.settings("thing", DEFAULTS, **(SHAPE | changed))


def entry(source: str = "measured on paper", **settings: Any) -> dict[str, Any]:
    return settings | {"from": source}


# --- the helpers ---


def test_divide_rounds_up() -> None:
    assert [launch.divide(a, 4) for a in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_input_precision() -> None:
    for precision, of_float32 in (("float32", "tf32x3"), ("tf32", "tf32"), ("bfloat16", "ieee")):
        assert launch.input_precision(precision, torch.float32) == of_float32
        assert launch.input_precision(precision, torch.float64) == "ieee"
        assert launch.input_precision(precision, torch.bfloat16) == "ieee"
    with pytest.raises(InputError, match="precision takes one of float32, tf32, bfloat16, got 'half'"):
        launch.input_precision("half", torch.float32)


# --- which settings hold ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_defaults_where_there_is_no_device() -> None:
    put(launch.REPOSITORY / "sm_90.json", {"thing": entry(BLOCK=32)})
    assert launch.settings("thing", DEFAULTS, **SHAPE) is DEFAULTS


@pytest.mark.parametrize(("capability", "architecture"), [((8, 6), "sm_80"), ((9, 0), "sm_90"), ((12, 0), None)])
def test_architecture_of_the_device(
    capability: tuple[int, int], architecture: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    launch._architecture_of.cache_clear()
    assert launch.architecture() == architecture
    launch._architecture_of.cache_clear()


def test_the_first_table_with_an_entry_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert ask() == DEFAULTS
    put(launch.REPOSITORY / "sm_90.json", {"thing": entry(BLOCK=16), "thing count=100 inputs=48": entry(BLOCK=32)})
    assert ask() == {"BLOCK": 32, "num_warps": 4}
    assert ask(count=7) == {"BLOCK": 16, "num_warps": 4}
    assert ask("sm_80") == DEFAULTS
    put(user_file(), {"thing inputs=48 count=100": entry(BLOCK=8, num_stages=2)})
    assert ask() == {"BLOCK": 8, "num_warps": 4, "num_stages": 2}
    assert ask(count=7)["BLOCK"] == 16
    monkeypatch.setenv("CXGRAD_LAUNCH", str(put(tmp_path / "pins.json", {"thing": entry("pinned", num_warps=1)})))
    assert ask(count=7) == {"BLOCK": 64, "num_warps": 1}
    assert DEFAULTS == {"BLOCK": 64, "num_warps": 4}


def test_trials_and_records() -> None:
    put(launch.REPOSITORY / "sm_90.json", {"thing": entry(BLOCK=16)})
    with launch.recording() as asked, launch.trying("thing", {"BLOCK": 2}), launch.trying("other", {}):
        assert ask() == {"BLOCK": 2, "num_warps": 4}
    assert asked == [launch.Question("thing", SHAPE, DEFAULTS)]
    assert ask()["BLOCK"] == 16


# --- what is refused ---

REFUSED: dict[str, tuple[str | dict[str, Any], str]] = {
    "no JSON": ('{"thing": {\n', "are no JSON: .* line 2"),
    "a list": ("[]", "must be an object of entries, got list"),
    "a source missing": ({"thing": {"BLOCK": 16}}, "'thing' must say with \"from\" where it comes from"),
    "no object": ({"thing": 3}, "'thing' must say"),
    "no number": ({"thing": entry(BLOCK="16")}, "BLOCK of 'thing' must be a whole number above 0, got 16"),
    "true": ({"thing": entry(BLOCK=True)}, "BLOCK of 'thing' must be a whole number above 0, got True"),
    "zero": ({"thing": entry(BLOCK=0)}, "BLOCK of 'thing' must be a whole number above 0, got 0"),
    "half a shape": ({"thing count": entry(BLOCK=16)}, "the key 'thing count' is not 'KERNEL name=value ...'"),
    "no kernel": ({"": entry(BLOCK=16)}, "the key '' is not"),
    "nested without end": ("[" * 100_000, "are nested too deep"),
    "no text": ("\udcff", "are no JSON: 'utf-8' codec can't decode"),
    "unknown setting": ({"thing": entry(BLOK=16)}, "'thing' sets BLOK; thing has BLOCK, maxnreg, num_stages, num_"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_tables_are_refused_in_one_line(what: str) -> None:
    content, message = REFUSED[what]
    file = put(user_file(), content)
    with pytest.raises(InputError, match=message) as caught:
        ask()
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def refusal() -> str:
    launch.reload()
    with pytest.raises(InputError) as caught:
        ask()
    return str(caught.value)


@pytest.fixture(params=["cached", "named"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table in the cache, and one that a person has named."""
    file = user_file() if request.param == "cached" else tmp_path / "pins.json"
    put(file, {"thing": entry(BLOCK=32)})
    if request.param == "named":
        monkeypatch.setenv("CXGRAD_LAUNCH", str(file))
    assert ask()["BLOCK"] == 32
    return file


@pytest.mark.parametrize("bits", [0o620, 0o602])
def test_a_table_that_others_can_write_is_refused(table: Path, bits: int) -> None:
    table.chmod(bits)
    assert refusal() == f"launch settings '{table}': others can write it: chmod go-w"


def test_a_table_of_somebody_else_s_is_refused(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        give_away(table, patch)
        assert refusal() == f"launch settings '{table}': it belongs to another user, number 65534"


def test_a_table_that_is_no_regular_file_is_refused(table: Path) -> None:
    table.unlink()
    os.mkfifo(table)  # opening it the usual way would wait until somebody writes into it
    assert refusal() == f"launch settings '{table}': it is not a regular file"


def test_a_named_table_may_be_a_link(table: Path, tmp_path: Path) -> None:
    table.rename(tmp_path / "elsewhere.json")
    table.symlink_to(tmp_path / "elsewhere.json")
    if table == user_file():
        assert refusal() == f"launch settings '{table}': it is a link"
    else:
        launch.reload()
        assert ask()["BLOCK"] == 32


@pytest.mark.parametrize("up", [0, 1])
def test_a_cache_that_others_can_write_is_refused(up: int) -> None:
    file = put(user_file(), {"thing": entry(BLOCK=32)})
    folder = file.parents[up]
    folder.chmod(0o777)
    assert refusal() == f"launch settings '{file}': others can write '{folder}': chmod go-w '{folder}'"
    with pytest.raises(InputError, match=f"'{file}' cannot be written: others can write '{folder}'"):
        launch.write(file, [])
    assert "thing" in file.read_text()


def test_the_repository_s_tables_are_whose_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who installed them also installed the code."""
    file = put(launch.REPOSITORY / "sm_90.json", {"thing": entry(BLOCK=32)})
    file.chmod(0o666)
    give_away(file, monkeypatch)
    assert ask()["BLOCK"] == 32


def test_a_written_table_is_in_a_folder_of_the_user_s_alone() -> None:
    file = user_file()
    launch.write(file, [launch.Entry("thing", {"BLOCK": 32}, "here", file)])
    assert [folder.stat().st_mode & 0o777 for folder in (file.parents[1], file.parent)] == [0o700, 0o700]
    launch.reload()
    assert ask()["BLOCK"] == 32


def test_a_table_that_cannot_be_written_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(user_file(), {"thing": entry(BLOCK=32)})

    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(InputError, match=f"'{file}' cannot be written: No space left on device"):
        launch.write(file, [])
    assert list(file.parent.iterdir()) == [file]
    assert ask()["BLOCK"] == 32


def test_a_named_table_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXGRAD_LAUNCH", "/nowhere/pins.json")
    with pytest.raises(InputError, match=r"launch settings '/nowhere/pins.json': No such file"):
        ask()
    with pytest.raises(InputError, match="architecture takes one of sm_80, sm_90, got 'sm_70'"):
        ask("sm_70")


def test_the_repository_s_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry is one, of a kernel that can be measured, and says where it comes from."""
    monkeypatch.undo()
    for architecture in launch.ARCHITECTURES:
        for found in launch.read(launch.REPOSITORY / f"{architecture}.json"):
            assert found.source.startswith(("predicted from machine code", "measured on")), found


# --- measuring ---


def test_a_written_table_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "new" / "table.json"
    entries = [launch.Entry("b x=1", {"B": 1}, "here", file), launch.Entry("a", {"num_warps": 8}, "there", file)]
    launch.write(file, entries)
    assert launch.read(file) == entries[::-1]
    assert file.read_text().splitlines()[1] == ' "a": {"num_warps": 8, "from": "there"},'
    launch.write(file, [])
    assert launch.read(file) == []


class Clock:
    """A call whose time and result depend on the settings it is launched with."""

    def __init__(self) -> None:
        self.last: launch.Settings = {}

    def example(self, count: int) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            self.last = launch.settings("clock", DEFAULTS, count=count)
            if self.last["BLOCK"] > 512:
                raise RuntimeError("out of shared memory\nand more")
            return [torch.ones(3) * (2 if self.last["BLOCK"] == 256 else 1)]

        return call

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        return 1e-6 * abs(self.last["BLOCK"] - 129)

    def tunable(self, *blocks: int) -> launch.Tunable:
        def candidates(defaults: launch.Settings, shape: launch.Shape) -> list[launch.Settings]:
            assert (defaults, shape) == (DEFAULTS, {"count": 9})
            return [{"BLOCK": block} for block in blocks]

        return launch.Tunable("clock", candidates, [{"count": 9}], self.example)


def test_measuring_takes_the_fastest_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    question, best = tune.measure(clock.tunable(1024, 32, 256, 128, 100), {"count": 9}, clock.seconds)
    assert (launch.key_of(question.kernel, question.shape), best) == ("clock count=9", {"BLOCK": 128})
    printed = capsys.readouterr()
    assert printed.out == "clock count=9: 65.0 us with BLOCK=64 num_warps=4, 1.0 with BLOCK=128 of 4\n"
    assert printed.err.splitlines() == [
        "clock count=9: BLOCK=1024 does not run: out of shared memory",
        "clock count=9: wrong results with BLOCK=256",
    ]
    assert tune.measure(clock.tunable(32), {"count": 9}, clock.seconds)[1] == {}


def test_the_command_writes_keeps_lists_and_clears(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(tune, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(tune, "_tunables", lambda kernel: [clock.tunable(100)])
    monkeypatch.setattr(tune, "_seconds", clock.seconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    put(user_file(), {"clock count=9": entry("pinned by hand", BLOCK=32), "other": entry(BLOCK=1)})
    assert tune.main([]) == 0
    assert [found.source for found in launch.read(user_file())] == ["pinned by hand", "measured on paper"]
    put(user_file(), {"other": entry(BLOCK=1)})
    assert tune.main([]) == 0
    with launch.on_architecture("sm_90"):
        assert launch.settings("clock", DEFAULTS, count=9) == {"BLOCK": 100, "num_warps": 4}
    capsys.readouterr()
    assert tune.main(["--list", "--kernel", "clock"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "sm_80"
    assert listed[2] == f"  {user_file()}: 1 entry"
    assert listed[3].startswith("    clock count=9: BLOCK=100 (measured on H100, ")
    assert tune.main(["--clear", "--kernel", "clock"]) == 0
    assert [found.key for found in launch.read(user_file())] == ["other"]
    put(user_file(), "no JSON")  # which a person may want to be rid of
    assert tune.main(["--clear"]) == 0
    assert not user_file().exists()


def test_the_command_measures_the_shapes_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[Any] = []
    sizes = [{"tasks": tasks, "size": size} for tasks in (2, 4) for size in (42, 21, 10)]
    every = launch.Tunable("clock", lambda defaults, shape: [], sizes, Clock().example)

    def measure(tunable: launch.Tunable, example: Any, seconds: Any) -> tuple[launch.Question, launch.Settings]:
        measured.append((example["tasks"], example["size"]))
        return launch.Question("clock", example, {}), {}

    monkeypatch.setattr(tune, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(tune, "_tunables", lambda kernel: [every])
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    assert tune.main(["--where", "size=42,10", "--where", "tasks=2"]) == 0
    assert measured == [(2, 42), (2, 10)]
    for words, message in {
        ("--where", "side=1"): "--where takes one of size, tasks, got 'side'",
        ("--where", "size"): "--where takes NAME=VALUE[,VALUE...], got 'size'",
        ("--where", "size=43"): "--where lets no production shape through",
        ("--where", "size=42", "--list"): "--where chooses what is measured: it does not go with --list and --clear",
    }.items():
        capsys.readouterr()
        assert tune.main(words) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert len(measured) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_measuring_without_a_device_is_refused_in_one_line() -> None:
    command = [sys.executable, "-m", "cxgrad_fast.kernels.tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: measuring needs a CUDA device: ")


def test_wrong_options_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--lst"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --lst\n"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_tunable_kernel_has_examples_and_candidates() -> None:
    found = {tunable.kernel: tunable for tunable in tune._tunables(None)}
    folder = Path(launch.__file__).parent
    asked = {
        name for file in folder.rglob("*.py") for name in re.findall(r'(?:settings|sizes)\(f?"(\w+)', file.read_text())
    }
    asked -= {"conv_block_sums_", "residual_end_"}  # whose names are put together
    asked |= {"conv_block_sums_moments", "conv_block_sums_second", "residual_end_backward"}
    asked |= {"first_layer_forward", "first_layer_reduce", "first_layer_second"}
    assert asked - {"double", "conv_block"} <= found.keys()
    assert all(tunable.examples for tunable in found.values())
    with pytest.raises(InputError, match=r"--kernel takes one of .*weights.*, got 'no such kernel'"):
        tune._tunables("no such kernel")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_examples_launch_their_kernels_and_candidates_set_what_they_have() -> None:
    """With tensors that are nowhere: every example of a few tunables, the first and the last of the others."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cxgrad_fast.kernels import machine_code

    if backends.interpreting():
        pytest.skip("machine code needs Triton's compiler")
    for tunable in tune._tunables(None):
        if tunable.kernel == "weights":
            continue  # draws from CUDA's generator
        examples = (
            tunable.examples
            if tunable.kernel == "conv_block_convolve"
            else tunable.examples[:: len(tunable.examples) - 1]
        )
        questions = []
        for example in examples:
            with FakeTensorMode(), machine_code.recording("sm_90") as launches:
                call = tunable.example(**example)
                before = len(launches)
                with launch.recording() as asked:
                    call()
            assert len(launches) > before
            questions += [question for question in asked if question.kernel == tunable.kernel][:1]
        assert len(questions) == len(examples), tunable.kernel
        keys = {launch.key_of(question.kernel, question.shape) for question in questions}
        assert len(keys) > len(examples) * 2 // 3 or len(examples) == 2, tunable.kernel
        for question in questions:
            candidates = list(tunable.candidates(question.defaults, question.shape))
            assert len(candidates) >= 6, question
            for candidate in candidates:
                assert candidate.keys() <= question.defaults.keys() | launch._OPTIONS, (question, candidate)
                assert all(type(value) is int and value >= 1 for value in candidate.values())
