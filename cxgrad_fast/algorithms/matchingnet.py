"""Matching networks (Vinyals et al. 2016): attention over the support set, in the two forms that are in use."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxgrad_fast import released
from cxgrad_fast.algorithms.metric import Metric, unit
from cxgrad_fast.config import MatchingNetConfig
from cxgrad_fast.models import OWN, Network, Parameter


class MatchingNet(Metric):
    """A class's probability is the attention that its supports get from the query; the loss is minus its logarithm.

    With ``full_context`` the features of a support see the other supports, by an LSTM over them in both directions and
    in their order, and those of a query see the supports, by an LSTM cell that reads from them as often as there are
    supports. ``attention``: the softmax of ``100 relu(cosine)`` (CloserLookFewShot), or of the products of the query
    with the supports divided by their norms (easyfsl).
    """

    config: MatchingNetConfig
    also_released = (released.EASYFSL,)
    released = released.CLOSERLOOK_MATCHINGNET

    def parameters(self) -> dict[str, Parameter]:
        """The backbone and, with full context, ``support_lstm``, ``support_lstm.reverse`` and ``query_lstm``."""
        declared, width = super().parameters(), self.backbone.width
        if not self.config.full_context:
            return declared
        inputs = {"support_lstm": width, "support_lstm.reverse": width, "query_lstm": 2 * width}
        for name, count in inputs.items():
            declared |= _lstm(name, count, width)
        return declared

    def compare(self, net: Network, supports: Tensor, members: Tensor, queries: Tensor) -> Tensor:
        if self.config.full_context:
            supports = supports + _states(net, "support_lstm", supports)
            queries = _read(net, queries, supports)
        if self.config.attention == "cosine":
            products = torch.bmm(_near_unit(queries), _near_unit(supports).mT)
            attention = (100 * products.relu()).softmax(2)
        else:
            attention = torch.bmm(queries, unit(supports).mT).softmax(2)
        return (torch.bmm(attention, members.mT) + 1e-6).log()

    def losses(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Minus the mean of the labels' scores, which are logarithms of probabilities already."""
        return -scores.gather(2, labels.long()[..., None]).squeeze(2).mean(1)


def _lstm(name: str, inputs: int, width: int) -> dict[str, Parameter]:
    """An LSTM's parameters, as torch.nn.LSTM draws them; rows: input, forget, candidate, output gate."""
    bound = 1 / math.sqrt(width)

    def initial(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return nn.init.uniform_(torch.empty(shape), -bound, bound, generator=generator)

    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (4 * width, inputs), "weight_hh": (4 * width, width)}
    shapes |= {"bias_ih": (4 * width,), "bias_hh": (4 * width,)}
    return {f"{name}.{part}": Parameter(shape, OWN, initial) for part, shape in shapes.items()}


def _step(net: Network, name: str, entering: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the LSTM ``name``: its input's part of the gates ``[..., 4 D]``, its states ``[..., D]``."""
    gates = entering + F.linear(h, net.own(f"{name}.weight_hh"), net.own(f"{name}.bias_hh"))
    enter, keep, candidate, leave = gates.chunk(4, -1)
    c = keep.sigmoid() * c + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * c.tanh(), c


def _states(net: Network, name: str, sequence: Tensor) -> Tensor:
    """The sum of both directions' states behind each element of ``[T, S, D]``, from zero."""
    directions = []
    for direction, is_back in ((name, False), (f"{name}.reverse", True)):
        entering = F.linear(sequence, net.own(f"{direction}.weight_ih"), net.own(f"{direction}.bias_ih"))
        h = c = torch.zeros_like(sequence[:, 0])
        states = []
        for gates in (entering.flip(1) if is_back else entering).unbind(1):
            h, c = _step(net, direction, gates, h, c)
            states.append(h)
        directions.append(torch.stack(states[::-1] if is_back else states, 1))
    return directions[0] + directions[1]


def _read(net: Network, queries: Tensor, supports: Tensor) -> Tensor:
    """Queries ``[T, Q, D]`` after as many readings of the supports ``[T, S, D]`` as there are supports."""
    weight = net.own("query_lstm.weight_ih")
    of_query, of_reading = weight.split(queries.shape[2], 1)
    fixed = F.linear(queries, of_query, net.own("query_lstm.bias_ih"))
    h, c = queries, torch.zeros_like(queries)
    for _ in range(supports.shape[1]):
        reading = torch.bmm(torch.bmm(h, supports.mT).softmax(2), supports)
        h, c = _step(net, "query_lstm", fixed + F.linear(reading, of_reading), h, c)
        h = h + queries
    return h


def _near_unit(x: Tensor) -> Tensor:
    """``x`` over its norm plus 1e-5."""
    return x / (x.norm(dim=2, keepdim=True) + 1e-5)
