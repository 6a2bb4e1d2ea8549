"""Several processes, the ranks, that train one learner: each computes some tasks of a meta-batch, all update alike.

Gradients, losses and statistics are summed over the ranks by one all-reduce a step, gloo on CPUs and NCCL on devices.
It adds in a fixed order, and every rank gets the same bits: weights stay equal without being sent. Another number of
ranks adds in another order: there float64 gradients agree to about 1e-13, not to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cxgrad_fast.algorithms import Phase
from cxgrad_fast.config import Config, InputError
from cxgrad_fast.engine.memory import is_out_of_memory
from cxgrad_fast.engine.meta_loss import MetaLoss
from cxgrad_fast.engine.notes import Notes
from cxgrad_fast.engine.static import Gradients, shape_of, tensors_of
from cxgrad_fast.episodes import Episodes

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # a rank that a step waits longer for counts as lost
_OPENING_TIMEOUT = timedelta(days=1)  # one rank reads the images for the first time, the others wait
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLostError(Exception):
    """A rank died, hangs, or cannot be reached; what was exchanged last has reached nobody for certain."""


class ToldElsewhereError(Exception):
    """Something is wrong that another rank tells about; this one has to stop."""


@dataclass
class _Words:
    """What this rank wants the others to know, and the largest that any rank told with the last sum."""

    own: int = 0
    heard: int | None = None


@dataclass(frozen=True)
class Ranks:
    """The processes that train one learner, seen from one of them. ``ALONE`` is a process by itself.

    Attributes:
        rank: of this process, in ``[0, size)``.
        size: how many there are.
        local_rank: of this process among those of its machine.
        local_size: how many there are on its machine.
        notes: what they leave for each other, whoever still lives. A process by itself has none.
        patient: a group that waits long.
        timeout: a rank that a step waits longer for counts as lost.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    notes: Notes = field(default=None, repr=False, compare=False)  # type: ignore[assignment]  # ALONE has no use for it
    patient: Any = field(default=None, repr=False, compare=False)
    timeout: timedelta = field(default=TIMEOUT, repr=False, compare=False)
    _words: _Words = field(default_factory=_Words, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def place(self, device: torch.device) -> torch.device:
        """This rank's device where the settings say ``device``: the CPU, or the CUDA device of its local rank.

        Raises:
            InputError: one CUDA device is named for several ranks, or there are fewer than ranks on this machine.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(
                f"setting 'run.device' (={device}) names one device for {self.size} ranks: "
                "use cuda, each rank takes its own"
            )
        devices = torch.cuda.device_count()
        if self.local_size > devices:
            raise InputError(
                f"{self.local_size} ranks on this machine need as many CUDA devices, torch sees {devices}: "
                f"use --nproc-per-node={devices}, or --run.device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def shard(self, tasks: int) -> slice:
        """This rank's part of so many tasks: contiguous, of sizes that differ by at most one; perhaps empty."""
        start, stop = (-(-rank * tasks // self.size) for rank in (self.rank, self.rank + 1))  # rank 0 has task 0
        return slice(start, stop)

    # sums

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all ranks, one all-reduce for all of one type. On CPUs words travel along.

        Raises:
            RankLostError: a rank did not take part.
        """
        if self.size == 1:
            return list(tensors)
        by_type: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(tensors):
            by_type.setdefault(tensor.dtype, []).append(index)
        results = list(tensors)
        for indices in by_type.values():
            parts = [tensors[index].reshape(-1) for index in indices]
            rides_along = not parts[0].is_cuda and indices[0] == 0
            if rides_along:
                words = parts[0].new_zeros(self.size)
                words[self.rank] = self._words.own
                parts.append(words)
            flat = torch.cat(parts)
            with self._reaching_all():
                dist.all_reduce(flat)
            sums = flat.split([part.numel() for part in parts])
            if rides_along:
                self._words.heard = int(sums[-1].max())
            for index, values in zip(indices, sums, strict=False):
                results[index] = values.view(tensors[index].shape)
        return results

    def rows(self, tensors: Sequence[Tensor], own: slice, count: int) -> list[Tensor]:
        """Tensors of ``count`` rows, ready for :meth:`total`: this rank's are ``own``, the others' zero."""
        whole = [tensor.new_zeros(count, *tensor.shape[1:]) for tensor in tensors]
        for target, tensor in zip(whole, tensors, strict=True):
            target[own] = tensor
        return whole

    # words: signals, which all ranks must act on at the same step

    def tell(self, word: int) -> None:
        """Let all ranks :meth:`heard` it, from the next sum on."""
        self._words.own = word

    def heard(self) -> int:
        """The largest word of any rank, 0 if there is none; the same on all ranks, which must all ask.

        Raises:
            RankLostError: a rank did not take part.
        """
        if self.size == 1:
            return self._words.own
        if self._words.heard is None:  # no sum on CPUs since the last question
            word = torch.tensor(self._words.own)
            with self._reaching_all():
                dist.all_reduce(word, dist.ReduceOp.MAX)
            return int(word)
        heard, self._words.heard = self._words.heard, None
        return heard

    # going on only together

    def together(self, action: Callable[[], T]) -> T:
        """``action()`` of this rank, once it succeeded on all.

        Raises:
            ToldElsewhereError: it failed on a lower rank, where the error is raised.
            InputError, OSError: it failed here; also what says that memory is full.
            RankLostError: a rank did not take part.
        """
        if self.size == 1:
            return action()
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            if not isinstance(error, InputError | OSError) and not is_out_of_memory(error):
                raise
            failure = error
        failed: list[bool] = [False] * self.size
        with self._reaching_all():
            dist.all_gather_object(failed, failure is not None, group=self.patient)
        if failure is not None and failed.index(True) == self.rank:
            raise failure
        if any(failed):
            raise ToldElsewhereError
        return result

    def in_turn(self, action: Callable[[], T]) -> T:
        """As :meth:`together`; the first rank of a machine goes first, the others find what it left in caches."""
        if self.size == 1:
            return action()
        firsts = self.together(lambda: action() if self.local_rank == 0 else None)
        return self.together(lambda: action() if firsts is None else firsts)

    def from_first(self, action: Callable[[], T]) -> T:
        """What ``action()`` gave on rank 0, on all ranks; it runs there alone. Raises as :meth:`together`."""
        if self.size == 1:
            return action()
        box = [self.together(lambda: action() if self.is_first else None)]
        with self._reaching_all():
            dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]  # type: ignore[return-value]  # rank 0's

    # the end

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not torch.cuda.is_initialized():  # NCCL would wait for the dead
            self._hang_up()

    def give_up(self) -> None:
        """Let the others find out, after one was found to be lost, that there is nothing to wait for."""
        self.notes.call()
        if not torch.cuda.is_initialized():
            self._hang_up()  # who waits for this rank, and not for the lost one, would wait on

    def _hang_up(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _reaching_all(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise  # it is the graph that cannot be recorded
            raise RankLostError(" ".join(str(error).split())) from error


ALONE = Ranks()


def is_launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def join_ranks(timeout: timedelta = TIMEOUT) -> Ranks:
    """The ranks that torchrun started, or another launcher that sets its variables; ALONE where there is one or none.

    Args:
        timeout: a rank that a step waits longer for counts as lost.

    Raises:
        RankLostError: a rank did not come.
    """
    if not is_launched():
        return ALONE
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    has_devices = dist.is_nccl_available() and torch.cuda.device_count() >= local_size
    backend = "cpu:gloo,cuda:nccl" if has_devices else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        notes = Notes(store, rank, size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=_OPENING_TIMEOUT)
        notes.meet()
    except RuntimeError as error:
        raise RankLostError(" ".join(str(error).split())) from error
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Ranks(rank, size, local_rank, local_size, notes, patient, timeout)


class SharedGradients:
    """Meta-loss and meta-gradients of a meta-batch that is spread over ranks; on ``ALONE`` it passes them through.

    Args:
        config: reads ``outer.meta_batch``, the tasks of all ranks together, and ``outer.reduction``.
        ranks: who takes part.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self._ranks = ranks
        self._tasks = config.outer.meta_batch
        self._own = ranks.shard(self._tasks)
        self._share = (self._own.stop - self._own.start) / self._tasks
        self._weight = self._share if config.outer.reduction == "mean" else 1.0
        self._reduction = config.outer.reduction
        self._likes: dict[object, MetaLoss] = {}

    def has_work(self, episodes: Episodes) -> bool:
        """Whether there is something to compute.

        Raises:
            ValueError: with several ranks, episodes that are not this rank's part of the meta-batch.
        """
        wanted = self._own.stop - self._own.start
        if self._ranks.size > 1 and len(episodes) != wanted:
            raise ValueError(
                f"episodes must be {self._ranks}'s part of the meta-batch (outer.meta_batch = {self._tasks}), "
                f"{wanted} tasks, got {len(episodes)}"
            )
        return self._ranks.size == 1 or wanted > 0

    def __call__(
        self, gradients: Gradients, parameters: Sequence[Tensor], episodes: Episodes, phase: Phase
    ) -> tuple[MetaLoss, Sequence[Tensor]]:
        """The whole meta-batch's meta-loss, all its tasks in order, and gradients: the same on every rank.

        Args:
            gradients: of this rank's tasks.
            parameters: the learner's.
            phase: what depends on the iteration.
            episodes: this rank's part, ``ranks.shard(meta_batch)``; where that is empty ``gradients`` is not called.

        Raises:
            RankLostError: a rank did not take part.
        """
        if self._ranks.size == 1:
            return gradients(parameters, episodes, phase)
        found: Sequence[Tensor]
        if self._share:
            out, found = gradients(parameters, episodes, phase)
            out = out.detach()
        if self._tasks < self._ranks.size:
            like = self._like(out if self._share else None, episodes)
        if not self._share:
            device = parameters[0].device
            out = like.with_tensors([tensor.to(device) for tensor in like.tensors()])
            found = [torch.zeros_like(tensor) for tensor in parameters]
        rows = self._ranks.rows(list(out.rows().values()), self._own, self._tasks)
        means = [value * self._share for value in out.means()]
        weighted = found if self._weight == 1 else torch._foreach_mul(list(found), self._weight)
        sums = self._ranks.total([*rows, *means, *weighted])
        whole = dict(zip(MetaLoss.ROWS, sums, strict=False))
        sums = sums[len(rows) :]
        joined = MetaLoss.reduced(self._reduction, whole, sums[: len(means)], out.statistics)
        return joined, sums[len(means) :]

    def _like(self, out: MetaLoss | None, episodes: Episodes) -> MetaLoss:
        """A meta-loss of no task, shaped as rank 0's: a rank without tasks learns from it what it adds zeros to."""
        shape = shape_of([tensor[:0] for tensor in tensors_of(episodes)])
        if shape not in self._likes:

            def empty() -> MetaLoss:
                assert out is not None  # rank 0 has the first task
                count = len(MetaLoss.ROWS)
                loss, *rest = out.tensors()
                parts = [loss, *(tensor[:0] for tensor in rest[:count]), *rest[count:]]
                return out.with_tensors([torch.zeros_like(tensor, device="cpu") for tensor in parts])

            self._likes[shape] = self._ranks.from_first(empty)
        return self._likes[shape]
