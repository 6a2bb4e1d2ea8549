"""What an algorithm is: from meta-parameters to predictions, all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.config import Config
from cxgrad_fast.kernels import PatchStatistics, gradient_step
from cxgrad_fast.models import NORM, OWN, Backbone, LayerStatistics, Network, Parameter, linear_head

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Images:
    """The images ``x`` [T, S, C, H, W] of ``T`` tasks, and the patch statistics of them that the backbone can use."""

    x: Tensor
    patches: Mapping[str, PatchStatistics]


@dataclass(frozen=True)
class Support(Images):
    """The support sets: images and their labels ``y`` [T, S]."""

    y: Tensor
    ways: int  # N, the classes of each task
    query: Images | None = None  # only where the algorithm is joint: the query images beside them
    batches: Tensor | None = None  # only where it draws minibatches: places in the set, [T, steps, images of a step]

    @property
    def together(self) -> Images:
        """The images of support and query sets, in this order."""
        assert self.query is not None
        return Images(torch.cat([self.x, self.query.x], 1), {})


@dataclass(frozen=True)
class State:
    """What the inner loop carries from step to step.

    Attributes:
        fast: the adapted parameters, name -> ``[T, ...]``.
        carried: all else that a step needs from the one before it, name -> ``[T, ...]``: CxGrad's context parameters.
    """

    fast: Tensors
    carried: Tensors = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order: ``fast``, then ``carried``."""
        return [*self.fast.values(), *self.carried.values()]

    def with_tensors(self, tensors: Sequence[Tensor]) -> State:
        """The same structure with other tensors, in the order of :meth:`tensors`."""
        count = len(self.fast)
        fast = dict(zip(self.fast, tensors[:count], strict=True))
        return State(fast, dict(zip(self.carried, tensors[count:], strict=True)))


@dataclass(frozen=True)
class Found:
    """What the passes of one inner step found.

    Attributes:
        weights: the fast weights that the network ran on, ``[T, ...]``: the state's, or CxGrad's scaled ones.
        gradients: of the support loss in ``weights``, by name.
        losses: support losses ``[T]`` of the step's passes, in order.
        extra: what :meth:`Algorithm.move` needs again.
    """

    weights: Tensors
    gradients: Tensors
    losses: list[Tensor]
    extra: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """What of a meta-step depends on the iteration.

    Attributes:
        order: of the meta-gradient.
        asked_after: counts of inner steps after which the query set is asked too, besides the last.
        weights: of the query losses ``[len(asked_after) + 1]``; None: the last one alone counts.
    """

    order: int
    asked_after: tuple[int, ...] = ()
    weights: Tensor | None = None

    @property
    def kind(self) -> tuple[int, tuple[int, ...]]:
        """What needs a program of its own; weights are an input of it."""
        return self.order, self.asked_after


@dataclass(frozen=True)
class Output:
    """What one pass gives.

    Attributes:
        scores: ``[T, S, N]``, the largest for the predicted class.
        statistics: mean and variance ``[T, C]`` of each BatchNorm's input, by convolution; when asked for.
    """

    scores: Tensor
    statistics: dict[str, LayerStatistics]


class Algorithm:
    """A few-shot learning algorithm. The methods are the places where algorithms differ; each has the common default.

    The first axis of every tensor of a task is the task; nothing depends on values, so that a step can be traced.
    ``shared`` holds the meta-parameters that are not adapted, ready for the network: convolutions, biases and heads
    ``[T, ...]``, norms ``[1, ...]``, and the algorithm's own as they are. ``k`` counts the inner steps from 0.
    ``graph`` says whether the inner gradients stay differentiable (second-order meta-gradients).

    Args:
        config: reads ``inner``, ``model`` and ``task.ways``.
        backbone: the network below the head.

    Attributes:
        declared: name -> :class:`Parameter`, of all meta-parameters.
        adapted: names of those that the inner loop moves.
        released: our names -> those of the program that its authors released.
        also_released: the same of other programs whose checkpoints can be loaded.
    """

    released: ClassVar[Mapping[str, str]] = released.FAMILY
    also_released: ClassVar[tuple[Mapping[str, str], ...]] = ()

    def __init__(self, config: Config, backbone: Backbone) -> None:
        self.config, self.model, self.ways = config.inner, config.model, config.task.ways
        self.backbone = backbone
        self.declared = self.parameters()
        self.adapted = tuple(name for name, parameter in self.declared.items() if self.adapts(name, parameter))

    def initial(self, generator: torch.Generator) -> Tensors:
        """Fresh meta-parameters in float32, drawn in the order of :attr:`declared`."""
        return {name: parameter.initial(generator, parameter.shape) for name, parameter in self.declared.items()}

    def parameters(self) -> dict[str, Parameter]:
        """All meta-parameters, in the order of initialisation: the backbone's and a linear head."""
        return self.backbone.parameters | linear_head(self.backbone.width, self.ways)

    def adapts(self, name: str, parameter: Parameter) -> bool:
        """Whether the inner loop moves a parameter: all but norms and the algorithm's own."""
        return parameter.role not in (NORM, OWN)

    @property
    def joint(self) -> bool:
        """Whether the passes over the support set need the query images too: both are normalised together."""
        return False

    @property
    def sequential(self) -> bool:
        """Whether a task of meta-training needs what the one before it left (:meth:`carried_on`)."""
        return False

    def images(self, x: Tensor) -> Images:
        """Images ``[T, S, C, H, W]``, ready for passes over them."""
        return Images(x, self.backbone.patches(x))

    def network(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        images: Images,
        *,
        eps: Mapping[str, Tensor] | None = None,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Network:
        """The network under the weights of ``state``, for a pass over ``images``; other arguments: :class:`Network`."""
        patches = images.patches if given is None else None
        weights = {**shared, **state.fast}
        return Network(self.model, weights, eps=eps, patches=patches, given=given, collect=collect)

    def scores(self, net: Network, images: Images) -> Tensor:
        """Scores ``[T, S, N]`` of images: the linear head's logits."""
        return net.linear("head", self.backbone.features(net, images.x))

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        """The state before the first step, and the support losses ``[T]`` of the passes that this took."""
        return State(fast), []

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        """The gradients of the support loss in the fast weights."""
        points = dict(zip(state.fast, cut(list(state.fast.values()), graph), strict=True))
        net = self.network(replace(state, fast=points), k, shared, support)
        losses = self.support_losses(net, support)
        return Found(state.fast, gradients_of(losses, points, graph), [losses])

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        """The state after the step whose passes found ``found``."""
        raise NotImplementedError

    def predict(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        support: Support,
        query: Images,
        *,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Output:
        """The scores of query images after ``k`` steps; ``given`` and ``collect`` as for :class:`Network`."""
        net = self.network(state, k, shared, query, given=given, collect=collect)
        return Output(self.scores(net, query), net.statistics)

    def support_statistics(
        self, state: State, k: int, shared: Mapping[str, Tensor], support: Support
    ) -> dict[str, LayerStatistics]:
        """Mean and variance ``[T, C]`` of each BatchNorm's input when the support set is asked, after ``k`` steps."""
        return self.predict(state, k, shared, support, support, collect=True).statistics

    def running_share(self, layer: str) -> float | None:
        """The share of a layer's running statistics, which start from 0 and 1, that every meta-step replaces.

        None: they are the average of all meta-steps, and then of about the last hundred.
        """
        return None

    def phase(self, iteration: int | None) -> Phase:
        """The phase of an iteration of meta-training, counted from 0; None: after all phases."""
        is_early = iteration is not None and iteration < self.config.first_order_iterations
        return Phase(1 if is_early else self.config.order)

    def objectives(self, start: Tensors, state: State, losses: Tensor) -> Tensor:
        """What each task adds to the meta-loss, ``[T]``.

        Args:
            start: the adapted parameters before adaptation, ``[T, ...]``.
            state: after the last step.
            losses: of the query sets, ``[T]``.
        """
        return losses

    def carried_on(self, state: State) -> Tensors:
        """New values of parameters that are not trained, by name: what the last task leaves for the next."""
        return {}

    def support_losses(self, net: Network, support: Support) -> Tensor:
        """The loss ``[T]`` of each support set: :meth:`losses` of :meth:`scores`, of a linear head in one call."""
        kind = type(self)
        if kind.scores is Algorithm.scores and kind.losses is Algorithm.losses:
            return net.linear_cross_entropy("head", self.backbone.maps(net, support.x), support.y)
        return self.losses(self.scores(net, support), support.y)

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss of each task, ``[T]``: mean cross-entropy over its images."""
        return cross_entropy(scores, labels)


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


def ones(losses: Tensor) -> Tensor:
    """The cotangents of losses ``[T]`` whose sum is differentiated; a traced program makes them once."""
    return torch.ones(losses.shape, dtype=losses.dtype, device=losses.device)


def gradients_of(losses: Tensor, points: Mapping[str, Tensor], graph: bool, keep: bool = False) -> Tensors:
    """dL/dpoint of each task's loss ``[T]``, by name; zero where a loss does not depend on a point.

    Args:
        graph: whether the gradients are differentiable.
        keep: whether what the losses came from is differentiated again though the gradients are not.
    """
    found = torch.autograd.grad(
        losses,
        list(points.values()),
        ones(losses),
        create_graph=graph,
        retain_graph=graph or keep,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(points, found, strict=True))


def moved(found: Found, rates: float | Tensor, **numbers: Tensor | None) -> Tensors:
    """The weights after one step of gradient descent; arguments: :func:`cxgrad_fast.kernels.gradient_step`."""
    gradients = [found.gradients[name] for name in found.weights]
    return dict(zip(found.weights, gradient_step([*found.weights.values()], gradients, rates, **numbers), strict=True))


def linear(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``x`` [T, S, D], weight [T, N, D] and bias [T, N] of a task's own layer -> [T, S, N]."""
    return torch.baddbmm(parameters[f"{name}.bias"][:, None], x, parameters[f"{name}.weight"].mT)


def two_layers(parameters: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """``x`` [T, D] through the layers ``NAME.0`` and, where there is one, ReLU and ``NAME.2``, shared by all tasks."""
    x = F.linear(x, parameters[f"{name}.0.weight"], parameters[f"{name}.0.bias"])
    if f"{name}.2.weight" not in parameters:
        return x
    return F.linear(F.relu(x), parameters[f"{name}.2.weight"], parameters[f"{name}.2.bias"])


def across(values: Tensor, like: Tensor) -> Tensor:
    """One value a task ``[T]`` with as many axes as ``like`` [T, ...], to be multiplied with it."""
    return values.view(-1, *[1] * (like.ndim - 1))
