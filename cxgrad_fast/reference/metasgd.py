"""Meta-SGD (Li, Zhou, Chen, Li 2017): a meta-learned rate for every element of every parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def metasgd(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    second_order: bool,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta <- theta - rate * dL_S/dtheta``, element by element, norms included; then the query.

    Args:
        parameters: ``features.*``, ``head.*``, and ``rates.NAME`` of the shape of each of them, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop; all have the same rates.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (supports, query); ``support_logits`` of each step; ``query_logits``; ``adapted``: all but
        the rates.
    """
    theta = {name: tensor for name, tensor in parameters.items() if not name.startswith("rates.")}
    losses, support_logits = [], []
    for _ in range(steps):
        support_logits.append(head(theta, features(theta, support_x, **network)))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        gradients = torch.autograd.grad(losses[-1], list(theta.values()), create_graph=second_order)
        for name, gradient in zip(theta, gradients, strict=True):
            theta[name] = theta[name] - parameters[f"rates.{name}"] * gradient
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": theta,
    }
