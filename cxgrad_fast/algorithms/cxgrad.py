"""CxGrad (Lee, Lee, Song 2022): the backbone's gradients scaled by factors that the task itself conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, Support, Tensors, cut, gradients_of, moved, ones
from cxgrad_fast.config import CxGradConfig
from cxgrad_fast.kernels import normalize_weights, scale_weights, scaling_factors
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
        gammas, eps = self._factors(context, shared)
        weights = self._scale(state.fast, gammas)
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
        rate = self.config.learning_rate
        if not self._exact:
            return State(moved(found, rate), {"context": context})
        # the scaled layers first, which have factors
        names = [*self.backbone.scaled, *(name for name in found.weights if name not in self.backbone.scaled)]
        found = replace(found, weights={name: found.weights[name] for name in names})
        gammas = found.extra["gammas"]
        # dL/d(scaled weight) is the unit weight's over gamma; in first order all of it is a constant
        fast = moved(found, rate, factors=gammas, divisors=gammas if graph else gammas.detach())
        return State({name: fast[name] for name in state.fast}, {"context": context})

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
        gammas, eps = self._factors(context, shared)
        weights = self._scale(weights, gammas)
        carriers = [weights[name] for name in self.backbone.scaled] if eps is None else [eps]
        losses = self._support_losses(weights, eps, 0, shared, support)
        gradients = torch.autograd.grad(losses, carriers, ones(losses), create_graph=graph)
        context = context - self._context_step(context, carriers, gradients, graph)
        return context if graph else context.detach(), losses

    def _support_losses(
        self, weights: Tensors, eps: Tensor | None, k: int, shared: Mapping[str, Tensor], support: Support
    ) -> Tensor:
        """``[T]``, under weights and the norms' epsilon ``[T, L]`` that :meth:`_factors` gave."""
        by_layer = None
        if eps is not None:
            names = (name.removesuffix(".weight") for name in self.backbone.scaled)
            by_layer = dict(zip(names, eps.unbind(1), strict=True))
        net = self.network(State(weights), k, shared, support, eps=by_layer)
        return self.support_losses(net, support)

    @property
    def _exact(self) -> bool:
        return self.config.form == "exact"

    def _factors(self, context: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The scaling factors (Eq. 8), and in the exact form the epsilons of the norms behind them, ``[T, L]`` each.

        Where there are epsilons they carry the loss's dependence on gamma, otherwise the scaled weights do. A task may
        drive a layer's factor towards zero (seen: 4e-12), where the scaled network merely stops to depend on it.
        ``eps / gamma**2`` and its two derivatives would overflow: the exact form has a least factor, from which on the
        layer's output is its norm's bias to less than rounding, and the gradient is the limit's.
        """
        scaler = [shared[f"scaler.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        least = _LEAST_FACTOR[context.dtype] if self._exact else 0.0
        gammas, eps = scaling_factors(context, *scaler, norm_eps=self.model.norm_eps, least=least)
        return gammas, eps if self._exact else None

    def _scale(self, weights: Mapping[str, Tensor], gammas: Tensor) -> Tensors:
        """IGS: the weights that the network runs on, those of unit norm in the exact form."""
        scaled = [weights[name] for name in self.backbone.scaled]
        used = normalize_weights(scaled)[0] if self._exact else scale_weights(scaled, gammas)
        return {**weights, **dict(zip(self.backbone.scaled, used, strict=True))}

    def _context_step(
        self, context: Tensor, carriers: Sequence[Tensor], gradients: Sequence[Tensor], graph: bool
    ) -> Tensor:
        """``beta * dL/dnu`` (Eq. 7): from what carries the loss's dependence on gamma back through g_phi.

        That short graph is kept, since the moved weights and the meta-gradient run through it too.
        """
        (gradient,) = torch.autograd.grad(carriers, context, gradients, create_graph=graph, retain_graph=True)
        return self.config.context_learning_rate * gradient
