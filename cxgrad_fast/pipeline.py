"""Meta-steps one after the other; where a device runs them by itself, the next is under way before one is told of."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from cxgrad_fast.engine import Pending
from cxgrad_fast.episodes import EpisodeSampler, Upcoming
from cxgrad_fast.learner import Learner


@dataclass(frozen=True)
class StepNumbers:
    """What a meta-step is remembered by.

    Attributes:
        loss, accuracy: of the query sets.
        support_losses: of the first and the last pass over the support sets; empty without an inner loop.
        seconds: since it was started, or since the step before it was done.
    """

    loss: float
    accuracy: float
    support_losses: tuple[float, ...]
    seconds: float


class Steps:
    """The meta-steps of a run, in order.

    Args:
        learner: does them; its ``steps_ahead`` are under way at once.
        sampler: of the training tasks, on the learner's device.
        meta_batch: tasks of a step.
        own: those of them that this process does.
        first: how many steps were done before.
    """

    def __init__(self, learner: Learner, sampler: EpisodeSampler, meta_batch: int, own: slice, first: int) -> None:
        self._learner, self._meta_batch, self._own = learner, meta_batch, own
        self._upcoming = Upcoming(sampler)
        self._started = first
        self._pending: deque[tuple[float, Pending]] = deque()
        self._done_at = 0.0

    def advance(self, until: int) -> None:
        """Do the next step, all but what :meth:`finish` does; start those after it that may be under way with it.

        None beyond the step ``until`` is started: there somebody wants the weights.

        Raises:
            NonFiniteLossError, RankLostError: as :meth:`Learner.meta_step`; the step was not done.
        """
        while len(self._pending) < self._learner.steps_ahead and self._started < until:
            self._start(self._started + 1 < until)
        self.is_next_done()

    def is_next_done(self) -> bool:
        """Wait for the next of the steps under way; False where there is none."""
        if self._pending:
            self._pending[0][1].wait()
        return bool(self._pending)

    def finish(self) -> StepNumbers:
        """Take the next step's update over into the learner, which takes no time, and tell of the step."""
        began, pending = self._pending.popleft()
        out = pending.on_host()
        support = out.support_losses.mean(0)
        passes = [support[0], support[-1]] if len(support) else []
        loss, accuracy, *losses = torch.stack([value.double() for value in (out.loss, out.accuracy, *passes)]).tolist()
        seconds = time.perf_counter() - max(began, self._done_at)
        self._done_at = time.perf_counter()
        return StepNumbers(loss, accuracy, tuple(losses), seconds)

    def _start(self, has_next: bool) -> None:
        began, count = time.perf_counter(), self._own.stop - self._own.start
        first = self._started * self._meta_batch + self._own.start
        pending = self._learner.start_step(self._upcoming.take(first, count), self._started)
        self._pending.append((began, pending))
        self._started += 1
        if has_next and self._learner.steps_ahead > 1:  # while the device works
            self._upcoming.prepare(first + self._meta_batch, count)
