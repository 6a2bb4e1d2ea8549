"""L2F (Baik et al. 2020): each task first attenuates what was meta-learned, by one factor a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import State, Support, Tensors, across, cut, gradients_of, two_layers
from cxgrad_fast.algorithms.maml import MAML
from cxgrad_fast.config import L2FConfig
from cxgrad_fast.models import Parameter, own_linear


class L2F(MAML):
    """``theta_0 <- gamma * theta_0`` with ``gamma = attenuator(means of dL/dtheta_0)``; then as MAML.

    The means are constants of the meta-gradient, or not (``embedding_in_graph``), as in the ALFA program's copy.
    """

    config: L2FConfig
    released = released.L2F

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, its head, and the attenuator: two linear layers as wide as there are adapted tensors."""
        network = super().parameters()
        width = sum(self.adapts(name, parameter) for name, parameter in network.items())
        return network | own_linear("attenuator.0", width, width) | own_linear("attenuator.2", width, width)

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        # in first order too: only where nobody asks for a meta-gradient is there none to keep it for
        keeps = self.config.embedding_in_graph and any(weight.requires_grad for weight in fast.values())
        points = dict(zip(fast, cut(list(fast.values()), keeps), strict=True))
        others = shared if keeps else {name: tensor.detach() for name, tensor in shared.items()}
        losses = self.support_losses(self.network(State(points), 0, others, support), support)
        found = gradients_of(losses, points, keeps)
        embedding = torch.stack([gradient.flatten(1).mean(1) for gradient in found.values()], 1)
        gammas = two_layers(shared, "attenuator", embedding).sigmoid().unbind(1)
        attenuated = {name: across(gamma, fast[name]) * fast[name] for name, gamma in zip(fast, gammas, strict=True)}
        return State(attenuated), [losses]
