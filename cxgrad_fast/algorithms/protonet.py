"""Prototypical networks (Snell et al. 2017): the class whose mean features are nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.metric import Metric, class_means, unit
from cxgrad_fast.config import ProtoNetConfig
from cxgrad_fast.models import Network


class ProtoNet(Metric):
    """The logit of class k: ``-|z - P_k|^2``, ``-|z - P_k|`` or the cosine of ``z`` and ``P_k``, its mean features."""

    config: ProtoNetConfig
    also_released = (released.EASYFSL, released.CLOSERLOOK_MATCHINGNET)  # programs of one network for all methods
    released = released.PROTONET

    def compare(self, net: Network, supports: Tensor, members: Tensor, queries: Tensor) -> Tensor:
        prototypes = class_means(members, supports)
        if self.config.distance == "cosine":
            return torch.bmm(unit(queries), unit(prototypes).mT)
        # not |z|^2 - 2 z P + |P|^2, whose terms cancel
        squared = (queries[:, :, None] - prototypes[:, None]).square().sum(3)
        if self.config.distance == "squared":
            return -squared
        is_zero = squared == 0  # there the root's slope is endless, and the distance's taken as zero
        return -squared.masked_fill(is_zero, 1).sqrt().masked_fill(is_zero, 0)
