"""``--compile`` on CPUs: meta-loss and meta-gradients as a flat program, made once for a shape of episodes.

The program calls the operators that the uncompiled step calls, in the same order: the same numbers, to the bit. What
goes is Python, autograd's bookkeeping, and what no result needs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from cxgrad_fast.engine.flat import Flat
from cxgrad_fast.engine.meta_loss import MetaLoss
from cxgrad_fast.episodes import Episodes

Gradients = Callable[[Sequence[Tensor], Episodes], tuple[MetaLoss, Sequence[Tensor]]]
Shape = tuple[tuple[object, ...], ...]

_TRIALS = 3  # of each way, before the slower is left


def to_stderr(message: str) -> None:
    """Where the user reads it while a run's own output goes elsewhere."""
    print(f"cxgrad_fast: {message}", file=sys.stderr, flush=True)


@dataclass
class _Program:
    """A flat program and how its results make a MetaLoss; seconds of its runs and of uncompiled ones."""

    flat: Flat
    like: MetaLoss
    own: list[float]
    uncompiled: list[float]

    def __call__(self, parameters: Sequence[Tensor], episodes: Episodes) -> tuple[MetaLoss, Sequence[Tensor]]:
        results = self.flat(*parameters, *tensors_of(episodes))
        count = len(results) - len(parameters)
        return unpack(results[:count], self.like), results[count:]


class StaticGradients:
    """Meta-loss and meta-gradients, as ``uncompiled`` gives them.

    The first steps of a shape alternate between the program and the uncompiled way, which have the same results; if the
    program turns out to be no faster on this machine, it is dropped.

    Args:
        uncompiled: (parameters, episodes) -> meta-loss and the gradients in the parameters. Nothing of it may depend on
            values.
        report: told what is compiled, what it took, and what does not pay or cannot be compiled.
        clock: seconds.
    """

    def __init__(
        self,
        uncompiled: Gradients,
        report: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._uncompiled, self._report, self._clock = uncompiled, report, clock
        self._programs: dict[Shape, _Program | None] = {}

    def __call__(self, parameters: Sequence[Tensor], episodes: Episodes) -> tuple[MetaLoss, Sequence[Tensor]]:
        shape = shape_of(episodes)
        if shape not in self._programs:
            self._programs[shape] = self._compile(parameters, episodes)
        program = self._programs[shape]
        if program is None:
            return self._uncompiled(parameters, episodes)
        if len(program.uncompiled) >= _TRIALS:
            return program(parameters, episodes)
        return self._try(shape, program, parameters, episodes)

    def _try(
        self, shape: Shape, program: _Program, parameters: Sequence[Tensor], episodes: Episodes
    ) -> tuple[MetaLoss, Sequence[Tensor]]:
        own_turn = len(program.own) <= len(program.uncompiled)
        began = self._clock()
        result = (program if own_turn else self._uncompiled)(parameters, episodes)
        (program.own if own_turn else program.uncompiled).append(self._clock() - began)
        if len(program.uncompiled) == _TRIALS:
            gain = median(program.uncompiled) / median(program.own)
            if gain < 1:
                self._programs[shape] = None
                self._report(f"compiling does not pay here ({gain:.2f} of the uncompiled speed): going on without")
        return result

    def _compile(self, parameters: Sequence[Tensor], episodes: Episodes) -> _Program | None:
        again = " again, for another shape of episodes" if self._programs else ""
        likes: list[MetaLoss] = []

        def function(*tensors: Tensor) -> list[Tensor]:
            count = len(parameters)
            out, gradients = self._uncompiled(tensors[:count], Episodes(*tensors[count:]))
            likes.append(out)
            return [*pack(out), *gradients]

        began = self._clock()
        try:
            flat = Flat(function, [*parameters, *tensors_of(episodes)])
        except (RuntimeError, NotImplementedError) as error:
            self._report(f"the meta-step cannot be compiled, going on without: {' '.join(str(error).split())}")
            return None
        seconds = self._clock() - began
        self._report(f"meta-step compiled{again} in {seconds:.1f} s: {flat.calls} operator calls")
        return _Program(flat, likes[0], [], [])


def tensors_of(episodes: Episodes) -> list[Tensor]:
    return [episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y]


def shape_of(episodes: Episodes) -> Shape:
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors_of(episodes))


def pack(out: MetaLoss) -> list[Tensor]:
    fixed = [out.loss, out.query_logits, out.support_losses, out.query_losses, out.accuracy]
    return [*fixed, *(tensor for pair in out.statistics.values() for tensor in pair)]


def unpack(tensors: Sequence[Tensor], like: MetaLoss) -> MetaLoss:
    loss, logits, support_losses, query_losses, accuracy, *rest = tensors
    statistics = {name: (rest[2 * index], rest[2 * index + 1]) for index, name in enumerate(like.statistics)}
    return replace(
        like,
        loss=loss,
        query_logits=logits,
        support_losses=support_losses,
        query_losses=query_losses,
        accuracy=accuracy,
        statistics=statistics,
    )
