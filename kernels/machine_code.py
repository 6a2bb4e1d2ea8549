"""The machine code of a Triton kernel for an architecture, made and looked at without a GPU.

Registers, spills, shared memory, instructions and how many programs fit on a multiprocessor, for a launch as it would
be: the types and alignments of the arguments decide as they do there. Tensors may be on the ``meta`` device::

    with machine_code.recording("sm_90") as launches:
        operator(x, weight)                       # on meta tensors: its launches are written down, none runs
    code = launches[0].compile()
    code.spills, code.count("HGMMA"), code.programs_per_sm
    launches[0].store()                           # into Triton's cache, where a launch on such a device finds it
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction, create_function_from_signature

from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import launch

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has.

    Attributes:
        shared: bytes of shared memory for programs, of which each takes ``reserved`` more than it asks for.
        shared_per_program: the most that one may ask for.
    """

    shared: int
    shared_per_program: int
    reserved: int = 1024
    registers: int = 65536
    threads: int = 2048
    programs: int = 32


LIMITS = {"sm_80": Limits(164 << 10, 163 << 10), "sm_90": Limits(228 << 10, 227 << 10)}


@dataclass(frozen=True)
class MachineCode:
    """One kernel, compiled.

    Attributes:
        kernel: its name.
        architecture: "sm_80" or "sm_90".
        num_warps: warps of a program.
        registers: of a thread.
        stack: bytes of a thread that lie in local memory.
        shared_memory: bytes of a program.
        instructions: how often each stands in the code, by full name (``LDG.E.128``); not how often it runs.
        ttir, ptx, sass: the texts on the way, and the end of it.
    """

    kernel: str
    architecture: str
    num_warps: int
    registers: int
    stack: int
    shared_memory: int
    instructions: Mapping[str, int]
    ttir: str = field(repr=False)
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    def count(self, name: str) -> int:
        """Instructions of a name, and those whose names go on behind it with a dot: ``LDG`` counts ``LDG.E.128``."""
        return sum(n for full, n in self.instructions.items() if full == name or full.startswith(f"{name}."))

    @property
    def spills(self) -> int:
        """Instructions that move a value to or from local memory; its bytes where there are none."""
        return self.count("LDL") + self.count("STL") or self.stack

    @property
    def programs_per_sm(self) -> int:
        """How many programs a multiprocessor runs at once; 0: not even one."""
        limits = LIMITS[self.architecture]
        if self.shared_memory > limits.shared_per_program:
            return 0
        warp_registers = launch.divide(self.registers * 32, 256) * 256  # they are given out in such parts
        return min(
            limits.registers // (warp_registers * self.num_warps),
            limits.threads // (32 * self.num_warps),
            limits.shared // (self.shared_memory + limits.reserved),
            limits.programs,
        )


@dataclass(frozen=True)
class Launch:
    """A launch that was written down.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis.
        arguments, options: as they were given.
        architecture: whose settings it has.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]
    architecture: str

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        """All of the grid."""
        return math.prod(self.grid)

    @property
    def key(self) -> tuple[str, str, str]:
        """What its code depends on: launches with equal keys run the same."""
        return _bound(self.kernel, self.arguments, self.architecture, self.options).key

    def compile(self) -> MachineCode:
        """Its machine code."""
        return compile(self.kernel, *self.arguments, architecture=self.architecture, **self.options)

    def store(self) -> Any:
        """Compile it into Triton's cache (``TRITON_CACHE_DIR``) where it is not there yet: what Triton has compiled.

        By the way that a launch goes, up to the launch.
        """
        _refuse_interpreter()
        with _active(_Driver(self.architecture)):
            return self.kernel.run(*self.arguments, grid=self.grid, warmup=True, **self.options)


@contextlib.contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """The launches of this block, with the settings for an architecture, written down instead of run."""
    _refuse_interpreter()
    launches: list[Launch] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, arguments, strict=False)) | options)
        launches.append(Launch(kernel, tuple(grid), arguments, options, architecture))

    original = JITFunction.run
    JITFunction.run = run
    try:
        with launch.on_architecture(architecture):
            yield launches
    finally:
        JITFunction.run = original


_compiled: dict[tuple[str, str, str], MachineCode] = {}


def compile(kernel: Any, *arguments: Any, architecture: str, **options: Any) -> MachineCode:
    """The machine code that a launch with these arguments and options would run; kept for the life of the process.

    Args:
        kernel: a ``@triton.jit`` function.
        arguments: its arguments, as at a launch; tensors on any device.
        architecture: "sm_80" or "sm_90".
        options: more arguments by name, and ``num_warps``, ``num_stages``, ``maxnreg``.

    Raises:
        InputError: Triton's interpreter is on, or another architecture.
    """
    _refuse_interpreter()
    if architecture not in LIMITS:
        raise InputError(f"architecture takes one of {', '.join(LIMITS)}, got '{architecture}'")
    bound = _bound(kernel, arguments, architecture, options)
    if bound.key not in _compiled:
        compiled = triton.compile(bound.source, target=_target(architecture), options=bound.options.__dict__)
        _compiled[bound.key] = _inspect(kernel.__name__, architecture, compiled)
    return _compiled[bound.key]


class _Bound(NamedTuple):
    """A launch as Triton's compiler takes it."""

    source: ASTSource
    options: Any
    key: tuple[str, str, str]


def _bound(kernel: Any, arguments: tuple[Any, ...], architecture: str, options: Mapping[str, Any]) -> _Bound:
    backend = make_backend(_target(architecture))
    given = {"debug": False, **options}
    bound, specialization, _ = _binder(kernel, architecture)(*arguments, **given)
    parsed, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, {})
    source = ASTSource(kernel, signature, constants, attributes)
    return _Bound(source, parsed, (source.hash(), parsed.hash(), architecture))


@functools.cache
def _binder(kernel: Any, architecture: str) -> Callable[..., Any]:
    """What a real launch does with its arguments."""
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(_target(architecture)))


def _target(architecture: str) -> GPUTarget:
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


class _Driver:
    """All that Triton asks of a device's driver before it launches; the device need not be there."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return _target(self._architecture)

    def get_current_device(self) -> str:
        return self._architecture  # a name by which kernels keep what is compiled; real devices are numbers

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def _active(stand_in: _Driver) -> Iterator[None]:
    before = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = before


def _inspect(name: str, architecture: str, compiled: Any) -> MachineCode:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = _tool("--dump-resource-usage", cubin.name), _tool("-sass", cubin.name)
    registers, stack = (int(found[1]) for found in map(_search(usage), (r"\bREG:(\d+)", r"\bSTACK:(\d+)")))
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE))
    meta, asm = compiled.metadata, compiled.asm
    texts = {"ttir": str(asm["ttir"]), "ptx": asm["ptx"], "sass": sass}
    return MachineCode(name, architecture, meta.num_warps, registers, stack, meta.shared, dict(instructions), **texts)


def _tool(option: str, file: str) -> str:
    return subprocess.run([_TOOL, option, file], capture_output=True, text=True, check=True).stdout


def _search(text: str) -> Callable[[str], re.Match[str]]:
    def search(pattern: str) -> re.Match[str]:
        found = re.search(pattern, text)
        assert found, f"cuobjdump says nothing of {pattern}"
        return found

    return search


def _refuse_interpreter() -> None:
    if triton.knobs.runtime.interpret:
        raise InputError("machine code needs Triton's compiler: unset TRITON_INTERPRET")
