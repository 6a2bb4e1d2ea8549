"""Building the C++ operators of ``csrc/`` into one library, once.

A library lies in a folder named by a hash of all that decides it (the facts): sources, flags, torch, compiler, CPU.
``pip install .`` puts one into the package, for the machine that it runs on; where that one does not fit, the first use
builds another into the cache. Objects are kept too, by their own hashes: an edit compiles what it touches.

Loading a library runs it, and loading a part of one kills the process. So the facts also hold the library's SHA-256,
which is compared before every use, and what somebody else owns or can write is not used: a folder of the cache is
refused, a build is made again.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.files import (
    check_folder,
    locked,
    move_whole,
    open_own,
    open_regular,
    own_folder,
    read_own,
    sha256,
    sync_folder,
    write_whole,
)

SOURCES = Path(__file__).parent.parent / "csrc"  # of the repository, and of an installed package
PACKAGED = Path(__file__).parent / "built"
LIBRARY, FACTS = "operators.so", "facts.json"
UNFINISHED = "unfinished-"  # begins the names of folders in which something is built

KEPT_BUILDS, KEPT_OBJECTS = 8, 40
STALE = 24 * 3600  # seconds after which such a folder is nobody's, where no lock tells

_OPTIMISED = ("-O3", "-ffp-contract=fast")
_SANITIZED = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_COMMON = ("-std=c++20", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
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
    build = folder / _digest(recipe.facts())
    try:
        own_folder(folder.parent)
        own_folder(folder)
        if not _is_whole(recipe, build):
            _build(recipe, folder, build)
    except OSError as error:
        why = error.strerror or error
        raise BuildError(f"cannot build in '{folder}' ({why}); CXGRAD_CACHE names another") from error
    with contextlib.suppress(OSError):
        os.utime(build)  # the last to be cleared away
    return build / LIBRARY


def install(package: Path) -> None:
    """Put the library into a package's folder (``setup.py``)."""
    kernels = package / "kernels"
    built = library(package / "csrc", kernels / "nothing-packaged-yet")
    (kernels / PACKAGED.name).mkdir(exist_ok=True)
    for name in (LIBRARY, FACTS):  # without the cache's permissions: everybody may read an installed package
        shutil.copyfile(built.with_name(name), kernels / PACKAGED.name / name)


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
    """The packaged library, if it is whole and was built from these sources for this torch and this CPU.

    It needs no compiler. Its owner does not matter: who installed it also installed this code.
    """
    try:
        facts = json.loads((packaged / FACTS).read_bytes())
        with open_regular(packaged / LIBRARY) as file:
            digest = sha256(file)
        wanted = Recipe(_read(sources), (), facts.get("compiler", ""), *_flags())
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return packaged / LIBRARY if facts == _facts_of_build(wanted, digest) else None


def _facts_of_build(recipe: Recipe, digest: str) -> dict[str, Any]:
    """What is written beside a library: the recipe's facts, and its own SHA-256."""
    return recipe.facts() | {"library": digest}


def _is_whole(recipe: Recipe, build: Path) -> bool:
    """Whether a folder of the cache holds the library as it was built, and nobody else owns it or can write it."""
    try:
        check_folder(build, follow=False)
        facts = json.loads(read_own(build / FACTS))
        with open_own(build / LIBRARY) as file:
            return bool(facts == _facts_of_build(recipe, sha256(file)))
    except (OSError, ValueError, RecursionError):
        return False


def _build(recipe: Recipe, folder: Path, build: Path) -> None:
    """Make ``build``, in a temporary folder first; of several processes one builds and the others wait for it."""
    with locked(folder / "lock") as is_locked:
        if _is_whole(recipe, build):
            return
        print("cxgrad_fast: building the C++ operators (once, about a minute) ...", file=sys.stderr, flush=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
        try:
            for name, content in recipe.sources.items():  # what was hashed is what is compiled
                (work / name).write_bytes(content)
            _run_ninja(recipe, work, folder / "objects")
            finished = work / "finished"
            finished.mkdir(mode=0o700)
            with open_regular(work / LIBRARY) as file:
                facts = _facts_of_build(recipe, sha256(file))
            move_whole(work / LIBRARY, finished / LIBRARY)
            write_whole(finished / FACTS, lambda file: file.write(json.dumps(facts, indent=1).encode()))
            if not _is_whole(recipe, build):  # another process was not faster, on a file system without locks
                _put(finished, build)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _clear(folder, is_locked)


def _put(finished: Path, build: Path) -> None:
    """Move a finished build to its name, in the place of a damaged or strange one."""
    if build.is_symlink() or build.is_file():
        build.unlink()
    elif build.exists():  # a folder of another user's can be renamed, but not emptied
        os.replace(build, tempfile.mkdtemp(dir=build.parent, prefix=UNFINISHED))
    os.replace(finished, build)
    sync_folder(build.parent)


def _run_ninja(recipe: Recipe, work: Path, store: Path) -> None:
    """Compile what the store of objects lacks, and link."""
    own_folder(store)
    names = [name for name in recipe.sources if name.endswith(".cpp")]
    found = {name: _kept_object(store, _object_stem(recipe, name)) for name in names}
    kept = {name: path for name, path in found.items() if path is not None}
    missing = [name for name in names if name not in kept]
    objects = [kept.get(name, Path(name).with_suffix(".o")) for name in names]
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
    for path in kept.values():
        os.utime(path)  # the last to be cleared away
    for name in missing:
        made = (work / name).with_suffix(".o")
        with open_regular(made) as file:
            digest = sha256(file)
        move_whole(made, store / f"{_object_stem(recipe, name)}-{digest}.o")


def _object_stem(recipe: Recipe, name: str) -> str:
    """How the name of a kept object begins; it ends in the SHA-256 of its content."""
    return f"{Path(name).stem}-{recipe.object_key(name)}"


def _kept_object(store: Path, stem: str) -> Path | None:
    """The object in the store, if it is there, whole, and nobody else's."""
    for path in store.glob(f"{stem}-*.o"):
        with contextlib.suppress(OSError), open_own(path) as file:
            if path.name == f"{stem}-{sha256(file)}.o":
                return path
    return None


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


def _clear(folder: Path, is_locked: bool) -> None:
    """Keep the newest builds and objects, and what other processes are building."""
    oldest = time.time() - STALE
    with contextlib.suppress(OSError):  # another process clears too
        others = [path for path in folder.iterdir() if not path.name.startswith(UNFINISHED)]
        builds = [path for path in others if (path / FACTS).exists()]
        # under the lock nobody else is building
        left = [path for path in folder.glob(f"{UNFINISHED}*") if is_locked or path.stat().st_mtime < oldest]
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
    return cache.absolute() / "operators"  # the compiler runs in another folder


def _refuse_strange_machines() -> None:
    if sys.platform != "linux":
        raise BuildError(f"the C++ operators are built on Linux, this is {sys.platform}")


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
