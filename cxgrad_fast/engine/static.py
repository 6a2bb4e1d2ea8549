"""``--compile``: functions of tensors as programs made once for a shape: flat ones on CPUs, CUDA graphs on devices.

A program calls the operators that the function calls: the same numbers, to the bit. What goes is Python, autograd's
bookkeeping, and what no result needs; on CPUs additions of gradients are joined (simplify.py).
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch.distributed as dist
from torch import Tensor

from cxgrad_fast.algorithms import Phase
from cxgrad_fast.engine.flat import Flat
from cxgrad_fast.engine.meta_loss import MetaLoss
from cxgrad_fast.episodes import Episodes

Function = Callable[..., Sequence[Tensor]]
Gradients = Callable[[Sequence[Tensor], Episodes, Phase], tuple[MetaLoss, Sequence[Tensor]]]
Shape = tuple[tuple[object, ...], ...]

_TRIALS = 5  # of each way, before the slower is left


def to_stderr(message: str) -> None:
    """Where the user reads it while a run's own output goes elsewhere."""
    if dist.is_initialized() and dist.get_rank():  # rank 0 says the same
        return
    print(f"cxgrad_fast: {message}", file=sys.stderr, flush=True)


@dataclass
class _Program:
    """A program, and seconds of its runs and of uncompiled ones."""

    run: Function
    own: list[float]
    uncompiled: list[float]


class Static:
    """``function(*inputs)``, compiled for every shape of inputs.

    The first calls of a shape alternate between the program and the function, which have the same results; if the
    program turns out to be no faster on this machine, it is dropped.

    Args:
        what: the function's name, for messages.
        function: of tensors. Nothing of it may depend on values.
        compiler: (function, inputs) -> program; what it cannot do is a RuntimeError or NotImplementedError.
        report: told what is compiled, what it took, and what does not pay or cannot be compiled.
        clock: seconds.
        trials: of each way; 0 takes the program unseen.
        patience: calls with a shape before it is compiled for: what comes seldom is not worth it.
    """

    def __init__(
        self,
        what: str,
        function: Function,
        compiler: Callable[[Function, Sequence[Tensor]], Function] = Flat,
        report: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.perf_counter,
        trials: int | None = None,
        patience: int = 0,
    ) -> None:
        self._what, self._function, self._compiler = what, function, compiler
        self._report, self._clock = report, clock
        self._trials = _TRIALS if trials is None else trials
        self._patience = patience
        self._waiting: Counter[Shape] = Counter()
        self._programs: dict[Shape, _Program | None] = {}

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        shape = shape_of(inputs)
        if shape not in self._programs:
            if self._waiting[shape] < self._patience:
                self._waiting[shape] += 1
                return self._function(*inputs)
            self._programs[shape] = self._compile(inputs)
        program = self._programs[shape]
        if program is None:
            return self._function(*inputs)
        if len(program.uncompiled) >= self._trials:
            return program.run(*inputs)
        return self._try(shape, program, inputs)

    def _try(self, shape: Shape, program: _Program, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        own_turn = len(program.own) <= len(program.uncompiled)
        began = self._clock()
        results = (program.run if own_turn else self._function)(*inputs)
        (program.own if own_turn else program.uncompiled).append(self._clock() - began)
        if len(program.uncompiled) == self._trials:
            gain = min(program.uncompiled) / min(program.own)  # what else runs on the machine only adds
            if gain < 1:
                self._programs[shape] = None
                speed = f"{gain:.2f} of the uncompiled speed"
                self._report(f"compiling the {self._what} does not pay here ({speed}): going on without")
        return results

    def _compile(self, inputs: Sequence[Tensor]) -> _Program | None:
        again = " again, for another shape of episodes" if self._programs else ""
        began = self._clock()
        try:
            run = self._compiler(self._function, inputs)
        except (RuntimeError, NotImplementedError) as error:
            self._report(f"the {self._what} cannot be compiled, going on without: {' '.join(str(error).split())}")
            return None
        seconds = self._clock() - began
        calls = f": {run.calls} operator calls" if isinstance(run, Flat) else ""
        self._report(f"{self._what} compiled{again} in {seconds:.1f} s{calls}")
        return _Program(run, [], [])


class StaticGradients:
    """Meta-loss and meta-gradients, as ``uncompiled`` gives them, compiled for every phase and shape of episodes.

    Args:
        uncompiled: (parameters, episodes, phase) -> meta-loss and the gradients in the parameters. Nothing of it may
            depend on values.
        report, clock, compiler, trials: as for :class:`Static`.
    """

    def __init__(
        self,
        uncompiled: Gradients,
        report: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.perf_counter,
        compiler: Callable[[Function, Sequence[Tensor]], Function] = Flat,
        trials: int | None = None,
    ) -> None:
        self._uncompiled = uncompiled
        self._like: MetaLoss | None = None  # a result: how many statistics of which layers
        self._parameters = 0
        self._options = (compiler, report, clock, trials)
        self.statics: dict[object, Static] = {}

    def __call__(
        self, parameters: Sequence[Tensor], episodes: Episodes, phase: Phase
    ) -> tuple[MetaLoss, Sequence[Tensor]]:
        self._parameters = len(parameters)
        if phase.kind not in self.statics:
            self.statics[phase.kind] = Static("meta-step", partial(self._function, phase), *self._options)
        results = self.statics[phase.kind](*parameters, *tensors_of(episodes, phase))
        assert self._like is not None  # the function has run at least once, to be traced
        count = len(results) - len(parameters)
        return self._like.with_tensors(results[:count]), results[count:]

    def _function(self, phase: Phase, *tensors: Tensor) -> list[Tensor]:
        episodes, phase = episodes_of(tensors[self._parameters :], phase)
        out, gradients = self._uncompiled(tensors[: self._parameters], episodes, phase)
        self._like = out
        return [*out.tensors(), *gradients]


def tensors_of(episodes: Episodes, phase: Phase | None = None) -> list[Tensor]:
    """Those of the episodes, and the weights of a phase that has some."""
    return [*episodes.tensors().values(), *([] if phase is None or phase.weights is None else [phase.weights])]


def episodes_of(tensors: Sequence[Tensor], phase: Phase) -> tuple[Episodes, Phase]:
    """The episodes and the phase of such tensors; ``phase`` is one that has weights where theirs has."""
    if phase.weights is not None:
        *tensors, weights = tensors
        phase = replace(phase, weights=weights)
    return Episodes(*tensors[:4], batches=tensors[4] if len(tensors) > 4 else None), phase


def shape_of(tensors: Sequence[Tensor]) -> Shape:
    """All that a program is made for."""
    return tuple((tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors)
