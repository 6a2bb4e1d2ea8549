"""``--compile`` on CUDA devices: functions of tensors as CUDA graphs, the whole meta-step with its update among them.

A graph replays launches with the addresses that they were recorded with. So everything it touches stays where it is:
episodes are copied into fixed buffers, parameters and Adam's state are changed in place, the learning rate and all that
changes from step to step are one-element tensors that the host fills. Nothing in it may wait for the device or decide
by a value: a step that is not finite is found and left out by the device itself (Adam's ``found_inf``).
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Function = Callable[[], Sequence[Tensor]]

_PACKAGE = Path(__file__).parents[1]
_aten = torch.ops.aten
# their results' sizes or values are the host's to know
_WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "item"})
_INDEXING = frozenset({"index", "index_put", "index_put_"})


class Graphs(Protocol):
    """What records functions: :class:`CudaGraphs`, or a stand-in where there is no device."""

    def warm_up(self, function: Function) -> None:
        """Run ``function`` as often as it takes until nothing in it is for the first time."""

    def record(self, function: Function) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """(what replays it, its results, which each replay overwrites)."""


class CudaGraphs:
    """Records functions on one device. All its graphs share their memory: they run one after the other."""

    WARM_UPS = 3  # kernels are compiled, ways of convolving measured, Adam's state is made

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def warm_up(self, function: Function) -> None:
        """As the rules of capture ask: on another stream."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(self.WARM_UPS):
                        function()
            finally:
                torch.cuda.current_stream().wait_stream(stream)  # what comes next reads what this wrote

    def record(self, function: Function) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """One graph of all launches of ``function``.

        Where it fails, stream and allocator are left as they were found, so far as torch lets them: its allocator of
        pinned memory stays in the capture.
        """
        gc.collect()  # autograd's graphs in garbage hold nodes of the stream that they were made on
        with torch.cuda.device(self._device):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=self._pool):
                    results = function()
            except BaseException:
                # torch.cuda.graph raises where it ends a capture that is broken already, and leaves both behind
                torch.cuda.set_stream(stream)
                _leave_pool(self._pool)
                self._pool = None  # the allocator opens no pool again that nothing uses
                raise
        return graph.replay, results


def _leave_pool(pool: Any) -> None:
    """Make the current device's allocator leave the pool of a broken capture, if it is still in it."""
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # the capture ended, and then something else failed
        return
    torch._C._cuda_releasePool(device, pool)


class Captured:
    """``function(*inputs)``, recorded once for these shapes and types; results are overwritten by the next call.

    Args:
        function: of the fixed copies of ``inputs``; everything else that it reads or writes must stay where it is.
        inputs: a first set.
        graphs: what records.
        state: tensors that ``function`` writes, by name: when this is made they are as before, new ones zero.

    Raises:
        CaptureError: what cannot be recorded, in words.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        graphs: Graphs,
        state: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> None:
        self._inputs = [tensor.detach().clone() for tensor in inputs]

        def call() -> Sequence[Tensor]:
            return function(*self._inputs)

        before = {name: tensor.detach().clone() for name, tensor in state().items()}
        try:
            graphs.warm_up(call)
            self._replay, self._results = graphs.record(call)
        except RuntimeError as error:
            raise CaptureError(_explain(error, call)) from error
        finally:
            _restore(state(), before)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Copy the inputs in, replay."""
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._replay()
        return self._results


class CaptureError(RuntimeError):
    """A function cannot be recorded; the message says what in it stands in the way."""


@torch.no_grad()
def _restore(state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if name in before:
            tensor.copy_(before[name])
        else:
            tensor.zero_()


class Waits(TorchDispatchMode):
    """Lists the calls in this block that wait for the device, or copy between it and pageable memory of the host.

    Attributes:
        found: one line a call: what, and the place in this package.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if name in _WAITING or (name in _INDEXING and _by_mask(args[1])):
            self._note(f"{name} reads a value")
        elif name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], result)
            places = {source.device.type, target.device.type}
            pinned = any(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in (source, target))
            if len(places) > 1 and "cpu" in places and not pinned:
                self._note(f"{name} copies from {source.device.type} to {target.device.type}")
        return result

    def _note(self, what: str) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path != Path(__file__) and _PACKAGE in path.parents:
                what += f" ({path.relative_to(_PACKAGE.parent)}:{frame.lineno}, in {frame.name})"
                break
        if what not in self.found:
            self.found.append(what)


def _by_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _explain(error: RuntimeError, call: Function) -> str:
    """The error in one line, and what in the function waits for the device, which capture forbids."""
    text = " ".join(str(error).split())
    try:
        with Waits() as waits:
            call()
    except RuntimeError:
        return text
    return f"{text}; {'; '.join(waits.found)}" if waits.found else text


class Packed:
    """Floating-point tensors of fixed shapes and types as parts of one: one copy moves all."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._kinds = [(tensor.shape, tensor.dtype) for tensor in like]
        self._sizes = [tensor.numel() for tensor in like]

    @staticmethod
    def pack(tensors: Sequence[Tensor]) -> Tensor:
        """All values, ``[n]``, in the widest of the types."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def unpack(self, values: Tensor) -> list[Tensor]:
        """The tensors again, as views where that is their type."""
        parts = zip(values.split(self._sizes), self._kinds, strict=True)
        return [part.view(shape).to(dtype) for part, (shape, dtype) in parts]
