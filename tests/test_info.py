import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import give_away, require_cpp

from cxgrad_fast import info
from cxgrad_fast.cli import run_command
from cxgrad_fast.kernels import backends, registration


def test_the_command_starts_neither_cuda_nor_triton() -> None:
    check = (
        "import sys; from cxgrad_fast import info; code = info.main([]); import torch\n"
        "started = torch.cuda.is_initialized() and not torch.cuda.is_available()\n"  # a device's name costs a start
        "sys.exit(code or 'triton' in sys.modules or started)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f"torch         {torch.__version__.partition('+')[0]}" in done.stdout
    assert "\nways to convolve\n  " in done.stdout


def test_it_tells_versions_devices_and_every_backend(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("CXGRAD_CACHE", cache := str(tmp_path))
    monkeypatch.setattr(backends, "availability", lambda: {"reference": "", "cpp": "the extension is not built"})
    assert run_command(info.main, []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  python        " + ".".join(map(str, sys.version_info[:3])) in lines
    assert "  reference     yes" in lines
    assert "  cpp           no: the extension is not built" in lines
    monkeypatch.setattr(backends, "availability", lambda: {"reference": "", "cpp": ""})
    monkeypatch.setattr(backends, "details", lambda: {"cpp": "AVX2, /a/file.so"})
    assert "  cpp           yes, AVX2, /a/file.so" in info.report()
    assert any(line.startswith("  cpu ") and line.endswith(f"{torch.get_num_threads()} threads") for line in lines)
    assert f"  {cache}" in lines


def test_it_tells_why_the_cache_is_not_used(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXGRAD_CACHE", str(folder := tmp_path / "cache"))
    assert info.report()[-1] == f"  {folder}, made at its first use"
    folder.mkdir()
    assert info.report()[-1] == f"  {folder}"
    folder.chmod(0o777)
    assert info.report()[-1] == f"  {folder}, not used: others can write '{folder}': chmod go-w '{folder}'"
    give_away(folder, monkeypatch)
    assert info.report()[-1] == f"  {folder}, not used: '{folder}' belongs to another user, number 65534"
    monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "dangling"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert info.report()[-1] == f"  {tmp_path}/dangling, made at its first use"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_no_terminal_can_show(encoding) -> None:
    """Bytes that are no UTF-8, and control characters, in the cache's name and in why the operators are not there."""
    environment = os.environ | {"PYTHONIOENCODING": f"{encoding}:strict", "CXGRAD_CACHE": "/proc/a\udcff\nb\x1b"}
    command = [sys.executable, "-m", "cxgrad_fast.info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == r"  /proc/a\udcff b\x1b, made at its first use"
    assert r"no: cannot build in '/proc/a\udcff b\x1b/operators' (No such file or directory); CXGRAD_" in done.stdout


def test_it_tells_which_precisions_are_for_this_machine(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_cpp()
    registration.load()
    try:
        torch.ops.cxgrad_fast.assume_tiles(False)
        assert "  tf32          no: it needs the Triton operators on a CUDA device" in info.report()
        assert any(
            line.startswith("  bfloat16      no: it needs a CUDA device or a CPU with AMX") for line in info.report()
        )
        torch.ops.cxgrad_fast.assume_tiles(True)
        assert {"  bfloat16      yes"} < set(info.report())
        assert any(line.startswith("  cpp ") and " and AMX, " in line for line in info.report())
        monkeypatch.setenv(backends.ROUND_IN_SOFTWARE, "1")
        assert {"  tf32          yes, rounded in software", "  bfloat16      yes"} < set(info.report())
    finally:
        torch.ops.cxgrad_fast.assume_tiles(None)


def test_a_missing_package_is_told_not_met(monkeypatch) -> None:
    assert info.package_version("no-such-package-of-ours") == "not installed"
    monkeypatch.setattr(info, "_PACKAGES", ("torch", "no-such-package-of-ours"))
    assert "  no-such-package-of-ours not installed" in info.report()


@pytest.mark.parametrize(
    ("version", "is_available", "said"),
    [
        (None, False, "no: torch is built without it"),
        ("13.0", False, "no: torch is built for CUDA 13.0, but finds no driver or no device"),
        ("13.0", True, "CUDA 13.0: H100, H100"),
    ],
)
def test_why_there_is_no_cuda(monkeypatch, version: str | None, is_available: bool, said: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    assert info.cuda_state() == said


@pytest.mark.parametrize(
    ("version", "capability", "compiler", "said"),
    [
        (None, None, "gcc", "needs a CUDA device of .* 8.0 .* or newer, and torch is built without CUDA"),
        ("13.0", None, "gcc", "needs a CUDA device .*; torch, built for CUDA 13.0, finds no driver or no device"),
        ("13.0", (7, 5), "gcc", "needs a CUDA device .* newer; T4 has 7.5"),
        ("13.0", (9, 0), "gcc", ""),
        ("13.0", (9, 0), None, "triton compiles its launchers with a C compiler, and there is neither .*"),
    ],
)
def test_why_there_is_no_triton(
    monkeypatch, version: str | None, capability: tuple[int, int] | None, compiler: str | None, said: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    monkeypatch.setattr(backends.shutil, "which", lambda name: compiler)
    why = backends._why_not_triton.__wrapped__  # without what it remembers
    assert re.fullmatch(said, why())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why() == ""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert why().startswith("triton is not installed")


def test_settings_are_refused(capsys) -> None:
    assert run_command(info.main, ["--task.shots", "5"]) == 2
    assert capsys.readouterr().err == "error: info takes no settings, got '--task.shots'\n"


def test_a_reader_that_stops_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cxgrad_fast.info"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
