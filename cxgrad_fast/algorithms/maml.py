"""MAML (Finn et al. 2017): gradient descent on convolutions and head, from a meta-learned start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cxgrad_fast.algorithms.rule import FastState, InnerLoop, Support, cut


class MAML(InnerLoop):
    """``theta <- theta - alpha * dL/dtheta`` (paper, Eq. 2); norms are meta-learned, not adapted."""

    def start(
        self, weights: dict[str, Tensor], meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        return FastState(weights), []

    def step(
        self, state: FastState, meta: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[FastState, list[Tensor]]:
        points = cut(list(state.weights.values()), graph)
        at_points = dict(zip(state.weights, points, strict=True))
        losses = self._support_losses(at_points, meta, support, self.norm_eps)
        gradients = torch.autograd.grad(losses.sum(), points, create_graph=graph)
        moved = {
            name: weight - self.config.learning_rate * gradient
            for (name, weight), gradient in zip(state.weights.items(), gradients, strict=True)
        }
        return FastState(moved), [losses]
