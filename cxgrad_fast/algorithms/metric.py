"""What the algorithms without an inner loop share: the features of both sets are compared."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.algorithms.algorithm import Algorithm, Found, Images, Output, State, Support
from cxgrad_fast.config import MetricConfig
from cxgrad_fast.kernels import PatchStatistics
from cxgrad_fast.models import LayerStatistics, Network, Parameter


class Metric(Algorithm):
    """Scores are a comparison of the queries' features with the supports'; nothing is adapted.

    In meta-training the two sets are normalised together (``joint``) or apart. Given statistics normalise both sets.
    Running statistics are kept as the released programs do: they start from mean 0 and variance 1, and every pass over
    a task replaces the share ``statistics_momentum`` of them by its own mean and unbiased variance. Of the tasks of one
    meta-step the averages are taken (the programs have one task a step).
    """

    config: MetricConfig

    def parameters(self) -> dict[str, Parameter]:
        """The backbone's: there is no head."""
        return dict(self.backbone.parameters)

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return False

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        raise AssertionError("there is no inner step")

    def images(self, x: Tensor) -> Images:
        return Images(x, {} if self.config.joint else self.patches(x))  # the pass over both sets has others

    def patches(self, x: Tensor) -> Mapping[str, PatchStatistics]:
        """Patch statistics of images that a pass goes over, as the backbone's."""
        return self.backbone.patches(x)

    def embed(self, net: Network, x: Tensor) -> Tensor:
        """Images ``[T, S, C, H, W]`` -> what is compared, ``[T, S, ...]``."""
        return self.backbone.features(net, x)

    @abstractmethod
    def compare(self, net: Network, supports: Tensor, members: Tensor, queries: Tensor) -> Tensor:
        """The scores ``[T, Q, N]`` of queries.

        Args:
            net: for layers that the comparison has.
            supports, queries: what :meth:`embed` gave.
            members: ``[T, N, S]``, 1 where a support is of a class, else 0.
        """

    def predict(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        support: Support,
        query: Images,
        *,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Output:
        sets: list[Images] = [support, query]
        if self.config.joint or given is not None:
            x = torch.cat([support.x, query.x], 1)
            sets = [Images(x, self.patches(x) if given is None else {})]
        nets = [self.network(state, k, shared, each, given=given, collect=collect) for each in sets]
        embedded = torch.cat([self.embed(net, each.x) for net, each in zip(nets, sets, strict=True)], 1)
        supports, queries = embedded.split([support.x.shape[1], query.x.shape[1]], 1)
        comparing = self.network(state, k, shared, Images(x=queries, patches={}), given=given, collect=collect)
        scores = self.compare(comparing, supports, members_of(support, embedded.dtype), queries)
        return Output(scores, self._moving([*nets, comparing]) if collect else {})

    def support_statistics(
        self, state: State, k: int, shared: Mapping[str, Tensor], support: Support
    ) -> dict[str, LayerStatistics]:
        net = self.network(state, k, shared, support, collect=True)
        supports = self.embed(net, support.x)
        comparing = self.network(state, k, shared, Images(supports, {}), collect=True)
        self.compare(comparing, supports, members_of(support, supports.dtype), supports)
        return net.statistics | comparing.statistics

    def momentum(self, layer: str) -> float:
        """The share of a layer's running statistics that one pass replaces."""
        return self.config.statistics_momentum

    def passes(self, layer: str) -> int:
        """How many passes over a task a layer has in meta-training."""
        return 1 if self.config.joint else 2

    def running_share(self, layer: str) -> float | None:
        return 1 - (1 - self.momentum(layer)) ** self.passes(layer)

    def _moving(self, nets: Sequence[Network]) -> dict[str, LayerStatistics]:
        """What the passes move the running statistics towards, by the shares that they will have, the last the most."""
        found: dict[str, LayerStatistics] = {}
        for net in nets:
            for layer, (mean, variance) in net.statistics.items():
                now = (mean, variance * (net.counts[layer] / max(net.counts[layer] - 1, 1)))
                if layer in found:  # the second of two passes
                    before, share = found[layer], 1 / (2 - self.momentum(layer))
                    now = (before[0].lerp(now[0], share), before[1].lerp(now[1], share))
                found[layer] = now
        return found


def members_of(support: Support, dtype: torch.dtype) -> Tensor:
    """``[T, N, S]``: 1 where a support image is of a class, else 0."""
    classes = torch.arange(support.ways, device=support.y.device)
    return (support.y[:, None] == classes[:, None]).to(dtype)


def class_means(members: Tensor, supports: Tensor) -> Tensor:
    """The mean ``[T, N, D]`` of each class's supports ``[T, S, D]``; zero for a class that has none."""
    return torch.bmm(members, supports) / members.sum(2, keepdim=True).clamp_min(1)


def unit(x: Tensor, dim: int = 2) -> Tensor:
    """``x`` over its norm, which counts as 1e-12 at the least."""
    return F.normalize(x, dim=dim, eps=1e-12)
