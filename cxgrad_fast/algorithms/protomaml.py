"""ProtoMAML (Triantafillou et al. 2020): MAML whose head starts from the prototypes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast.algorithms.algorithm import State, Support, Tensors
from cxgrad_fast.algorithms.maml import MAML
from cxgrad_fast.algorithms.metric import class_means, members_of
from cxgrad_fast.models import Parameter


class ProtoMAML(MAML):
    """The head starts as ``W_k = 2 P_k``, ``b_k = -|P_k|^2``: its logits are ProtoNet's but for a number all share.

    ``P_k`` are the mean features of the support set under the meta-learned weights; the meta-gradient goes through
    them, in first order too. The head is adapted with all the rest.
    """

    def parameters(self) -> dict[str, Parameter]:
        return dict(self.backbone.parameters)

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        features = self.backbone.features(self.network(State(fast), 0, shared, support), support.x)
        prototypes = class_means(members_of(support, features.dtype), features)
        head = {"head.weight": 2 * prototypes, "head.bias": -prototypes.square().sum(2)}
        return State(fast | head), []
