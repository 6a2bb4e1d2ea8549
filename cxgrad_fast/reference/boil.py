"""BOIL (Oh et al. 2021): the inner loop moves the body; the head waits for the outer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def boil(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    learning_rate: float,
    head_learning_rate: float,
    second_order: bool,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta <- theta - alpha dL_S/dtheta`` for the body, norms included, in every step; then the query.

    Args:
        parameters: ``features.*`` and ``head.*``, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop; the released program has one.
        learning_rate: alpha of the body (the program's ``extractor_step_size``).
        head_learning_rate: of the head (``classifier_step_size``): 0 in BOIL, alpha in the program's MAML.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (supports, query); ``support_logits`` of each step; ``query_logits``; ``adapted``: all.
    """
    theta = dict(parameters)
    losses, support_logits = [], []
    for _ in range(steps):
        support_logits.append(head(theta, features(theta, support_x, **network)))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        gradients = torch.autograd.grad(losses[-1], list(theta.values()), create_graph=second_order)
        for name, gradient in zip(theta, gradients, strict=True):
            rate = head_learning_rate if name.startswith("head.") else learning_rate
            theta[name] = theta[name] - rate * gradient
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": theta,
    }
