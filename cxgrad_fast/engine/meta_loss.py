"""The meta-loss of a batch of tasks as one tensor program with a leading task axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cxgrad_fast.algorithms import Algorithm, Images, Phase, State, Support
from cxgrad_fast.config import Config
from cxgrad_fast.engine.recompute import recomputed
from cxgrad_fast.episodes import Episodes
from cxgrad_fast.models import OWN, LayerStatistics

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MetaLoss:
    """What a batch of ``T`` tasks gave.

    Attributes:
        loss: scalar, ``objectives`` reduced over tasks (mean, or the paper's sum), differentiable in the
            meta-parameters.
        query_logits: ``[T, N*Q, N]``, the scores of the last query pass.
        support_losses: ``[T, passes]``, mean cross-entropy of every pass over the support set, in order; the passes
            that only move the context parameters are among them.
        query_losses: ``[T]``, of the last query pass.
        asked_losses: ``[T, passes]``, of every query pass, in order; there is one but in MAML++'s first iterations.
        objectives: ``[T]``, what each task adds to the loss; for most algorithms its query loss.
        accuracy: scalar, share of query images classified correctly.
        statistics: mean and variance ``[C]`` of each BatchNorm's input in the query pass, averaged over tasks, by
            convolution; empty for other norms. What running statistics are made of.
        carried: new values of parameters that are not trained, by name: what the last task leaves for the next.
    """

    loss: Tensor
    query_logits: Tensor
    support_losses: Tensor
    query_losses: Tensor
    asked_losses: Tensor
    objectives: Tensor
    accuracy: Tensor
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    carried: Tensors = field(default_factory=dict)

    # the fields of one row a task, and the means over tasks (the statistics are such means too)
    ROWS: ClassVar = ("query_logits", "support_losses", "query_losses", "asked_losses", "objectives")
    MEANS: ClassVar = ("accuracy",)

    @staticmethod
    def reduced(reduction: str, rows: Mapping[str, Tensor], means: Sequence[Tensor], layers: Iterable[str]) -> MetaLoss:
        """The meta-loss of rows by field and means in the order of :meth:`means`.

        Args:
            reduction: ``mean`` or ``sum`` over the tasks.
            rows: by field, see :attr:`ROWS`.
            means: accuracy, and the mean and variance of each of ``layers``.
            layers: names of the convolutions whose statistics there are.
        """
        objectives = rows["objectives"]
        loss = objectives.mean() if reduction == "mean" else objectives.sum()
        accuracy, *rest = means
        return MetaLoss(loss=loss, accuracy=accuracy, statistics=_paired(rest, layers), carried={}, **rows)

    def rows(self) -> dict[str, Tensor]:
        """The tensors of one row a task, by field."""
        return {name: getattr(self, name) for name in self.ROWS}

    def means(self) -> list[Tensor]:
        """The tensors that are means over the tasks."""
        return [self.accuracy, *(tensor for pair in self.statistics.values() for tensor in pair)]

    def tensors(self) -> list[Tensor]:
        """All tensors in a fixed order, the loss first."""
        return [self.loss, *self.rows().values(), *self.means(), *self.carried.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> MetaLoss:
        """The same structure with other tensors, in the order of :meth:`tensors`."""
        loss, *rest = tensors
        count, end = len(self.ROWS), len(rest) - len(self.carried)
        accuracy, *statistics = rest[count:end]
        rows = dict(zip(self.ROWS, rest[:count], strict=True))
        carried = dict(zip(self.carried, rest[end:], strict=True))
        return MetaLoss(
            loss=loss, accuracy=accuracy, statistics=_paired(statistics, self.statistics), carried=carried, **rows
        )

    def detach(self) -> MetaLoss:
        """The same numbers without their graph."""
        return self.with_tensors([tensor.detach() for tensor in self.tensors()])


def _paired(tensors: Sequence[Tensor], layers: Iterable[str]) -> dict[str, LayerStatistics]:
    """Means and variances in turn -> the statistics of layers."""
    return dict(zip(layers, zip(tensors[::2], tensors[1::2], strict=True), strict=True))


@dataclass(frozen=True)
class Adaptation:
    """Networks that were adapted to the support sets of ``T`` tasks, ready for query images.

    Attributes:
        state: after the last inner step; where the algorithm is joint, before the first.
        shared: the parameters that are not adapted, as :class:`cxgrad_fast.algorithms.Algorithm` takes them.
        support: the support sets.
        given: mean and variance ``[T or 1, C]`` that normalise the query pass, by convolution; None: its own images'.
    """

    state: State
    shared: Tensors
    support: Support
    given: Mapping[str, LayerStatistics] | None


class Engine:
    """Runs an algorithm for all tasks of a meta-batch.

    Parameters come and go as ``{name: Tensor}``; the engine itself holds none.

    Attributes:
        tasks_per_chunk: of a meta-batch that go through at once; 0: all. Of the config, or what fits
            (:meth:`cxgrad_fast.Learner.plan_memory`); 1 where a task needs what the one before it left.
    """

    def __init__(self, config: Config, algorithm: Algorithm) -> None:
        self.config, self.algorithm = config, algorithm
        self.tasks_per_chunk = 1 if algorithm.sequential else config.run.tasks_per_chunk

    def meta_loss(self, parameters: Mapping[str, Tensor], episodes: Episodes, phase: Phase | None = None) -> MetaLoss:
        """The meta-loss, differentiable in the parameters (Eq. 3).

        ``phase`` is what depends on the iteration; None: after all phases.

        With ``tasks_per_chunk`` the tasks go through in chunks whose gradients are taken at once, so that only one
        chunk's graph exists at a time; the other results then carry no graph.
        """
        phase = phase or self.algorithm.phase(None)
        tasks, chunk = len(episodes), self.tasks_per_chunk or len(episodes)
        if tasks <= chunk:
            return self._meta_loss(parameters, episodes, phase)
        leaves = [tensor for tensor in parameters.values() if tensor.requires_grad]
        parts: list[MetaLoss] = []
        total: list[Tensor] = []
        given = dict(parameters)
        for start in range(0, tasks, chunk):
            part = self._meta_loss(given, episodes[start : start + chunk], phase)
            if torch.is_grad_enabled():
                size = len(part.query_losses)
                share = part.loss * (size / tasks) if self.config.outer.reduction == "mean" else part.loss
                found = torch.autograd.grad(share, leaves, allow_unused=True, materialize_grads=True)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
            parts.append(part.detach())
            given |= parts[-1].carried
        joined = _joined(parts, self.config.outer.reduction)
        if not total:
            return joined
        return replace(joined, loss=_WithGradients.apply(joined.loss, total, *leaves))

    def adapted(
        self,
        parameters: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        statistics: str,
        running: Mapping[str, LayerStatistics],
        batches: Tensor | None = None,
    ) -> Adaptation:
        """Networks adapted to ``support_x`` [T, S, C, H, W] and ``support_y`` [T, S] for use, without a graph.

        Args:
            statistics: what normalises the query pass: ``transductive`` the query images themselves, ``support`` the
                support set under the adapted weights, ``running`` the averages ``running``.
            running: means and variances ``[C]`` by convolution.
            batches: places ``[T, steps, images of a step]`` in the support set, where the algorithm draws minibatches.
        """
        fast, shared = self._split({name: tensor.detach() for name, tensor in parameters.items()}, len(support_x))
        support = self._support(support_x, support_y, self.config.task.ways, batches=batches)
        if self.algorithm.joint:  # waits for the query images
            return Adaptation(State(fast), shared, support, None)
        state = self._adapted_state(fast, shared, support)
        given: Mapping[str, LayerStatistics] | None = None
        if statistics == "running":
            given = {name: (mean[None], variance[None]) for name, (mean, variance) in running.items()}
        elif statistics == "support":
            with torch.no_grad():
                steps = self.config.inner_steps(training=False)
                given = self.algorithm.support_statistics(state, steps, shared, support)
        return Adaptation(state, shared, support, given)

    def answer(self, adaptation: Adaptation, x: Tensor) -> Tensor:
        """Scores ``[T, Q, N]`` of query images ``x`` [T, Q, C, H, W], without a graph."""
        given, shared, support, state = adaptation.given, adaptation.shared, adaptation.support, adaptation.state
        query = self.algorithm.images(x) if given is None else Images(x, {})
        if self.algorithm.joint:
            support = replace(support, query=query)
            state = self._adapted_state(state.fast, shared, support)
        with torch.no_grad():
            steps = self.config.inner_steps(training=False)
            return self.algorithm.predict(state, steps, shared, support, query, given=given).scores

    def _adapted_state(self, fast: Tensors, shared: Tensors, support: Support) -> State:
        with torch.enable_grad():
            steps = self.config.inner_steps(training=False)
            state, _ = self._adapt(fast, shared, support, steps, graph=False)
        return state.with_tensors([tensor.detach() for tensor in state.tensors()])

    def _meta_loss(self, parameters: Mapping[str, Tensor], episodes: Episodes, phase: Phase) -> MetaLoss:
        graph = phase.order == 2 and torch.is_grad_enabled()
        asked: list[Tensor] = []
        query = self.algorithm.images(episodes.query_x)
        ways, steps = self.config.task.of_training().ways, self.config.inner_steps(training=True)
        support = self._support(episodes.support_x, episodes.support_y, ways, query, episodes.batches)
        fast, shared = self._split(parameters, len(episodes))
        with torch.enable_grad():  # the inner loop needs gradients whatever the caller does

            def after(done: int, state: State) -> None:
                if done in phase.asked_after:
                    scores = self.algorithm.predict(state, done, shared, support, query).scores
                    asked.append(self.algorithm.losses(scores, episodes.query_y))

            state, trace = self._adapt(fast, shared, support, steps, graph, after)
        collect = self.config.model.norm == "batch"  # with the adapted weights as they are: not scaled again
        output = self.algorithm.predict(state, steps, shared, support, query, collect=collect)
        losses = self.algorithm.losses(output.scores, episodes.query_y)
        asked_losses = torch.stack([*asked, losses], 1)
        counted = losses if phase.weights is None else asked_losses @ phase.weights
        out = MetaLoss.reduced(
            self.config.outer.reduction,
            {
                "query_logits": output.scores,
                "support_losses": torch.stack(trace, 1) if trace else losses.new_zeros(len(losses), 0),
                "query_losses": losses,
                "asked_losses": asked_losses.detach(),
                "objectives": self.algorithm.objectives(fast, state, counted),
            },
            [
                (output.scores.detach().argmax(2) == episodes.query_y).to(losses.dtype).mean(),
                *(tensor.detach().mean(0) for pair in output.statistics.values() for tensor in pair),
            ],
            output.statistics,
        )
        return replace(out, carried=self.algorithm.carried_on(state))

    def _adapt(
        self,
        fast: Tensors,
        shared: Mapping[str, Tensor],
        support: Support,
        steps: int,
        graph: bool,
        after: Callable[[int, State], None] = lambda steps, state: None,
    ) -> tuple[State, list[Tensor]]:
        """All inner steps: the state, and the detached support losses ``[T]`` of every pass.

        ``after`` is called with the number of steps done and the state, behind each.
        """
        state, trace = self.algorithm.start(fast, shared, support, graph)
        step = self._recomputed_step if graph and self.config.run.recompute else self._step
        for k in range(steps):
            # aliases: a step's gradients are added up before they join the others', recomputed or not
            own = {name: each.view_as(each) if graph else each for name, each in shared.items()}
            state, losses = step(state, k, own, support, graph)
            trace += losses
            after(k + 1, state)
        return state, [losses.detach() for losses in trace]

    def _step(
        self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        """The state after one more step, and the support losses ``[T]`` of the passes that this took."""
        found = self.algorithm.gradients(state, k, shared, support, graph)
        return self.algorithm.move(state, k, found, shared, graph), found.losses

    def _recomputed_step(
        self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        names, count = list(shared), len(state.tensors())
        after = state

        def step(inputs: Sequence[Tensor], graph: bool) -> list[Tensor]:
            nonlocal after
            inner = dict(zip(names, inputs[count:], strict=True))
            after, losses = self._step(state.with_tensors(inputs[:count]), k, inner, support, graph)
            return [*after.tensors(), *losses]

        outputs = recomputed(step, [*state.tensors(), *shared.values()])
        like = after  # only its structure is used
        return like.with_tensors(outputs[: len(like.tensors())]), list(outputs[len(like.tensors()) :])

    def _split(self, parameters: Mapping[str, Tensor], tasks: int) -> tuple[Tensors, Tensors]:
        """The tasks' own start ``[T, ...]``, and the parameters that are not adapted, with the axis that they need.

        A gradient at an expanded start is one a task.
        """
        algorithm = self.algorithm
        fast = {name: parameters[name].expand(tasks, *parameters[name].shape) for name in algorithm.adapted}
        shared = {}
        for name, declared in algorithm.declared.items():
            tensor = parameters[name]
            if declared.role != OWN:
                tensor = tensor.expand(tasks, *tensor.shape)
            if name not in fast:
                shared[name] = tensor
        return fast, shared

    def _support(
        self, x: Tensor, y: Tensor, ways: int, query: Images | None = None, batches: Tensor | None = None
    ) -> Support:
        patches = self.algorithm.images(x).patches if batches is None else {}  # no pass over the whole set
        return Support(x, patches, y, ways, query if self.algorithm.joint else None, batches)


def _joined(parts: Sequence[MetaLoss], reduction: str) -> MetaLoss:
    """The results of all chunks as those of one batch."""
    sizes = [len(part.query_losses) for part in parts]
    rows = {name: torch.cat([getattr(part, name) for part in parts]) for name in MetaLoss.ROWS}
    means = [
        torch.stack([value * (size / sum(sizes)) for value, size in zip(values, sizes, strict=True)]).sum(0)
        for values in zip(*(part.means() for part in parts), strict=True)
    ]
    return replace(MetaLoss.reduced(reduction, rows, means, parts[0].statistics), carried=parts[-1].carried)


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Sequence[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(cotangent * gradient for gradient in ctx.gradients)
