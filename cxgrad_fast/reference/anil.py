"""ANIL (Raghu et al. 2020): the inner loop moves the head alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features


def anil(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    learning_rate: float,
    second_order: bool,
    joint: bool = False,
    **network: Any,
) -> dict[str, Any]:
    """One task: features once, then ``(W, b) <- (W, b) - alpha dL_S/d(W, b)`` in every step, then the query.

    Args:
        parameters: ``features.*`` and ``head.*``, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop.
        learning_rate: alpha.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        joint: features of support and query in one pass, normalised together, as learn2learn's LightningANIL does.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (supports, query); ``support_logits`` of each step; ``query_logits``; ``adapted``: the
        head.
    """
    if joint:
        both = features(parameters, torch.cat([support_x, query_x]), **network)
        support_z, query_z = both[: len(support_x)], both[len(support_x) :]
    else:
        support_z, query_z = features(parameters, support_x, **network), features(parameters, query_x, **network)
    weight, bias = parameters["head.weight"], parameters["head.bias"]
    losses, support_logits = [], []
    for _ in range(steps):
        support_logits.append(F.linear(support_z, weight, bias))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        gradients = torch.autograd.grad(losses[-1], (weight, bias), create_graph=second_order, retain_graph=True)
        weight, bias = weight - learning_rate * gradients[0], bias - learning_rate * gradients[1]
    query_logits = F.linear(query_z, weight, bias)
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": {"head.weight": weight, "head.bias": bias},
    }
