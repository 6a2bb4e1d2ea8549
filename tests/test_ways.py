"""The ways to convolve: each right, and the choice between them measured, kept, pinned, listed and forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_interpreted
from torch import Tensor

from cxgrad_fast import info
from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import launch, tune
from cxgrad_fast.kernels.conv_block import choice

triton = pytest.importorskip("triton", reason="triton is there on Linux alone")
import triton_ways_child as child  # noqa: E402

EXACT = 1e-12  # measured 6e-16
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = {"tasks": 2, "images": 25, "inputs": 48, "outputs": 48, "products": "tf32x3"}
DEVICE = torch.device("cuda", 0)


# --- the same numbers ---


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What the child found."""
    return run_interpreted("triton_ways_child.py")


@pytest.mark.slow
@pytest.mark.parametrize("way", choice.WAYS)
def test_float64_equals_the_definition(interpreted: dict[str, Any], way: str) -> None:
    for shape in child.SHAPES:
        errors = interpreted["float64"][f"{way} {shape.name}"]
        assert len(errors) == 8
        assert all(error < EXACT for error in errors.values()), (shape.name, errors)


@pytest.mark.parametrize("way", choice.WAYS)
def test_precision_says_what_is_rounded(interpreted: dict[str, Any], way: str) -> None:
    assert all(error < 1e-6 for error in interpreted["rounded"][f"{way} float32"].values())
    for errors in (interpreted["rounded"][f"{way} bfloat16"], interpreted["bfloat16"][way]):
        assert all(error < 2e-2 for error in errors.values()), errors
        assert errors["convolution"] > 1e-3


def test_a_sum_in_parts(interpreted: dict[str, Any]) -> None:
    assert all(error < 1e-6 for error in interpreted["split"].values()), interpreted["split"]


@GPU
@pytest.mark.parametrize("shape", [*child.SHAPES, child.LARGER], ids=lambda shape: shape.name)
@pytest.mark.parametrize("way", choice.WAYS)
def test_every_way_on_cuda(way: str, shape: Any) -> None:
    errors = child.errors(shape, way, device="cuda")
    assert all(error < EXACT for error in errors.values()), errors
    # the framework may take Winograd's convolution, whose transforms cost a digit: it must be as near as the choice
    # asks of it, where TF32's products, which err by 2e-4, do not come
    float32 = 3e-6 if way == "triton" else choice._AGREE["tf32x3"]
    for precision, most in (("float32", float32), ("tf32", 5e-3), ("bfloat16", 3e-2)):
        errors = child.errors(shape, way, torch.float32, precision, "cuda")
        assert all(error < most for error in errors.values()), (precision, errors)


@GPU
@pytest.mark.parametrize("way", choice.WAYS)
def test_bits_repeat_on_cuda(way: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert not child.different_bits(way, dtype, "cuda")


@GPU
def test_a_captured_way_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    given = child.Tensors(child.LARGER, torch.float32, "cuda")
    for way in choice.WAYS:
        monkeypatch.setenv(choice.VARIABLE, way)
        wanted, graph = child.results(given), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = child.results(given)
        graph.replay()
        assert all(torch.equal(found[name], each) for name, each in wanted.items()), way


@GPU
def test_measuring_on_cuda(folders: Path) -> None:
    given = child.Tensors(child.LARGER, torch.float32, "cuda")
    child.results(given)
    (file,) = choice.user_files()
    found = {found.key.split()[0]: found for found in choice.read(file)}
    assert set(found) == set(choice.KINDS)
    for kept in found.values():
        assert all(f"{way} " in kept.source for way in choice.WAYS), kept.source  # each ran, and was right


# --- the framework's flags ---


def flags() -> list[Any]:
    """What of the process decides how the framework multiplies; inherited values are told from others."""
    backends: Any = torch.backends
    found = [backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic]
    found += [backends.cuda.matmul.allow_bf16_reduced_precision_reduction]
    was = backends.fp32_precision
    for outer in ("none", "tf32", "ieee"):
        backends.fp32_precision = outer
        found += [each.fp32_precision for each in (backends.cudnn, backends.cudnn.conv, backends.cuda.matmul)]
    backends.fp32_precision = was
    return [*found, was]


@pytest.fixture
def owners() -> Iterator[dict[str, Any]]:
    """What has an ``fp32_precision``, put back as it was."""
    backends: Any = torch.backends
    found = {"all": backends, "cudnn": backends.cudnn, "conv": backends.cudnn.conv, "matmul": backends.cuda.matmul}
    found["cpu"] = backends.mkldnn.matmul
    before = {name: owner.fp32_precision for name, owner in found.items()}
    yield found
    torch.set_float32_matmul_precision("highest")
    for name, value in before.items():
        found[name].fp32_precision = value


@pytest.mark.parametrize("name", ["nothing", "all", "cudnn", "conv", "matmul", "high"])
def test_flags_hold_in_the_block_alone(name: str, owners: dict[str, Any]) -> None:
    if name in owners:
        owners[name].fp32_precision = "tf32"
    if name == "high":  # the older way to say it
        torch.set_float32_matmul_precision("high")
    before, backends = flags(), torch.backends
    for how, products in (("tf32x3", "ieee"), ("ieee", "ieee"), ("tf32", "tf32"), ("bfloat16", "tf32")):
        with child.ways.exactly(how):
            assert owners["conv"].fp32_precision == owners["matmul"].fp32_precision == products
            assert (backends.cudnn.benchmark, backends.cudnn.deterministic) == (False, True)
            assert not backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert flags() == before
    with pytest.raises(ZeroDivisionError), child.ways.exactly("tf32"):
        _ = 1 / 0
    assert flags() == before


# --- the choice ---


def test_tests_keep_what_they_measure_to_themselves(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = choice._file("a device")
    assert file is not None
    assert tmp_path_factory.getbasetemp() in file.parents


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache and a repository of their own, nothing known."""
    monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(launch, "REPOSITORY", tmp_path / "repository")
    choice.reload()
    yield tmp_path
    choice.reload()


class Clock:
    """A device that is not there, on which each way takes a time of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **times: float) -> None:
        self.times, self.ran, self.capturing = times, "", False
        self.calls: list[str] = []
        monkeypatch.setattr(choice, "_seconds", self.seconds)
        monkeypatch.setattr(choice.backends, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def seconds(self, call: Callable[[], Tensor]) -> float:
        call()
        return self.times[self.ran]

    def call(self, way: str) -> Tensor:
        self.ran = way
        self.calls.append(way)
        return torch.ones(3)

    def choose(self, kind: str = "transpose", **changed: Any) -> str:
        calls = {way: lambda way=way: self.call(way) for way in choice.WAYS}
        return choice.choose(kind, SHAPE | changed, DEVICE, lambda: calls)


@pytest.fixture
def clock(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, triton=6e-5, grouped=4e-5, tasks=5e-5, unfold=9e-5)


def user_file(folders: Path) -> Path:
    return folders / "cache/ways/NVIDIA_H100_80GB.json"


def put(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    choice.reload()
    return file


def line(way: str, source: str = "pinned by hand") -> dict[str, str]:
    return {"way": way, "from": source}


def test_the_fastest_is_measured_once(clock: Clock, folders: Path) -> None:
    assert clock.choose() == "grouped"
    assert len(clock.calls) == 4 * (2 + choice._ROUNDS)
    assert clock.calls[-8:] == [*choice.WAYS, *choice.WAYS]  # the rounds alternate
    assert clock.choose() == "grouped"
    choice.reload()  # another process
    assert clock.choose() == "grouped"
    assert len(clock.calls) == 28
    (kept,) = choice.read(user_file(folders))
    assert kept.source == (
        "measured on NVIDIA H100 80GB: triton 60.0 us, grouped 40.0 us, tasks 50.0 us, unfold 90.0 us"
    )
    assert {"transpose", "tasks=2", f"torch={torch.__version__}"} <= kept.words
    clock.choose(tasks=4)
    clock.choose("second")
    assert len(choice.read(user_file(folders))) == 3


def test_a_small_gain_changes_nothing(clock: Clock) -> None:
    clock.times |= {"grouped": 5.9e-5, "tasks": 5.8e-5}
    assert clock.choose() == "triton"


def test_other_versions_measure_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.choose()
    choice.reload()
    monkeypatch.setattr(choice, "_versions", lambda: {"torch": "9.9", "triton": "9"})
    clock.times["tasks"] = 1e-5
    assert clock.choose() == "tasks"


def test_nothing_is_measured_while_a_graph_is_captured(clock: Clock) -> None:
    clock.capturing = True
    assert clock.choose() == "triton"
    assert not clock.calls
    clock.capturing = False
    assert clock.choose() == "grouped"
    clock.capturing = True
    assert clock.choose() == "grouped"


def test_nothing_is_measured_elsewhere(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock.choose(products="ieee") == "triton"  # float64 is for checks
    assert choice.choose("transpose", SHAPE, torch.device("cpu"), dict) == "triton"
    monkeypatch.setattr(choice.backends, "interpreting", lambda: True)
    assert clock.choose() == "triton"
    assert not clock.calls


def test_what_does_not_run_or_is_wrong_is_left_out() -> None:
    def refused() -> Tensor:
        raise RuntimeError("no algorithm\nand more")

    calls = {
        "triton": lambda: torch.ones(3),
        "grouped": refused,
        "tasks": lambda: torch.ones(3) * 1.001,  # as TF32 would be
        "unfold": lambda: torch.ones(3) * (1 + 1e-6),
    }
    assert set(choice.measure(calls, lambda call: 1.0, 3e-5)) == {"triton", "unfold"}
    assert set(choice.measure(calls, lambda call: 1.0, 3e-3)) == {"triton", "tasks", "unfold"}
    with pytest.raises(RuntimeError, match="no algorithm"):
        choice.measure({"triton": refused}, lambda call: 1.0, 1.0)
    assert choice.measure({"triton": lambda: torch.full((2,), torch.nan)}, lambda call: 1.0, 1.0) == {}


def test_where_nothing_can_be_kept_the_process_knows(clock: Clock, folders: Path) -> None:
    put(folders / "cache/ways", "a file in the folder's place")
    assert clock.choose() == "grouped"
    count = len(clock.calls)
    assert clock.choose() == "grouped"
    assert len(clock.calls) == count


def test_a_way_is_pinned(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    for way in choice.WAYS:
        monkeypatch.setenv(choice.VARIABLE, way)
        assert clock.choose() == way
        assert choice.choose("second", SHAPE, torch.device("cpu"), dict) == way
    assert not clock.calls
    monkeypatch.setenv(choice.VARIABLE, "cudnn")
    for device in (DEVICE, torch.device("cpu")):
        with pytest.raises(InputError) as refused:
            choice.choose("second", SHAPE, device, dict)
        assert str(refused.value) == (
            "CXGRAD_CONVOLUTION takes one of triton, grouped, tasks, unfold, or a table's .json file, got 'cudnn'"
        )


def test_the_first_table_decides_and_in_it_the_longest_key(
    clock: Clock, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(launch.REPOSITORY / "sm_90_ways.json", {"transpose": line("tasks", "measured on a H100")})
    assert clock.choose() == "tasks"
    assert not clock.calls
    put(user_file(folders), {"transpose inputs=48": line("unfold"), "transpose inputs=48 tasks=2": line("triton")})
    assert clock.choose() == "triton"
    assert clock.choose(tasks=3) == "unfold"
    assert clock.choose(inputs=3) == "tasks"
    pins = put(folders / "pins.json", {"transpose tasks=3": line("grouped")})
    monkeypatch.setenv(choice.VARIABLE, str(pins))
    assert clock.choose(tasks=3) == "grouped"
    assert clock.choose() == "triton"
    assert choice.choose("transpose", SHAPE | {"tasks": 3}, torch.device("cpu"), dict) == "grouped"
    assert choice.choose("transpose", SHAPE, torch.device("cpu"), dict) == "triton"
    assert not clock.calls


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "are no JSON"),
        ("[]", "must be an object of entries, got list"),
        ({"backward": line("tasks")}, "'backward' must begin with one of convolution, second, transpose, weight_grad"),
        ({"second tasks": line("tasks")}, "the key 'second tasks' is not"),
        ({"second": {"way": "tasks"}}, "'second' must say with \"from\" where it comes from"),
        ({"second": line("cudnn")}, "the way of 'second' must be one of triton, grouped, tasks, unfold, got 'cudnn'"),
        ({"second": {"from": "here"}}, "got None"),
    ],
)
def test_bad_tables_are_refused_in_one_line(clock: Clock, folders: Path, content: Any, message: str) -> None:
    file = put(user_file(folders), content)
    with pytest.raises(InputError, match=message) as refused:
        clock.choose()
    assert str(refused.value).startswith(f"ways to convolve '{file}'")
    assert "\n" not in str(refused.value)
    assert choice.report() == [str(refused.value)]


def test_tables_that_others_can_write_are_refused(clock: Clock, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put(user_file(folders), {"transpose": line("tasks")})
    named = put(folders / "pins.json", {"second": line("tasks")})
    for file in (cached, named):
        monkeypatch.setenv(choice.VARIABLE, str(named) if file == named else "")
        file.chmod(0o666)
        choice.reload()
        with pytest.raises(InputError) as refused:
            clock.choose()
        assert str(refused.value) == f"ways to convolve '{file}': others can write it: chmod go-w"
        file.chmod(0o644)
    cached.parent.chmod(0o777)  # what is measured is then known to this process alone
    cached.unlink()
    choice.reload()
    assert clock.choose() == "grouped"
    assert not cached.exists()


def test_the_repository_s_tables() -> None:
    for file in launch.REPOSITORY.glob("*_ways.json"):
        assert file.name.removesuffix("_ways.json") in launch.ARCHITECTURES
        assert choice.read(file)


# --- what people see of it ---


def test_the_commands_list_and_clear(clock: Clock, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock.choose()
    choice.remember(choice.Choice("second", "tasks", "pinned by hand", user_file(folders)))
    assert tune.main(["--list", "--kernel", "conv_block_ways"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[:2] == ["conv_block_ways", f"  {user_file(folders)}: 2 choices"]
    assert listed[2] == "    second: tasks (pinned by hand)"
    assert ": grouped (measured on NVIDIA H100 80GB: triton 60.0 us, " in listed[3]
    assert list(choice.forget_measured()) == [user_file(folders)]
    assert [kept.key for kept in choice.read(user_file(folders))] == ["second"]
    assert clock.choose("second") == "tasks"
    assert tune.main(["--clear", "--kernel", "conv_block_ways"]) == 0
    assert capsys.readouterr().out == f"{user_file(folders)}: removed\n"
    assert clock.choose("second") == "grouped"
    put(user_file(folders), "no JSON")  # which a person may want to be rid of
    assert tune.main(["--clear"]) == 0
    assert not user_file(folders).exists()


def test_info_tells_what_is_known(clock: Clock, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.report() == ["triton, grouped, tasks, unfold: nothing measured yet on NVIDIA H100 80GB"]
    clock.choose()
    choice.remember(choice.Choice("second torch=1.0 triton=3", "tasks", "measured on it", user_file(folders)))
    shape = "transpose images=25 inputs=48 outputs=48 products=tf32x3 tasks=2"
    times = "triton 60.0 us, grouped 40.0 us, tasks 50.0 us, unfold 90.0 us"
    assert choice.report() == [f"{shape}: grouped ({times})"]
    monkeypatch.setenv(choice.VARIABLE, "unfold")
    assert choice.report() == ["unfold for every product, by CXGRAD_CONVOLUTION"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_info_without_a_device(folders: Path) -> None:
    lines = info.report()
    at = lines.index("ways to convolve")
    assert lines[at + 1] == "  triton, grouped, tasks, unfold: measured at first use on a CUDA device"
