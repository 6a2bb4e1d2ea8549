"""CxGrad (Lee, Lee, Song 2022): the backbone's gradients scaled by factors that the task itself conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, Support, Tensors, cut, gradients_of
from cxgrad_fast.config import CxGradConfig
from cxgrad_fast.kernels import normalize_weights, scale_weights
from cxgrad_fast.models import Parameter, own_linear

# gamma / sqrt(eps), the slope of a layer's output in its normalised input, is then far below the last place of one
_LEAST_FACTOR = {torch.float32: 1e-11, torch.float64: 1e-90}


class CxGrad(Algorithm):
    """Algorithms 1 and 2 of the paper, all tasks at once.

    Every step replaces the backbone's weights by ``gamma * w / |w|`` with factors ``gamma = g_phi(nu)`` and moves
    weights and context parameters ``nu`` by their gradients there. Two forms of it compute the same numbers:

    - ``exact``: the network runs on the unit-norm weight with the norm's epsilon at ``eps / gamma**2``. dL/dgamma is
      then a sum of like terms instead of one that cancels (MATH.md 3); dL/dw is the unit weight's over gamma.
    - ``scaled``: the network runs on the scaled weight itself.

    With ``context_update = step``, every step starts from ``nu = 0`` and has a pass of its own to move it.
    """

    config: CxGradConfig
    released = released.CXGRAD

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, its head, and the two linear layers of g_phi in torch's default initialisation."""
        width, layers = self.config.context_dim, len(self.backbone.scaled)
        return super().parameters() | own_linear("scaler.0", width, width) | own_linear("scaler.2", width, layers)

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        state = State(fast, {"context": support.x.new_zeros(len(support.x), self.config.context_dim)})
        if self.config.context_update == "step":
            return state, []
        context, losses = self._leave_zero(state, shared, support, graph)
        return State(fast, {"context": context}), [losses]

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        trace: list[Tensor] = []
        context = state.carried["context"]
        task_wise = self.config.context_update == "task"
        if not task_wise:
            zero = State(state.fast, {"context": torch.zeros_like(context)})
            context, first = self._leave_zero(zero, shared, support, graph)
            trace.append(first)

        (context,) = cut([context], graph)
        gammas = self._factors(context, shared)
        weights, eps = self._scale(state.fast, gammas)
        values = weights if eps is None else {**weights, "eps": eps}
        points = dict(zip(values, cut(list(values.values()), graph), strict=True))
        at_points = {name: points[name] for name in weights}
        losses = self._support_losses(at_points, points.get("eps"), k, shared, support)
        found = gradients_of(losses, points, graph)
        extra = {"context": context, "gammas": gammas}
        if task_wise:
            carriers = ["eps"] if eps is not None else self.backbone.scaled
            extra["context_step"] = self._context_step(
                context, [values[name] for name in carriers], [found[name] for name in carriers], graph
            )
        return Found(weights, {name: found[name] for name in weights}, [*trace, losses], extra)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        """One step of gradient descent on nu, the scaled weights and the head."""
        context = found.extra["context"]
        if "context_step" in found.extra:
            context = context - found.extra["context_step"]
        gammas, rate = found.extra["gammas"], self.config.learning_rate
        own: dict[str, tuple[Tensor, Tensor]] = {}
        if self._exact:
            # dL/d(scaled weight) is the unit weight's over gamma; in first order all of it is a constant
            rates = rate / (gammas if graph else gammas.detach())
            # one call for all layers, and one in each derivative, instead of a selection a layer
            columns = [factor[..., None, None, None, None].unbind(1) for factor in (gammas, rates)]
            own = dict(zip(self.backbone.scaled, zip(*columns, strict=True), strict=True))
        moved = {}
        for name, weight in found.weights.items():
            gradient = found.gradients[name]
            moved[name] = own[name][0] * weight - own[name][1] * gradient if name in own else weight - rate * gradient
        return State(moved, {"context": context})

    def _leave_zero(
        self, state: State, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[Tensor, Tensor]:
        """The pass that only moves nu away from zero (Algorithm 1, lines 8-10): nu, and the support losses ``[T]``."""
        graph = graph and self.config.initial_context_order == 2
        weights = state.fast
        if not graph:  # nu becomes a constant: nothing of this pass is differentiated again
            weights = {name: weight.detach() for name, weight in weights.items()}
            shared = {name: parameter.detach() for name, parameter in shared.items()}
        context = state.carried["context"].detach().requires_grad_()
        gammas = self._factors(context, shared)
        weights, eps = self._scale(weights, gammas)
        carriers = [weights[name] for name in self.backbone.scaled] if eps is None else [eps]
        losses = self._support_losses(weights, eps, 0, shared, support)
        gradients = torch.autograd.grad(losses.sum(), carriers, create_graph=graph)
        context = context - self._context_step(context, carriers, gradients, graph)
        return context if graph else context.detach(), losses

    def _support_losses(
        self, weights: Tensors, eps: Tensor | None, k: int, shared: Mapping[str, Tensor], support: Support
    ) -> Tensor:
        """``[T]``, under weights and the norms' epsilon ``[T, L]`` that :meth:`_scale` gave."""
        by_layer = None
        if eps is not None:
            names = (name.removesuffix(".weight") for name in self.backbone.scaled)
            by_layer = dict(zip(names, eps.unbind(1), strict=True))
        net = self.network(State(weights), k, shared, support, eps=by_layer)
        return self.losses(self.scores(net, support), support.y)

    @property
    def _exact(self) -> bool:
        return self.config.form == "exact"

    def _factors(self, context: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """The scaling factors ``[T, L]``, in the exact form not below what its range allows.

        A task may drive a layer's factor towards zero (seen: 4e-12), where the scaled network merely stops to depend on
        it. ``eps / gamma**2`` and its two derivatives would overflow; from the least factor on the layer's output
        is its norm's bias to less than rounding, and the gradient is the limit's.
        """
        gammas = scaling_factors(context, shared)
        if not self._exact:
            return gammas
        return gammas + (_LEAST_FACTOR[gammas.dtype] - gammas.detach()).clamp_min(0)

    def _scale(self, weights: Mapping[str, Tensor], gammas: Tensor) -> tuple[Tensors, Tensor | None]:
        """IGS: the weights that the network runs on, and epsilon ``[T, L]`` of the norms behind the scaled ones.

        Where there is an epsilon (exact form) it carries the loss's dependence on gamma, otherwise the scaled weights
        do.
        """
        scaled = [weights[name] for name in self.backbone.scaled]
        if self._exact:
            # not eps / gamma**2, whose derivative divides by the fourth power
            used, eps = normalize_weights(scaled)[0], self.model.norm_eps * gammas.reciprocal().square()
            return {**weights, **dict(zip(self.backbone.scaled, used, strict=True))}, eps
        return {**weights, **dict(zip(self.backbone.scaled, scale_weights(scaled, gammas), strict=True))}, None

    def _context_step(
        self, context: Tensor, carriers: Sequence[Tensor], gradients: Sequence[Tensor], graph: bool
    ) -> Tensor:
        """``beta * dL/dnu`` (Eq. 7): from what carries the loss's dependence on gamma back through g_phi.

        That short graph is kept, since the moved weights and the meta-gradient run through it too.
        """
        (gradient,) = torch.autograd.grad(carriers, context, gradients, create_graph=graph, retain_graph=True)
        return self.config.context_learning_rate * gradient


def scaling_factors(context: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """``g_phi``: context ``[T, D]`` -> scaling factors ``[T, L]``; linear, ReLU, linear, softplus (Eq. 8)."""
    hidden = F.relu(F.linear(context, parameters["scaler.0.weight"], parameters["scaler.0.bias"]))
    return F.softplus(F.linear(hidden, parameters["scaler.2.weight"], parameters["scaler.2.bias"]))
