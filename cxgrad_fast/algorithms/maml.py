"""MAML (Finn et al. 2017): gradient descent on convolutions and head, from a meta-learned start."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, moved


class MAML(Algorithm):
    """``theta <- theta - alpha * dL/dtheta`` (paper, Eq. 2); norms are meta-learned, not adapted."""

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        return State(moved(found, self.config.learning_rate))
