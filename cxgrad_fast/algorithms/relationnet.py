"""Relation networks (Sung et al. 2018): a second network scores every pair of class and query."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import cross_entropy
from cxgrad_fast.algorithms.metric import Metric, class_means
from cxgrad_fast.config import RelationNetConfig
from cxgrad_fast.kernels import PatchStatistics
from cxgrad_fast.models import Network, Parameter, own_linear

BLOCKS = 2  # of the relation module


class RelationNet(Metric):
    """The score of a class is what the relation module makes of its map and the query's, beside each other in channels.

    The encoder is Conv-4 whose first two convolutions do not pad and whose last two blocks do not pool. The relation
    module normalises all pairs of a task together.
    """

    config: RelationNetConfig
    also_released = (released.CLOSERLOOK_RELATIONNET,)
    released = released.RELATIONNET

    def parameters(self) -> dict[str, Parameter]:
        """The encoder, ``relation.{0,1}`` (convolutions and norms), ``relation.hidden`` and ``relation.score``."""
        declared, filters = super().parameters(), self.model.filters
        for block in range(BLOCKS):
            declared |= self.backbone.convolution(f"relation.{block}", filters * (1 if block else 2), filters)
        places = self.config.relation_size(self.model) ** 2
        declared |= own_linear("relation.hidden", filters * places, self.config.relation_dim)
        return declared | own_linear("relation.score", self.config.relation_dim, 1)

    def patches(self, x: Tensor) -> Mapping[str, PatchStatistics]:
        return {}  # they are of images that are padded

    def embed(self, net: Network, x: Tensor) -> Tensor:
        """Images -> maps ``[T, S, C, h, w]``."""
        for block in range(4):
            is_late = block >= 2
            x = net.block(f"features.{block}", x, slope=self.model.slope, pool=not is_late, padded=is_late)
        return x

    def compare(self, net: Network, supports: Tensor, members: Tensor, queries: Tensor) -> Tensor:
        flat, shape = supports.flatten(2), supports.shape[2:]
        maps = torch.bmm(members, flat) if self.config.shots_rule == "sum" else class_means(members, flat)
        classes = maps.unflatten(2, shape)[:, None].expand(-1, queries.shape[1], *[-1] * 4)
        asked = queries[:, :, None].expand(-1, -1, members.shape[1], *[-1] * 3)
        x = torch.cat([classes, asked], 3).flatten(1, 2)  # the query is the outer index, the class the inner
        for block in range(BLOCKS):
            padded = bool(self.config.relation_padding)
            x = net.block(f"relation.{block}", x, slope=self.model.slope, pool=True, padded=padded)
        hidden = F.relu(_linear(net, "relation.hidden", x.flatten(2)))
        scores = _linear(net, "relation.score", hidden).view(*queries.shape[:2], -1)
        return scores.sigmoid() if self.config.loss == "mse" else scores

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error against one-hot labels, over queries and classes; with ``softmax`` cross-entropy."""
        if self.config.loss == "softmax":
            return cross_entropy(scores, labels)
        wanted = labels[..., None] == torch.arange(scores.shape[2], device=labels.device)
        return (scores - wanted.to(scores.dtype)).square().mean((1, 2))

    def momentum(self, layer: str) -> float:
        return self.config.relation_momentum if layer.startswith("relation.") else super().momentum(layer)

    def passes(self, layer: str) -> int:
        return 1 if layer.startswith("relation.") else super().passes(layer)


def _linear(net: Network, name: str, x: Tensor) -> Tensor:
    return F.linear(x, net.own(f"{name}.weight"), net.own(f"{name}.bias"))
