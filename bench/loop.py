"""The side ``loop``: the per-task loop that released programs are, for every algorithm that the oracle has.

It is the oracle's functions, one task after the other through autograd, on torch's own norms: the oracle writes its
norms out, which makes a loop 1.2 times slower than the one that a researcher writes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.nn.functional as F
from side import Parameters, Side, TorchSide, backward
from torch import Tensor

from cxgrad_fast import Config, Episodes, reference
from cxgrad_fast.reference import network


def build(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    """The side."""

    def find(leaves: dict[str, Tensor], episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        with torchs_norms():
            return backward(reference.meta_loss(config, leaves, episodes).loss, leaves)

    return TorchSide(find, config, episodes, parameters)


@contextmanager
def torchs_norms() -> Iterator[None]:
    """In it the oracle's convolutions have torch's own norms, in whichever of its files they are called."""
    prefix = reference.__name__
    users = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    with ExitStack() as stack:
        for module in users:
            if getattr(module, "conv_norm", None) is network.conv_norm and module is not network:
                stack.enter_context(mock.patch.object(module, "conv_norm", _conv_norm))
        stack.enter_context(mock.patch.object(network, "conv_norm", _conv_norm))  # last: it is what others are told by
        yield


def _conv_norm(
    theta: Parameters,
    name: str,
    x: Tensor,
    *,
    eps: float,
    norm: str = "batch",
    norm_groups: int = 1,
    padding: int | None = None,
    given: None = None,
    found: Any = None,
) -> Tensor:
    """As :func:`cxgrad_fast.reference.network.conv_norm` where no statistics are given; ``found`` stays as it is."""
    weight, scale, shift = (theta[f"{name}.{part}"] for part in ("weight", "norm.weight", "norm.bias"))
    y = F.conv2d(x, weight, theta.get(f"{name}.bias"), padding=weight.shape[2] // 2 if padding is None else padding)
    if norm == "batch":
        return F.batch_norm(y, None, None, scale, shift, training=True, eps=eps)
    return F.group_norm(y, norm_groups if norm == "group" else 1, scale, shift, eps)
