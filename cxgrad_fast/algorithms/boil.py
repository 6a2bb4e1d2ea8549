"""BOIL (Oh et al. 2021): the body alone is adapted, norms included; the head stays as it was meta-learned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State
from cxgrad_fast.config import BOILConfig
from cxgrad_fast.models import HEAD, OWN, Parameter


class BOIL(Algorithm):
    """``theta <- theta - alpha * dL/dtheta`` for the body; ``head_learning_rate`` moves the head, 0 as released."""

    config: BOILConfig
    released = released.BOIL

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role != OWN and (parameter.role != HEAD or self.config.head_learning_rate > 0)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        moved = {}
        for name, weight in state.fast.items():
            is_head = self.declared[name].role == HEAD
            rate = self.config.head_learning_rate if is_head else self.config.learning_rate
            moved[name] = weight - rate * found.gradients[name]
        return State(moved)
