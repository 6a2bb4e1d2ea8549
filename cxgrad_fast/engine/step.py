"""The meta-step as one captured function: meta-loss, its gradients, the optimizer's update, running statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor

from cxgrad_fast.algorithms import Phase
from cxgrad_fast.engine.captured import Captured, CaptureError, Graphs, Packed
from cxgrad_fast.engine.distributed import RankLostError
from cxgrad_fast.engine.meta_loss import MetaLoss
from cxgrad_fast.engine.static import Gradients, episodes_of, shape_of, tensors_of, to_stderr
from cxgrad_fast.episodes import Episodes
from cxgrad_fast.models import LayerStatistics

STATISTICS_MOMENTUM = 0.01  # of the running BatchNorm statistics: about the last hundred meta-steps

_PAUSES = (5e-5, 1e-3)  # seconds between two looks at the device: the first, which is doubled up to the last


class NonFiniteError(ArithmeticError):
    """Numbers that nothing more can be computed from: infinite, or not a number."""


class NonFiniteLossError(NonFiniteError):
    """A meta-step met a loss or gradient that is not finite; nothing was changed."""

    def __init__(self, loss_is_finite: bool, gradients_are: bool = False) -> None:
        what = f"the {'gradient' if loss_is_finite else 'loss'} of this meta-step is not finite"
        super().__init__("this meta-step was left out: one before it was not finite" if gradients_are else what)


def is_finite(out: MetaLoss, gradients: Sequence[Tensor]) -> Tensor:
    """``[]`` bool on the device: whether the loss, all gradients and all carried values are."""
    norms = torch._foreach_norm([*gradients, *out.carried.values()])
    return torch.stack([out.loss.detach(), *norms]).isfinite().all()


def check_finite(parameters: Mapping[str, Tensor], what: str) -> None:
    """That all values of the parameters are finite.

    Raises:
        NonFiniteError: one is not; the message names it, and ``what`` it is a parameter of.
    """
    largest = torch._foreach_norm([tensor.detach() for tensor in parameters.values()], float("inf"))
    finite = torch.stack(largest).isfinite()
    if not finite.all():
        name = list(parameters)[finite.tolist().index(False)]
        raise NonFiniteError(f"parameter '{name}' of {what} is not finite: the model has diverged")


@torch.no_grad()
def take_over(carried: Mapping[str, Tensor], parameters: Mapping[str, Tensor], unless: Tensor | None = None) -> None:
    """Put the carried values of a step into the parameters of their names; nothing where ``unless`` is not zero."""
    for name, new in carried.items():
        old = parameters[name]
        old.copy_(new if unless is None else torch.where(unless > 0, old, new))


class RunningStatistics:
    """Averages of the BatchNorm statistics of meta-steps.

    Args:
        device: of the learner.
        share_of: the algorithm's :meth:`~cxgrad_fast.algorithms.Algorithm.running_share`; where it gives none, all
            meta-steps count alike first, and then exponentially less.

    Attributes:
        values: mean and variance ``[C]`` by convolution.
        steps: how many meta-steps they hold, ``[]`` float64 on the device.
    """

    def __init__(self, device: torch.device, share_of: Callable[[str], float | None] = lambda layer: None) -> None:
        self._share_of = share_of
        self.values: dict[str, LayerStatistics] = {}
        self.steps = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, statistics: Mapping[str, LayerStatistics], unless: Tensor | None = None) -> None:
        """Those of one more step, in place; nothing where ``unless`` is not zero."""
        counted = self.steps + 1
        share = (1 / counted).clamp_min(STATISTICS_MOMENTUM)
        self.steps.copy_(counted if unless is None else torch.where(unless > 0, self.steps, counted))
        for name, new in statistics.items():
            if name not in self.values:
                self.values[name] = (torch.zeros_like(new[0]), torch.zeros_like(new[1]))
            fixed = self._share_of(name)
            for old, now, start in zip(self.values[name], new, (0.0, 1.0), strict=True):
                if fixed is None:
                    average = old.lerp(now, share.to(old.dtype))
                else:
                    average = torch.where(counted == 1, start, old).lerp(now, fixed)
                old.copy_(average if unless is None else torch.where(unless > 0, old, average))


class Pending:
    """A meta-step that was started.

    Args:
        out: its meta-loss.
        update: what it does to the learner; called once, when the result is asked for.
    """

    def __init__(self, out: MetaLoss, update: Callable[[], None]) -> None:
        self._out = out
        self._update: Callable[[], None] | None = update

    def wait(self) -> None:
        """Return once all is computed. Raises as :meth:`result`."""

    def result(self) -> MetaLoss:
        """Its meta-loss, once it is done and the learner has its update.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite. The step changed nothing, nor did any that was
                started after it.
            RankLostError: it waits for another rank for too long. Neither it nor any that was started after it will
                change anything.
        """
        if self._update is not None:
            self._update()
            self._update = None
        return self._out

    def on_host(self) -> MetaLoss:
        """As :meth:`result`, in the host's memory."""
        out = self.result()
        return out.with_tensors([tensor.cpu() for tensor in out.tensors()])


class CapturedStep:
    """Meta-steps as replays of one captured function for each shape of episodes.

    Args:
        parameters: the leaves that the optimizer updates, or the steps' carried values replace, by name, in the order
            of ``gradients``' results.
        optimizer: over them, fused, which leaves out a step that is not finite by itself.
        gradients: (parameters, episodes, phase) -> meta-loss and gradients. Nothing of it may depend on values.
        statistics: what the steps' BatchNorm statistics go to.
        graphs: what records.
        report: told what is captured, and what cannot be.
        patience: how long the host waits for a step that is under way; None: until it is done. A graph with an
            all-reduce in it never ends where another rank is lost, and nothing but the host's clock tells.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        gradients: Gradients,
        statistics: RunningStatistics,
        graphs: Graphs,
        report: Callable[[str], None] = to_stderr,
        patience: timedelta | None = None,
    ) -> None:
        self._named, self._parameters = dict(parameters), list(parameters.values())
        self._optimizer, self._gradients = optimizer, gradients
        self._statistics, self._graphs, self._report = statistics, graphs, report
        device = self._parameters[0].device
        self._bad = torch.zeros((), device=device)  # once it is 1, steps change nothing until the host has seen it
        self._waiting = _Waiting(patience, self._bad)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._rates_held: list[float] = []
        self._programs: dict[object, tuple[Captured, MetaLoss, Packed] | None] = {}

    def start(self, episodes: Episodes, phase: Phase) -> Pending | None:
        """Start a step; None where it cannot be captured, which was reported."""
        inputs = tensors_of(episodes, phase)
        shape = (phase.kind, shape_of(inputs))
        if shape not in self._programs:
            self._programs[shape] = self._compile(inputs, phase)
        program = self._programs[shape]
        if program is None:
            return None
        captured, like, packed = program
        self._set_rates()
        (values,) = captured(*inputs)
        return _PendingReplay(values.clone(), like, packed, self._bad, self._waiting)

    def _set_rates(self) -> None:
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        if rates != self._rates_held:
            for buffer, rate in zip(self._rates, rates, strict=True):
                buffer.fill_(rate)
            self._rates_held = rates

    def _compile(self, inputs: Sequence[Tensor], phase: Phase) -> tuple[Captured, MetaLoss, Packed] | None:
        again = " again, for another shape of episodes" if self._programs else ""
        likes: list[MetaLoss] = []

        def step(*tensors: Tensor) -> list[Tensor]:
            # of aliases: a graph over the parameters that a caller keeps holds their accumulators, nodes of the stream
            # that it was made on, and a capture that meets another stream fails
            leaves = [parameter.detach().requires_grad_() for parameter in self._parameters]
            out, gradients = self._gradients(leaves, *episodes_of(tensors, phase))
            finite = is_finite(out, gradients)
            self._bad.copy_(torch.where(finite, self._bad, 1.0))
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            with self._told_by_the_device():
                self._optimizer.step()
            self._optimizer.zero_grad()
            take_over(out.carried, self._named, unless=self._bad)
            self._statistics.add(out.statistics, unless=self._bad)
            likes[:] = [out]
            return [Packed.pack([*out.tensors(), finite, self._bad])]

        began = time.perf_counter()
        self._set_rates()
        try:
            captured = Captured(step, inputs, self._graphs, self._state)
        except CaptureError as error:
            self._report(f"the meta-step cannot be captured, going on without: {error}")
            return None
        self._report(f"meta-step captured{again} in {time.perf_counter() - began:.1f} s: one graph")
        out = likes[0]
        return captured, out, Packed([*out.tensors(), self._bad, self._bad])

    @contextmanager
    def _told_by_the_device(self) -> Iterator[None]:
        """The optimizer takes its learning rates, and whether to leave the step out, from tensors."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self._optimizer.found_inf = self._bad  # type: ignore[attr-defined]
        for group, buffer in zip(groups, self._rates, strict=True):
            group["lr"] = buffer
        try:
            yield
        finally:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _state(self) -> dict[str, Tensor]:
        named = {f"parameter {index}": tensor for index, tensor in enumerate(self._parameters)}
        named |= {"bad": self._bad, "steps": self._statistics.steps}
        for name, pair in self._statistics.values.items():
            named |= {f"mean {name}": pair[0], f"variance {name}": pair[1]}
        for index, parameter in enumerate(self._parameters):
            for name, value in self._optimizer.state.get(parameter, {}).items():
                named[f"optimizer {index} {name}"] = value
        return named


class _Waiting:
    """Waits for events of a device, each so long at the most.

    Args:
        patience: None: as long as it takes.
        bad: what keeps the steps that are under way from changing anything.
    """

    def __init__(self, patience: timedelta | None, bad: Tensor) -> None:
        self._patience, self._bad = patience, bad
        self._lost = False

    def __call__(self, event: torch.cuda.Event) -> None:
        """Wait for one.

        Raises:
            RankLostError: it does not come; from then on for all events, at once.
        """
        if self._patience is None:
            event.synchronize()
            return
        deadline, (pause, longest) = time.monotonic() + self._patience.total_seconds(), _PAUSES
        while self._lost or not event.query():
            if self._lost or time.monotonic() > deadline:
                self._go_around()
                raise RankLostError(f"a captured meta-step did not end in {self._patience.total_seconds():g} s")
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _go_around(self) -> None:
        """Leave the stream that waits for the lost rank: the weights of the last whole step can be read on another.

        Should the rank come after all, the steps that go on change nothing.
        """
        if self._lost:
            return
        self._lost = True
        with torch.cuda.device(self._bad.device):
            torch.cuda.set_stream(torch.cuda.Stream())
        self._bad.fill_(1)


class _PendingReplay(Pending):
    """A replay's values, on the device and on their way to the host."""

    def __init__(self, values: Tensor, like: MetaLoss, packed: Packed, bad: Tensor, waiting: _Waiting) -> None:
        self._values, self._like, self._packed, self._bad, self._waiting = values, like, packed, bad, waiting
        self._event = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = values

    def result(self) -> MetaLoss:
        self.wait()
        return self._made_of(self._values)

    def on_host(self) -> MetaLoss:
        self.wait()
        return self._made_of(self._host)

    def wait(self) -> None:
        if self._event is not None:
            self._waiting(self._event)
        if self._host[-1]:
            self._bad.zero_()
            raise NonFiniteLossError(bool(self._host[0].isfinite()), bool(self._host[-2]))

    def _made_of(self, values: Tensor) -> MetaLoss:
        return self._like.with_tensors(self._packed.unpack(values)[:-2])
