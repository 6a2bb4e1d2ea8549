"""CxGrad (Lee, Lee, Song 2022): the backbone's gradients scaled by factors that the task itself conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxgrad_fast.algorithms.rule import FastState, InnerLoop, Support, cut
from cxgrad_fast.kernels import normalize_weights, scale_weights

# gamma / sqrt(eps), the slope of a layer's output in its normalised input, is then far below the last place of one
_LEAST_FACTOR = {torch.float32: 1e-11, torch.float64: 1e-90}


class CxGrad(InnerLoop):
    """Algorithms 1 and 2 of the paper, all tasks at once.

    Every step replaces the backbone's weights by ``gamma * w / |w|`` with factors ``gamma = g_phi(nu)`` and moves
    weights and context parameters ``nu`` by their gradients there. Two forms of it compute the same numbers:

    - ``exact``: the network runs on the unit-norm weight with the norm's epsilon at ``eps / gamma**2``. dL/dgamma is
      then a sum of like terms instead of one that cancels (MATH.md 3); dL/dw is the unit weight's over gamma.
    - ``scaled``: the network runs on the scaled weight itself.

    With ``context_update = step``, every step starts from ``nu = 0`` and has a pass of its own to move it.
    """

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The two linear layers of g_phi, in torch's default initialisation."""
        width, layers = self.config.context_dim, len(self.backbone.scaled)
        parameters: dict[str, Tensor] = {}
        for index, (rows, columns) in ((0, (width, width)), (2, (layers, width))):
            weight, bias = torch.empty(rows, columns), torch.empty(rows)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
            nn.init.uniform_(bias, -1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
            parameters |= {f"scaler.{index}.weight": weight, f"scaler.{index}.bias": bias}
        return parameters

    def start(
        self, weights: dict[str, Tensor], meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        state = FastState(weights, support.x.new_zeros(len(support.x), self.config.context_dim))
        if self.config.context_update == "step":
            return state, []
        return self._leave_zero(state, meta, support, graph)

    def step(
        self, state: FastState, meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        trace: list[Tensor] = []
        task_wise = self.config.context_update == "task"
        if not task_wise:
            zero = FastState(state.weights, torch.zeros_like(_context(state)))
            state, trace = self._leave_zero(zero, meta, support, graph)

        (context,) = cut([_context(state)], graph)
        gammas = self._factors(context, meta)
        weights, eps = self._scale(state.weights, gammas)
        values = [*weights.values(), *([eps] if isinstance(eps, Tensor) else [])]
        points = cut(values, graph)
        at_points = dict(zip(weights, points, strict=False))
        losses = self._support_losses(at_points, meta, support, points[-1] if isinstance(eps, Tensor) else eps)
        found = torch.autograd.grad(losses.sum(), points, create_graph=graph)
        gradients = dict(zip(weights, found, strict=False))

        if task_wise:
            if isinstance(eps, Tensor):
                carriers, theirs = [eps], found[-1:]
            else:
                carriers = [weights[name] for name in self.backbone.scaled]
                theirs = tuple(gradients[name] for name in self.backbone.scaled)
            context = context - self._context_step(context, carriers, theirs, graph)
        return FastState(self._move(weights, gradients, gammas, graph), context), [*trace, losses]

    def _leave_zero(
        self, state: FastState, meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        """The pass that only moves nu away from zero (Algorithm 1, lines 8-10); the weights stay."""
        graph = graph and self.config.initial_context_order == 2
        weights = state.weights
        if not graph:  # nu becomes a constant: nothing of this pass is differentiated again
            weights = {name: weight.detach() for name, weight in weights.items()}
            meta = {name: parameter.detach() for name, parameter in meta.items()}
        context = _context(state).detach().requires_grad_()
        gammas = self._factors(context, meta)
        weights, eps = self._scale(weights, gammas)
        carriers = [eps] if isinstance(eps, Tensor) else [weights[name] for name in self.backbone.scaled]
        losses = self._support_losses(weights, meta, support, eps)
        gradients = torch.autograd.grad(losses.sum(), carriers, create_graph=graph)
        context = context - self._context_step(context, carriers, gradients, graph)
        return FastState(state.weights, context if graph else context.detach()), [losses]

    @property
    def _exact(self) -> bool:
        return self.config.form == "exact"

    def _factors(self, context: Tensor, meta: Mapping[str, Tensor]) -> Tensor:
        """The scaling factors ``[T, L]``, in the exact form not below what its range allows.

        A task may drive a layer's factor towards zero (seen: 4e-12), where the scaled network merely stops to depend on
        it. ``eps / gamma**2`` and its two derivatives would overflow; from the least factor on the layer's output
        is its norm's bias to less than rounding, and the gradient is the limit's.
        """
        gammas = scaling_factors(context, meta)
        if not self._exact:
            return gammas
        return gammas + (_LEAST_FACTOR[gammas.dtype] - gammas.detach()).clamp_min(0)

    def _scale(self, weights: Mapping[str, Tensor], gammas: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        """IGS: the weights that the network runs on, and epsilon of the norms behind the scaled ones.

        What carries the loss's dependence on gamma is the epsilon ``[T, L]`` where it is a tensor (exact form), else
        the scaled weights.
        """
        scaled = [weights[name] for name in self.backbone.scaled]
        if self._exact:
            # not eps / gamma**2, whose derivative divides by the fourth power
            used, eps = normalize_weights(scaled)[0], self.norm_eps * gammas.reciprocal().square()
            return {**weights, **dict(zip(self.backbone.scaled, used, strict=True))}, eps
        return {**weights, **dict(zip(self.backbone.scaled, scale_weights(scaled, gammas), strict=True))}, self.norm_eps

    def _context_step(
        self, context: Tensor, carriers: Sequence[Tensor], gradients: Sequence[Tensor], graph: bool
    ) -> Tensor:
        """``beta * dL/dnu`` (Eq. 7): from what carries the loss's dependence on gamma back through g_phi.

        That short graph is kept, since the moved weights and the meta-gradient run through it too.
        """
        (gradient,) = torch.autograd.grad(carriers, context, gradients, create_graph=graph, retain_graph=True)
        return self.config.context_learning_rate * gradient

    def _move(
        self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], gammas: Tensor, graph: bool
    ) -> dict[str, Tensor]:
        """One step of gradient descent on the scaled weights and the head."""
        rate = self.config.learning_rate
        moved = {name: weight - rate * gradients[name] for name, weight in weights.items()}
        if self._exact:
            # dL/d(scaled weight) is the unit weight's over gamma; in first order all of it is a constant
            rates = rate / (gammas if graph else gammas.detach())
            # one call for all layers, and one in each derivative, instead of a selection a layer
            columns = (factor[..., None, None, None, None].unbind(1) for factor in (gammas, rates))
            for name, gamma, own_rate in zip(self.backbone.scaled, *columns, strict=True):
                moved[name] = gamma * weights[name] - own_rate * gradients[name]
        return moved


def scaling_factors(context: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """``g_phi``: context ``[T, D]`` -> scaling factors ``[T, L]``; linear, ReLU, linear, softplus (Eq. 8)."""
    hidden = F.relu(F.linear(context, parameters["scaler.0.weight"], parameters["scaler.0.bias"]))
    return F.softplus(F.linear(hidden, parameters["scaler.2.weight"], parameters["scaler.2.bias"]))


def _context(state: FastState) -> Tensor:
    assert state.context is not None
    return state.context
