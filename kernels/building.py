"""Building the C++ operators of ``csrc/`` into one library, once.

A library lies in a folder named by a hash of all that decides it (the facts): sources, flags, torch, compiler, CPU.
``pip install .`` puts one into the package, for the machine that it runs on; where that one does not fit, the first use
builds another into the cache. Objects are kept too, by their own hashes: an edit compiles what it touches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cxgrad_fast.cache_folder import cache_folder

SOURCES = Path(__file__).parent.parent / "csrc"  # of the repository, and of an installed package
PACKAGED = Path(__file__).parent / "built"
LIBRARY, FACTS = "operators.so", "facts.json"

KEPT_BUILDS, KEPT_OBJECTS = 8, 40
STALE = 24 * 3600  # seconds after which a folder that a killed build left is nobody's

_OPTIMISED = ("-O3", "-ffp-contract=fast")
_SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_COMMON = ("-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_LEVELS = {  # what the CPU must name for a target of our documentation
    "x86-64-v3": {"avx2", "fma", "bmi2"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


class BuildError(Exception):
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a library.

    Attributes:
        sources: the bytes of every source and header, by name.
        compiler: the command, as words.
        version: what the compiler calls itself.
        flags: of every compilation and of linking.
        cpu: the machine's instruction sets where the target is ``native``, else empty.
    """

    sources: dict[str, bytes]
    compiler: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    cpu: str

    def facts(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "sources": {name: hashlib.sha256(content).hexdigest() for name, content in self.sources.items()},
            "flags": list(self.flags),
            "torch": torch.__version__,
            "compiler": self.version,
            "cpu": self.cpu,
        }

    def object_key(self, name: str) -> str:
        """The hash of one object: its source, the headers that it reaches, and the rest of the facts."""
        reached: set[str] = set()
        waiting = [name]
        while waiting:
            reached.add(here := waiting.pop())
            includes = re.findall(rb'^\s*#\s*include\s*"(.+)"', self.sources[here], re.MULTILINE)
            waiting += [part for part in map(bytes.decode, includes) if part in self.sources and part not in reached]
        facts = self.facts()
        return _digest(facts | {"sources": [(part, facts["sources"][part]) for part in sorted(reached)], "of": name})


def library(sources: Path = SOURCES, packaged: Path = PACKAGED) -> Path:
    """The library's file: the packaged one where it fits, else the cache's, built now where it is not there.

    Raises:
        BuildError: it cannot be built.
    """
    _refuse_strange_machines()
    if (found := _packaged(sources, packaged)) is not None:
        return found
    recipe = recipe_of(sources)
    folder = _cache()
    wanted = folder / _digest(recipe.facts()) / LIBRARY
    if not wanted.exists():
        try:
            _build(recipe, folder, wanted)
        except OSError as error:
            why = error.strerror or error
            raise BuildError(f"cannot build in '{folder}' ({why}); CXGRAD_CACHE names another") from error
    with contextlib.suppress(OSError):
        os.utime(wanted.parent)  # the last to be cleared away
    return wanted


def install(package: Path) -> None:
    """Put the library into a package's folder (``setup.py``)."""
    kernels = package / "kernels"
    built = library(package / "csrc", kernels / "nothing-packaged-yet")
    shutil.copytree(built.parent, kernels / PACKAGED.name, dirs_exist_ok=True)


def recipe_of(sources: Path) -> Recipe:
    """The recipe for the sources in a folder, as the environment wants it.

    Raises:
        BuildError: no sources, no compiler, or a target that this CPU cannot run.
    """
    compiler = _compiler()
    try:
        told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"the C++ compiler '{shlex.join(compiler)}' does not run: {error}") from error
    return Recipe(_read(sources), tuple(compiler), told.partition("\n")[0], *_flags())


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        words = shlex.split(named)
        if not shutil.which(words[0]):
            raise BuildError(f"no C++ compiler: CXX = {named}, which is not there")
        return words
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: neither g++, c++ nor clang++ is there (CXX names another)")


def _flags() -> tuple[tuple[str, ...], str]:
    """Flags, and what the CPU can where they depend on it."""
    march = os.environ.get("CXGRAD_MARCH") or "native"
    abilities = _abilities()
    missing = _LEVELS.get(march, set()) - set(abilities)
    if missing:
        raise BuildError(f"CXGRAD_MARCH = {march}, but this CPU has no {', '.join(sorted(missing))}")
    sanitizers = os.environ.get("CXGRAD_SANITIZE")
    mode = (*_SANITIZED, f"-fsanitize={sanitizers}") if sanitizers else _OPTIMISED
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    return (*_COMMON, abi, *mode, f"-march={march}"), " ".join(abilities) if march == "native" else ""


def _abilities() -> list[str]:
    """The instruction sets that the CPU names."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(value.split())
    return [platform.machine(), platform.processor()]


def _read(sources: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(sources.glob("*")) if path.suffix in (".cpp", ".h")}
    if not any(name.endswith(".cpp") for name in found):
        raise BuildError(f"no C++ sources in '{sources}'")
    return found


def _packaged(sources: Path, packaged: Path) -> Path | None:
    """The packaged library, if it was built from these sources for this torch and this CPU; needs no compiler."""
    try:
        facts = json.loads((packaged / FACTS).read_text())
    except (OSError, ValueError):
        return None
    wanted = Recipe(_read(sources), (), facts.get("compiler", ""), *_flags()).facts()
    return packaged / LIBRARY if facts == wanted and (packaged / LIBRARY).exists() else None


def _build(recipe: Recipe, folder: Path, wanted: Path) -> None:
    """Make ``wanted``, in a temporary folder first; of several processes one builds and the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        if wanted.exists():
            return
        print("cxgrad_fast: building the C++ operators (once, about a minute) ...", file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix="unfinished-"))
        try:
            for name, content in recipe.sources.items():  # what was hashed is what is compiled
                (work / name).write_bytes(content)
            _run_ninja(recipe, work, folder / "objects")
            finished = work / "finished"
            finished.mkdir()
            (finished / FACTS).write_text(json.dumps(recipe.facts(), indent=1))
            os.replace(work / LIBRARY, finished / LIBRARY)
            with contextlib.suppress(FileExistsError):
                os.replace(finished, wanted.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _clear(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on every system that may import this

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system takes it back from a process that dies
        yield


def _run_ninja(recipe: Recipe, work: Path, store: Path) -> None:
    """Compile what the store of objects lacks, and link."""
    names = [name for name in recipe.sources if name.endswith(".cpp")]
    kept = {name: store / f"{Path(name).stem}-{recipe.object_key(name)}.o" for name in names}
    missing = [name for name in names if not kept[name].exists()]
    objects = [Path(name).with_suffix(".o") if name in missing else kept[name] for name in names]
    compiler, flags = shlex.join(recipe.compiler), shlex.join(recipe.flags)
    root = Path(torch.__file__).parent
    folders = (root / "include", root / "include/torch/csrc/api/include")
    includes = shlex.join(word for path in folders for word in ("-isystem", str(path)))
    libraries = shlex.join((f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"))
    lines = [
        "rule compile",
        f"  command = {_ninja_text(f'{compiler} {flags} {includes}')} -c $in -o $out",
        "rule link",
        f"  command = {_ninja_text(f'{compiler} {flags} -shared')} $in -o $out {_ninja_text(libraries)}",
        *(f"build {Path(name).with_suffix('.o')}: compile {name}" for name in missing),
        f"build {LIBRARY}: link {' '.join(_ninja_text(str(path)).replace(' ', '$ ') for path in objects)}",
        "",
    ]
    (work / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run([_ninja()], cwd=work, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"the C++ operators do not compile: {_first_error(done.stdout + done.stderr)}")
    store.mkdir(exist_ok=True)
    for name, path in kept.items():
        if name in missing:
            os.replace((work / name).with_suffix(".o"), path)
        os.utime(path)  # the last to be cleared away


def _ninja() -> str:
    """Ninja's file: the package's puts it beside the interpreter, which need not be on the PATH."""
    places = (None, sysconfig.get_path("scripts"))
    found = next((file for place in places if (file := shutil.which("ninja", path=place))), None)
    if found is None:
        raise BuildError("no ninja, which builds the C++ operators: pip install ninja")
    return found


def _ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def _first_error(output: str) -> str:
    """The compiler's first line with an error, else the last line that it said."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = (line for line in lines if re.search(r"\b(fatal )?error\b|undefined reference", line))
    return next(errors, lines[-1] if lines else "ninja says nothing")


def _clear(folder: Path) -> None:
    """Keep the newest builds and objects, and what other processes are building."""
    now = time.time()
    with contextlib.suppress(OSError):  # another process clears too
        builds = [path for path in folder.iterdir() if (path / FACTS).exists()]
        left = [path for path in folder.glob("unfinished-*") if now - path.stat().st_mtime > STALE]
        for path in sorted(builds, key=_age)[KEPT_BUILDS:] + left:
            shutil.rmtree(path, ignore_errors=True)
        for path in sorted((folder / "objects").iterdir(), key=_age)[KEPT_OBJECTS:]:
            path.unlink(missing_ok=True)


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _cache() -> Path:
    cache = cache_folder()
    if cache is None:
        raise BuildError("no home folder to build in: CXGRAD_CACHE names a folder")
    return cache / "operators"


def _refuse_strange_machines() -> None:
    if sys.platform != "linux":
        raise BuildError(f"the C++ operators are built on Linux, this is {sys.platform}")


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
