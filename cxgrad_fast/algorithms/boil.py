"""BOIL (Oh et al. 2021): the body alone is adapted, norms included; the head stays as it was meta-learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, Tensors, moved
from cxgrad_fast.config import BOILConfig
from cxgrad_fast.models import HEAD, OWN, Parameter


class BOIL(Algorithm):
    """``theta <- theta - alpha * dL/dtheta`` for the body; ``head_learning_rate`` moves the head, 0 as released."""

    config: BOILConfig
    released = released.BOIL

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role != OWN and (parameter.role != HEAD or self.config.head_learning_rate > 0)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        fast: Tensors = {}
        for rate, of_head in ((self.config.learning_rate, False), (self.config.head_learning_rate, True)):
            part = {name: each for name, each in state.fast.items() if (self.declared[name].role == HEAD) == of_head}
            if part:
                fast |= moved(replace(found, weights=part), rate)
        return State(fast)
