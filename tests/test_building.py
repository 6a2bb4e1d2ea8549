"""Building csrc/ into a library: once, whole or not at all, and in words where it cannot be. Tiny sources stand in."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import give_away

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


@pytest.mark.slow
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
    assert not left.exists()


def test_where_no_locks_are_only_old_unfinished_builds_go(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    young, old = (sources.parent / "cache" / "operators" / f"unfinished-{name}" for name in ("young", "old"))
    for folder in (young, old):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    assert answer(library(sources)) == 42
    assert young.exists()  # another process may be building in it
    assert not old.exists()


def test_two_builds_at_once_where_no_locks_are(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to finish takes what the first has put there."""

    def no_lock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    usual, first = building._run_ninja, []

    def faster(*arguments: object) -> None:
        monkeypatch.setattr(building, "_run_ninja", usual)
        first.append(library(sources).stat())
        usual(*arguments)

    monkeypatch.setattr(building, "_run_ninja", faster)
    path = library(sources)
    assert os.path.samestat(path.stat(), first[0])
    assert answer(path) == 42


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


# --- what is damaged, or somebody else's ---


def replace(path: Path, content: bytes) -> None:
    """Give a file another content, but not what is loaded: that lives on without a name."""
    path.unlink()
    path.write_bytes(content)


def builds_again(sources: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library, which must be built again for it, and only this once."""
    built: list[Path] = []
    build = building._build

    def recording(recipe: building.Recipe, folder: Path, wanted: Path) -> None:
        built.append(wanted)
        build(recipe, folder, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(building, "_build", recording)
        path = library(sources)
        assert library(sources) == path
    assert built == [path.parent]
    return path


DAMAGE = {
    "empty": lambda content: b"",
    "a part": lambda content: content[: len(content) // 2],
    "one bit": lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],  # of facts: in a hash
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("name", ["operators.so", "facts.json"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_build_is_built_again(
    sources: Path, name: str, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading half a library kills the process (SIGBUS)."""
    file = library(sources).with_name(name)
    damaged = damage(file.read_bytes())
    replace(file, damaged)
    path = builds_again(sources, monkeypatch)
    assert file.read_bytes() != damaged
    assert answer(path) == 42


@pytest.mark.parametrize("facts", ["[]", "{}", "null", '"text"'])
def test_other_facts_build_again(sources: Path, facts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replace(library(sources).with_name("facts.json"), facts.encode())
    assert answer(builds_again(sources, monkeypatch)) == 42


def test_what_is_no_build_is_replaced(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = library(sources).parent
    elsewhere = sources.parent / "elsewhere"
    os.rename(build, elsewhere)
    build.symlink_to(elsewhere)
    assert answer(builds_again(sources, monkeypatch)) == 42
    assert (elsewhere / "operators.so").exists()
    shutil.rmtree(build)
    build.write_bytes(b"a file")
    assert answer(builds_again(sources, monkeypatch)) == 42


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_object_is_compiled_again(sources: Path, damage: Callable[[bytes], bytes]) -> None:
    build = library(sources).parent
    for path in (sources.parent / "cache" / "operators" / "objects").iterdir():
        replace(path, damage(path.read_bytes()))
    shutil.rmtree(build)
    assert answer(library(sources)) == 42


def plant(sources: Path, build: Path) -> None:
    """Put a library of one's own choice into a build, with its hash."""
    other = sources.parent / "planted"
    other.mkdir()
    (other / "answer.cpp").write_text('extern "C" int answer() { return 666; }')
    subprocess.run(["g++", "-shared", "-fPIC", "-o", "answer.so", "answer.cpp"], cwd=other, check=True)
    facts = json.loads((build / "facts.json").read_bytes())
    with open(other / "answer.so", "rb") as file:
        facts["library"] = building.sha256(file)
    replace(build / "operators.so", (other / "answer.so").read_bytes())
    replace(build / "facts.json", json.dumps(facts).encode())


def test_a_planted_library_is_not_loaded(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = library(sources).parent
    plant(sources, build)
    with monkeypatch.context() as patch:
        give_away(build / "operators.so", patch)
        assert answer(builds_again(sources, patch)) == 42


@pytest.mark.parametrize("name", ["", "operators.so", "facts.json"])
@pytest.mark.parametrize("bits", [0o020, 0o002])
def test_a_build_that_others_can_write_is_built_again(
    sources: Path, name: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library(sources).parent / name
    path.chmod(path.stat().st_mode | bits)
    assert answer(builds_again(sources, monkeypatch)) == 42


@pytest.mark.parametrize("name", ["", "facts.json"])
def test_a_build_of_somebody_else_s_is_built_again(sources: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library(sources).parent / name
    with monkeypatch.context() as patch:
        give_away(path, patch)
        assert answer(builds_again(sources, patch)) == 42


@pytest.mark.parametrize("name", ["", "operators", "operators/objects"])
def test_a_cache_that_others_can_write_is_not_used(sources: Path, name: str) -> None:
    build = library(sources).parent
    folder = sources.parent / "cache" / name
    folder.chmod(0o777)
    if name.endswith("objects"):
        shutil.rmtree(build)
    with pytest.raises(BuildError) as caught:
        library(sources)
    assert str(caught.value) == (
        f"cannot build in '{sources.parent}/cache/operators' "
        f"(others can write '{folder}': chmod go-w '{folder}'); CXGRAD_CACHE names another"
    )
    folder.chmod(0o700)
    assert answer(library(sources)) == 42


def test_a_lock_that_is_a_link_is_not_followed(sources: Path) -> None:
    precious = sources.parent / "precious"
    precious.write_text("content")
    lock = sources.parent / "cache" / "operators" / "lock"
    lock.parent.mkdir(parents=True)
    lock.symlink_to(precious)
    with pytest.raises(BuildError, match=r"cannot build in '.*/operators' \('.*/operators/lock' is a link\); "):
        library(sources)
    assert precious.read_text() == "content"


def test_everything_is_made_for_the_user_alone(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system's default lets a group write: what is built there is found whole again."""
    before = os.umask(0o002)
    try:
        path = library(sources)
        monkeypatch.setattr(building, "_build", lambda *arguments: pytest.fail("built again"))
        assert library(sources) == path
    finally:
        os.umask(before)
    cache = sources.parent / "cache"
    modes = {str(path.relative_to(cache)): path.stat().st_mode & 0o777 for path in [cache, *cache.rglob("*")]}
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}
    assert {modes["."], modes["operators"], modes["operators/objects"]} == {0o700}


def test_a_cache_below_the_working_folder(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXGRAD_CACHE", "cache")
    monkeypatch.chdir(sources.parent)
    library(sources)
    (sources / "other.cpp").write_text("// edited")
    assert answer(library(sources)) == 42  # of an object that was kept


# --- in the package, and where nothing can be built ---


def test_packaged(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = sources.parent / "package"
    (package / "kernels").mkdir(parents=True)
    sources.rename(package / "csrc")
    building.install(package)
    packaged = package / "kernels" / "built"
    assert [path.stat().st_mode & 0o777 for path in (packaged, *packaged.iterdir())] == [0o755, 0o644, 0o644]
    monkeypatch.setenv("PATH", "/nonexistent")  # it needs no compiler
    assert library(package / "csrc", packaged) == packaged / "operators.so"
    whole = (packaged / "operators.so").read_bytes()
    for damage in DAMAGE.values():
        replace(packaged / "operators.so", damage(whole))
        with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
            library(package / "csrc", packaged)
    replace(packaged / "operators.so", whole)
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
