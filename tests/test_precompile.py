"""bench/precompile.py: what it compiles is what a launch on a device looks for, and each worker takes a part."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import config_of
from torch import Tensor

from cxgrad_fast.cli import run_command

triton = pytest.importorskip("triton", reason="triton is there on Linux alone")
if triton.knobs.runtime.interpret:
    pytest.skip("machine code needs Triton's compiler", allow_module_level=True)
import precompile  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from cxgrad_fast.kernels import machine_code  # noqa: E402

Kernels = dict[tuple[str, str, str], machine_code.Launch]


@pytest.fixture(scope="module")
def launches() -> list[machine_code.Launch]:
    """Those of a tiny step."""
    return precompile.launches(config_of(inner__steps=1, outer__meta_batch=2), "float32", "sm_90")


@pytest.fixture
def kernels(launches: list[machine_code.Launch]) -> Kernels:
    return {launch.key: launch for launch in launches}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A cache of Triton's that is empty; whether what was compiled since was found in it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    return found


def on_host(value: Any) -> Any:
    """The same argument with memory."""
    if isinstance(value, list | tuple):
        return type(value)(map(on_host, value))
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
    return whole.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def test_a_whole_step_is_written_down(launches: list[machine_code.Launch], kernels: Kernels) -> None:
    """All passes of the step, first and second derivatives among them."""
    names = {launch.name for launch in launches}
    assert {"_forward", "_reduce", "_second", "_convolve", "_weight_gradient", "_pack", "_combine"} <= names
    assert len(names) < len(kernels) < len(launches)


def test_keys_are_those_of_tensors_with_memory(launches: list[machine_code.Launch]) -> None:
    for launch in launches:
        options = {name: on_host(value) for name, value in launch.options.items()}
        real = machine_code.Launch(launch.kernel, launch.grid, on_host(launch.arguments), options, "sm_90")
        assert real.key == launch.key, launch.name


def test_a_launch_finds_what_was_stored(kernels: Kernels, cached: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own way to a launch, of tensors with memory, for a device of which there is a driver alone."""
    launch = next(launch for launch in kernels.values() if launch.name == "_pack")
    stored = launch.store()
    assert cached == [False]
    device = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 7,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    found = launch.kernel.run(*on_host(launch.arguments), grid=launch.grid, warmup=True, **launch.options)
    assert cached == [False, True]
    assert found.hash == stored.hash
    assert found.asm["cubin"] == stored.asm["cubin"]


def test_every_kernel_is_one_worker_s(kernels: Kernels) -> None:
    for count in (1, 3, 100):
        parts = [precompile.share(kernels, worker, count) for worker in range(count)]
        assert sorted(launch.key for part in parts for launch in part) == sorted(kernels)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("backbone", precompile.BACKBONES)
def test_steps_are_those_of_the_table(backbone: str) -> None:
    found = list(precompile.cases("full", backbone, ["tf32", "bfloat16"]))
    tasks = {(config.preset, config.outer.meta_batch, precision) for config, precision in found}
    assert all(config.model.backbone == backbone for config, _ in found)
    if backbone == "conv4":
        assert ("released-mini-5w5s", 16, "tf32") in tasks
        copies = {(config.preset, precision) for config, precision in found if config.model.filters == 4}
        assert copies == {(f"released-mini-5w{k}s", each) for k in (1, 5) for each in ("float32", "float64")}
    else:
        assert tasks == {("released-mini-5w1s", 2, "tf32"), ("released-mini-5w1s", 2, "bfloat16")}


def test_a_kernel_that_does_not_compile_is_named(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def store(self: machine_code.Launch) -> None:
        if self.name == "_pack":
            raise RuntimeError("PassManager::run failed\nand more")

    monkeypatch.setattr(machine_code.Launch, "store", store)
    monkeypatch.setattr(precompile, "kernels", lambda *_: kernels)
    monkeypatch.setattr(precompile, "make_launcher", lambda compiled: "no driver")
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    assert run_command(precompile.main, ["0", "1", "float32"]) == 1
    out, err = capsys.readouterr()
    count, failed = len(kernels), sum(launch.name == "_pack" for launch in kernels.values())
    assert err.splitlines() == ["_pack does not compile: PassManager::run failed"] * failed
    assert out.startswith(f"worker 0 of 1: {count} of {count} kernels for sm_90, 0 were there, {failed} failed; ")
    assert out.endswith("their launchers are made at first use (no driver)\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2", "2"], "the worker I must be in 0 to N - 1 (= 1), got 2"),
        (["0", "1", "float16"], "PRECISIONS takes some of float64, float32, tf32, bfloat16, got 'float16'"),
    ],
)
def test_wrong_words_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(precompile.main, words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
