"""Meta-SGD (Li et al. 2017): the learning rate of every element is meta-learned."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State
from cxgrad_fast.models import OWN, Parameter, constant


class MetaSGD(Algorithm):
    """``theta <- theta - rate o dL/dtheta``, the same rates in every step; norms are adapted too, as in learn2learn."""

    released = released.METASGD

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, its head, and ``rates.NAME`` of the shape of each of their parameters."""
        network = super().parameters()
        initial = constant(self.config.learning_rate)
        return network | {f"rates.{name}": Parameter(each.shape, OWN, initial) for name, each in network.items()}

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role != OWN

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        return State(
            {name: weight - shared[f"rates.{name}"] * found.gradients[name] for name, weight in state.fast.items()}
        )
