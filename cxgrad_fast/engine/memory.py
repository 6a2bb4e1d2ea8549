"""How much memory a meta-step needs, known before it runs, and how many tasks at once fit."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

SHARE = 0.8  # of what is free that a plan may use: there is scratch memory beside the tensors, and fragmentation


@dataclass(frozen=True)
class MemoryPlan:
    """How a meta-batch goes through.

    Attributes:
        tasks: of the meta-batch.
        chunk: how many of them at once.
        predicted: bytes of tensors at the peak of a meta-step, the episodes' and the meta-parameters' not among them.
        available: bytes that were free on the device.
    """

    tasks: int
    chunk: int
    predicted: int
    available: int

    def __str__(self) -> str:
        parts = "all at once" if self.chunk >= self.tasks else f"{self.chunk} at a time (run.tasks_per_chunk)"
        sizes = f"predicted peak {megabytes(self.predicted)}, {megabytes(self.available)} free"
        return f"memory: {self.tasks} tasks, {parts}: {sizes}"


def megabytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:.0f} MB"


def plan(predict: Callable[[int], int], tasks: int, available: int, chunk: int = 0) -> MemoryPlan:
    """The largest chunk whose predicted peak is within :data:`SHARE` of what is available; one task at the least.

    Args:
        predict: bytes at the peak of so many tasks at once. They grow in proportion to the tasks but for what is there
            once, so that two of them tell of all.
        tasks: of the meta-batch.
        available: bytes.
        chunk: one that a person has chosen; 0: none.
    """
    one = predict(1)
    each = predict(2) - one if tasks > 1 else one
    if not chunk:
        room = int((SHARE * available - one) // max(each, 1)) + 1
        chunk = max(1, min(tasks, room))
        chunk = -(-tasks // -(-tasks // chunk))  # as many chunks, of sizes that differ by little
    chunk = min(chunk, tasks)
    return MemoryPlan(tasks, chunk, one + (chunk - 1) * each, available)


def peak_of(function: Callable[[], object]) -> int:
    """Bytes of the tensors that ``function`` makes, at the moment when most of them are there; nothing is computed.

    ``function`` runs on tensors without values (FakeTensorMode) and must make its own inputs; they are counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Peak() as counted:
        function()
    return counted.peak


class _Peak(TorchDispatchMode):
    """Follows the storages that calls make until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, results)
        return results

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def available(device: torch.device) -> int:
    """Bytes that are free: of the device's memory, or of the machine's that a new process may have."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():  # a container's share
        free.append(max(0, int(limit) - int(used)))
    return min(free, default=1 << 62)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host's memory, or a device's, is full or may not be used any further.

    Python and numpy raise MemoryError; torch's allocator, threads that cannot start and libraries that cannot be loaded
    raise kinds that stand for other things too, and are known by their text.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return (isinstance(error, RuntimeError) and any(words in text for words in _FULL)) or (
        isinstance(error, ImportError) and "failed to map segment" in text
    )


_FULL = ("can't allocate memory", "std::bad_alloc", "can't start new thread")


def measured_peak(device: torch.device) -> int:
    """Bytes at the process's peak so far: of the device's allocator, or what the system counts as resident.

    The latter includes the interpreter, its libraries and the images.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
