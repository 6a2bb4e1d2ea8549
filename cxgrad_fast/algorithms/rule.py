"""What an inner-loop rule is: how the fast weights of all tasks start, and how one step moves them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.config import Config
from cxgrad_fast.kernels import PatchStatistics
from cxgrad_fast.models import Backbone


@dataclass(frozen=True)
class Support:
    """The support sets of ``T`` tasks: ``x`` [T, S, C, H, W], ``y`` [T, S], and the patch statistics of ``x``."""

    x: Tensor
    y: Tensor
    patches: PatchStatistics | None


@dataclass(frozen=True)
class FastState:
    """What the inner loop moves.

    Attributes:
        weights: the adapted parameters, name -> ``[T, ...]``.
        context: context parameters nu ``[T, context_dim]``; absent in rules without them.
    """

    weights: dict[str, Tensor]
    context: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order: weights, then context."""
        return [*self.weights.values(), *([] if self.context is None else [self.context])]

    def with_tensors(self, tensors: Sequence[Tensor]) -> FastState:
        """The same structure holding other tensors, in the order of :meth:`tensors`."""
        count = len(self.weights)
        context = None if self.context is None else tensors[count]
        return FastState(dict(zip(self.weights, tensors[:count], strict=True)), context)


class InnerLoop(ABC):
    """An inner-loop rule.

    ``graph`` in its methods says whether the inner gradients stay differentiable (second-order meta-gradients).
    ``meta`` holds the meta-parameters that are not adapted: norms ``[1, C]``, and the rule's own as they are.
    """

    def __init__(self, config: Config, backbone: Backbone) -> None:
        self.config, self.backbone = config.inner, backbone
        self.norm_eps = config.model.norm_eps

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh meta-parameters of the rule itself, in float32; none by default."""
        return {}

    @abstractmethod
    def start(
        self, weights: dict[str, Tensor], meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        """The state before the first step, and the support losses ``[T]`` of the passes this took."""

    @abstractmethod
    def step(
        self, state: FastState, meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        """The state after one more step, and the support losses ``[T]`` of the passes this took."""

    def _support_losses(
        self, weights: Mapping[str, Tensor], meta: Mapping[str, Tensor], support: Support, eps: Tensor | float
    ) -> Tensor:
        """Mean cross-entropy over each support set, ``[T]``."""
        output = self.backbone.forward({**meta, **weights}, support.x, eps, patches=support.patches)
        return cross_entropy(output.logits, support.y)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images of each task: ``logits`` [T, S, N], ``labels`` [T, S] -> [T]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten().long(), reduction="none")
    return losses.view(labels.shape).mean(1)


def cut(tensors: Sequence[Tensor], graph: bool) -> list[Tensor]:
    """The points at which a pass takes its gradients.

    While a graph is kept they are aliases, so that the gradient is the partial one: where nu itself came from the
    weights (``initial_context_order = 2``), a gradient at the weights would run through nu too. Otherwise they are
    leaves: behind a leaf nothing is recorded, so that a first-order pass gives its memory back at once.
    """
    return [t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_() for t in tensors]
