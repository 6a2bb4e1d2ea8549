"""The meta-loss of a batch of tasks as one tensor program with a leading task axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.algorithms import FastState, InnerLoop, Support
from cxgrad_fast.algorithms.rule import cross_entropy
from cxgrad_fast.config import Config
from cxgrad_fast.engine.recompute import recomputed
from cxgrad_fast.episodes import Episodes
from cxgrad_fast.kernels import PatchStatistics, patch_statistics
from cxgrad_fast.models import Backbone, LayerStatistics, Output


@dataclass(frozen=True)
class MetaLoss:
    """What a batch of ``T`` tasks gave.

    Attributes:
        loss: scalar, the query losses reduced over tasks (mean, or the paper's sum), differentiable in the
            meta-parameters.
        query_logits: ``[T, N*Q, N]``.
        support_losses: ``[T, passes]``, mean cross-entropy of every pass over the support set, in order; the passes
            that only move the context parameters are among them.
        query_losses: ``[T]``.
        accuracy: scalar, share of query images classified correctly.
        statistics: mean and variance ``[C]`` of each BatchNorm's input in the query pass, averaged over tasks, by
            convolution; empty for other norms.
    """

    loss: Tensor
    query_logits: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracy: Tensor
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)

    def detach(self) -> MetaLoss:
        """The same numbers without their graph."""
        return replace(
            self,
            loss=self.loss.detach(),
            query_logits=self.query_logits.detach(),
            query_losses=self.query_losses.detach(),
        )


class Engine:
    """Runs an inner-loop rule on a backbone for all tasks of a meta-batch.

    Parameters come and go as ``{name: Tensor}``; the engine itself holds none.

    Attributes:
        tasks_per_chunk: of a meta-batch that go through at once; 0: all. Of the config, or what fits
            (:meth:`cxgrad_fast.Learner.plan_memory`).
    """

    def __init__(self, config: Config, backbone: Backbone, rule: InnerLoop) -> None:
        self.config, self.backbone, self.rule = config, backbone, rule
        self.tasks_per_chunk = config.run.tasks_per_chunk

    def meta_loss(self, parameters: Mapping[str, Tensor], episodes: Episodes) -> MetaLoss:
        """The meta-loss, differentiable in the parameters (Eq. 3).

        With ``tasks_per_chunk`` the tasks go through in chunks whose gradients are taken at once, so that only one
        chunk's graph exists at a time; the other results then carry no graph.
        """
        tasks, chunk = len(episodes), self.tasks_per_chunk or len(episodes)
        if tasks <= chunk:
            return self._meta_loss(parameters, episodes)
        leaves = [tensor for tensor in parameters.values() if tensor.requires_grad]
        parts: list[MetaLoss] = []
        sizes: list[int] = []
        total: list[Tensor] = []
        for start in range(0, tasks, chunk):
            part = self._meta_loss(parameters, episodes[start : start + chunk])
            size = len(part.query_losses)
            if torch.is_grad_enabled():
                share = part.loss * (size / tasks) if self.config.outer.reduction == "mean" else part.loss
                found = torch.autograd.grad(share, leaves, allow_unused=True, materialize_grads=True)
                total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
            parts.append(part.detach())
            sizes.append(size)
        joined = self._join(parts, sizes)
        if not total:
            return joined
        return replace(joined, loss=_WithGradients.apply(joined.loss, total, *leaves))

    def adapt(self, parameters: Mapping[str, Tensor], support_x: Tensor, support_y: Tensor, graph: bool) -> FastState:
        """The state after all inner steps, for ``support_x`` [T, S, C, H, W] and ``support_y`` [T, S]."""
        return self._adapt(parameters, self._support(support_x, support_y), graph)[0]

    def query_logits(
        self,
        parameters: Mapping[str, Tensor],
        state: FastState,
        x: Tensor,
        given: Mapping[str, LayerStatistics] | None = None,
    ) -> Tensor:
        """Logits ``[T, S, N]`` of adapted networks; BatchNorm by the batch itself, or by given statistics."""
        return self._query(parameters, state, x, given=given).logits

    def adapted(
        self,
        parameters: Mapping[str, Tensor],
        support_x: Tensor,
        support_y: Tensor,
        statistics: str,
        running: Mapping[str, LayerStatistics],
    ) -> tuple[FastState, dict[str, LayerStatistics] | None]:
        """Networks adapted for use, without a graph, and what normalises in them: None is the batch itself.

        With ``statistics = support`` those ``[T, C]`` of the support set under the adapted weights, with ``running``
        ``running``, means and variances ``[C]`` by convolution.
        """
        parameters = {name: tensor.detach() for name, tensor in parameters.items()}
        with torch.enable_grad():
            state = self.adapt(parameters, support_x, support_y, graph=False)
        state = state.with_tensors([tensor.detach() for tensor in state.tensors()])
        if statistics == "running":
            return state, {name: (mean[None], variance[None]) for name, (mean, variance) in running.items()}
        if statistics == "support":
            with torch.no_grad():
                return state, self._query(parameters, state, support_x, collect=True).statistics
        return state, None

    def _meta_loss(self, parameters: Mapping[str, Tensor], episodes: Episodes) -> MetaLoss:
        graph = self.config.inner.order == 2 and torch.is_grad_enabled()
        with torch.enable_grad():  # the inner loop needs gradients whatever the caller does
            state, trace = self._adapt(parameters, self._support(episodes.support_x, episodes.support_y), graph)
        x = episodes.query_x
        output = self._query(parameters, state, x, collect=self.config.model.norm == "batch")
        losses = cross_entropy(output.logits, episodes.query_y)
        return MetaLoss(
            loss=losses.mean() if self.config.outer.reduction == "mean" else losses.sum(),
            query_logits=output.logits,
            support_losses=torch.stack(trace, 1) if trace else losses.new_zeros(len(losses), 0),
            query_losses=losses,
            accuracy=(output.logits.detach().argmax(2) == episodes.query_y).to(losses.dtype).mean(),
            statistics={
                name: (mean.detach().mean(0), variance.detach().mean(0))
                for name, (mean, variance) in output.statistics.items()
            },
        )

    def _adapt(self, parameters: Mapping[str, Tensor], support: Support, graph: bool) -> tuple[FastState, list[Tensor]]:
        """All inner steps: the state, and the detached support losses ``[T]`` of every pass."""
        tasks = len(support.x)
        weights = {name: _per_task(parameters[name], tasks) for name in self.backbone.adapted}
        meta = self._meta(parameters)
        state, trace = self.rule.start(weights, meta, support, graph)
        step = self._recomputed_step if graph and self.config.run.recompute else self.rule.step
        for _ in range(self.config.inner.steps):
            state, losses = step(state, meta, support, graph)
            trace += losses
        return state, [losses.detach() for losses in trace]

    def _recomputed_step(
        self, state: FastState, meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        names, count = list(meta), len(state.tensors())

        def step(inputs: Sequence[Tensor], graph: bool) -> list[Tensor]:
            inner = dict(zip(names, inputs[count:], strict=True))
            after, losses = self.rule.step(state.with_tensors(inputs[:count]), inner, support, graph)
            return [*after.tensors(), *losses]

        outputs = recomputed(step, [*state.tensors(), *meta.values()])
        return state.with_tensors(outputs[:count]), list(outputs[count:])

    def _query(
        self,
        parameters: Mapping[str, Tensor],
        state: FastState,
        x: Tensor,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Output:
        """A pass with the adapted weights as they are: the query pass is not scaled again (released program)."""
        weights = {**self._meta(parameters), **state.weights}
        patches = self._patches(x) if given is None else None
        return self.backbone.forward(weights, x, self.rule.norm_eps, patches=patches, given=given, collect=collect)

    def _meta(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that the inner loop does not move; those of norms get their task axis."""
        adapted = set(self.backbone.adapted)
        return {
            name: tensor[None] if name in self.backbone.shapes else tensor
            for name, tensor in parameters.items()
            if name not in adapted
        }

    def _support(self, x: Tensor, y: Tensor) -> Support:
        return Support(x, y, self._patches(x))

    def _patches(self, x: Tensor) -> PatchStatistics | None:
        """With them the first layer is one pass over the images, which pays even where they are seen once."""
        return patch_statistics(x) if self.backbone.first_layer_patches and not x.requires_grad else None

    def _join(self, parts: Sequence[MetaLoss], sizes: Sequence[int]) -> MetaLoss:
        """The results of all chunks as those of one batch."""
        shares = [size / sum(sizes) for size in sizes]

        def mean(values: Sequence[Tensor]) -> Tensor:
            return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)

        losses = torch.cat([part.query_losses for part in parts])
        return MetaLoss(
            loss=losses.mean() if self.config.outer.reduction == "mean" else losses.sum(),
            query_logits=torch.cat([part.query_logits for part in parts]),
            support_losses=torch.cat([part.support_losses for part in parts]),
            query_losses=losses,
            accuracy=mean([part.accuracy for part in parts]),
            statistics={
                name: (mean([p.statistics[name][0] for p in parts]), mean([p.statistics[name][1] for p in parts]))
                for name in parts[0].statistics
            },
        )


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


def _per_task(parameter: Tensor, tasks: int) -> Tensor:
    """A meta-parameter as the tasks' own start, ``[T, ...]``: a gradient at it is one a task."""
    return parameter.expand(tasks, *parameter.shape)
