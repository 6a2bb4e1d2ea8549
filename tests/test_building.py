"""Building csrc/ into a library: once, whole or not at all, and in words where it cannot be. Tiny sources stand in."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from cxgrad_fast.kernels import building
from cxgrad_fast.kernels.building import BuildError, library

ANSWER = '#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n'


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "cache"))
    for name in ("CXX", "CXGRAD_MARCH", "CXGRAD_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    (folder / "answer.cpp").write_text(ANSWER)
    (folder / "other.cpp").write_text('extern "C" int other() { return 7; }\n')
    return folder


def objects(sources: Path) -> set[str]:
    return {path.name for path in (sources.parent / "cache" / "operators" / "objects").iterdir()}


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_built_once(sources: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = library(sources)
    assert answer(first) == 42
    assert capfd.readouterr().err == "cxgrad_fast: building the C++ operators (once, about a minute) ...\n"
    monkeypatch.setattr(building, "_build", lambda *arguments: pytest.fail("built again"))
    assert library(sources) == first
    assert capfd.readouterr().err == ""


def test_an_edit_builds_what_it_reaches(sources: Path) -> None:
    paths, found = [library(sources)], [objects(sources)]
    for name, content in (("other.cpp", "// a byte more"), ("answer.h", "constexpr int kAnswer = 43;\n")):
        (sources / name).write_text(content)
        paths.append(library(sources))
        found.append(objects(sources))
    assert len(set(paths)) == 3
    assert answer(paths[-1]) == 43
    new = [after - before for before, after in pairwise(found)]
    assert [[name.split("-")[0] for name in names] for names in new] == [["other"], ["answer"]]


def test_what_decides_a_library(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        return building._digest(building.recipe_of(sources).facts())

    seen = {digest()}
    assert digest() in seen
    changes = {
        "CXGRAD_MARCH": "x86-64-v2",
        "CXGRAD_SANITIZE": "undefined",
        "CXX": script(sources.parent, "echo another compiler"),
    }
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
        assert digest() not in seen, name
        seen.add(digest())
        monkeypatch.delenv(name)
    with monkeypatch.context() as patch:
        patch.setattr(building.torch, "__version__", "2.99.0")
        assert digest() not in seen
    monkeypatch.setattr(building, "_abilities", lambda: ["another", "machine"])
    assert digest() not in seen


def test_processes_at_once_build_once(sources: Path) -> None:
    command = "import sys; from pathlib import Path; from cxgrad_fast.kernels.building import library; "
    command += "print(library(Path(sys.argv[1])))"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", command, str(sources)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    done = [child.communicate(timeout=100) for child in children]
    assert [child.returncode for child in children] == [0, 0], done
    assert len({out for out, _ in done}) == 1
    assert answer(Path(done[0][0].strip())) == 42
    assert "".join(err for _, err in done).count("building") == 1


def kill_session(leader: int) -> None:
    """All processes of a session: ninja gives each of its own a group."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(entry.name)) == leader:
                os.kill(int(entry.name), signal.SIGKILL)


def test_a_killed_build_leaves_nothing_to_be_taken(sources: Path) -> None:
    started = sources.parent / "started"  # pipes: opening one waits for its other end
    never = sources.parent / "never"
    os.mkfifo(started)
    os.mkfifo(never)
    compiler = script(sources.parent, f'[ "$1" = --version ] && exec g++ --version\n: > {started}\nexec cat {never}')
    command = "from pathlib import Path; from cxgrad_fast.kernels.building import library; "
    command += f"library(Path({str(sources)!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", command], env=os.environ | {"CXX": compiler}, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    started.read_bytes()
    child.kill()
    child.wait()
    folder = sources.parent / "cache" / "operators"
    (left,) = folder.glob("unfinished-*")
    assert answer(library(sources)) == 42  # the lock died with its owner
    kill_session(child.pid)  # what the dead build had started
    assert left.exists()  # it could be somebody's
    os.utime(left, (0, 0))
    (sources / "other.cpp").write_text("// edited")
    library(sources)
    assert not left.exists()


def test_old_builds_go(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "KEPT_BUILDS", 2)
    monkeypatch.setattr(building, "KEPT_OBJECTS", 3)
    paths = []
    for edit in range(4):
        (sources / "other.cpp").write_text(f"// edit {edit}")
        paths.append(library(sources))
        os.utime(paths[-1].parent, (edit, edit))
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert len(objects(sources)) == 3


def test_packaged(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = sources.parent / "package"
    (package / "kernels").mkdir(parents=True)
    sources.rename(package / "csrc")
    building.install(package)
    packaged = package / "kernels" / "built"
    monkeypatch.setenv("PATH", "/nonexistent")  # it needs no compiler
    assert library(package / "csrc", packaged) == packaged / "operators.so"
    with monkeypatch.context() as patch:
        patch.setattr(building, "_abilities", lambda: ["another", "machine"])
        with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
            library(package / "csrc", packaged)
    (package / "csrc" / "other.cpp").write_text("// edited")
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        library(package / "csrc", packaged)


def test_reasons(sources: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def reason() -> str:
        with pytest.raises(BuildError) as caught:
            library(sources)
        return str(caught.value)

    (sources / "broken.cpp").write_text("int a = 1;\nint b = c;\n")
    assert reason().startswith("the C++ operators do not compile: broken.cpp:2:9: error: ")
    (sources / "broken.cpp").unlink()
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -v")
        assert reason() == "no C++ compiler: CXX = no-such-compiler -v, which is not there"
        patch.setenv("CXX", "false")
        assert "does not run" in reason()
    with monkeypatch.context() as patch:
        patch.setenv("CXGRAD_MARCH", "x86-64-v4")
        patch.setattr(building, "_abilities", lambda: ["avx512f", "avx512cd", "avx512dq", "avx512vl"])
        assert reason() == "CXGRAD_MARCH = x86-64-v4, but this CPU has no avx512bw"
    with monkeypatch.context() as patch:
        patch.setenv("CXGRAD_CACHE", "/proc/nowhere")
        assert reason() == (
            "cannot build in '/proc/nowhere/operators' (No such file or directory); CXGRAD_CACHE names another"
        )
    with monkeypatch.context() as patch:
        patch.setattr(building, "cache_folder", lambda: None)
        assert reason() == "no home folder to build in: CXGRAD_CACHE names a folder"
    with monkeypatch.context() as patch:
        patch.setattr(building.shutil, "which", lambda name, path=None: None if name == "ninja" else f"/usr/bin/{name}")
        assert reason() == "no ninja, which builds the C++ operators: pip install ninja"
    with monkeypatch.context() as patch:
        patch.setattr(building.sys, "platform", "darwin")
        assert reason() == "the C++ operators are built on Linux, this is darwin"
    for path in sources.iterdir():
        path.unlink()
    assert reason() == f"no C++ sources in '{sources}'"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process with operators that cannot be built."""
    lines = "import torch; from cxgrad_fast.kernels import patch_statistics; x = torch.rand(1, 2, 3, 4, 4)\n"
    return subprocess.run(
        [sys.executable, "-c", lines + code], env=os.environ | {"PATH": "/nonexistent"} | environment,
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_no_compiler_costs_one_warning(sources: Path) -> None:
    done = run("for _ in range(3): patch_statistics(x)\nprint('and on')")
    assert done.stdout == "and on\n"
    assert done.stderr.count("\n") == 1
    assert "RuntimeWarning: cpp operators cannot run here" in done.stderr
    assert "the slower PyTorch reference takes over: no C++ compiler: neither g++" in done.stderr
    assert "<string>:2" in done.stderr  # the caller's line


def test_no_compiler_and_named_is_an_error(sources: Path) -> None:
    done = run("patch_statistics(x)", CXGRAD_BACKEND="cpp")
    assert done.returncode == 1
    assert "InputError: CXGRAD_BACKEND = cpp cannot run here: no C++ compiler: neither g++" in done.stderr
