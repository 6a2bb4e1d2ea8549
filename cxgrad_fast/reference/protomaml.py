"""ProtoMAML (Triantafillou et al. 2020): MAML whose head starts from the prototypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def protomaml(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    ways: int,
    steps: int,
    learning_rate: float,
    second_order: bool,
    **network: Any,
) -> dict[str, Any]:
    """One task: W_k = 2 P_k, b_k = -|P_k|^2; then S steps theta <- theta - alpha dL_S/dtheta, head included; the query.

    Args:
        parameters: ``features.*``, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        ways: classes of the task.
        steps, learning_rate: of the inner loop.
        second_order: whether the inner gradients are differentiated; the prototypes always are.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (S supports, query); ``query_logits``; ``adapted``.
    """
    norms = {name: tensor for name, tensor in parameters.items() if ".norm." in name}
    theta = {name: tensor for name, tensor in parameters.items() if name not in norms}
    z = features({**norms, **theta}, support_x, **network)
    prototypes = torch.stack([z[support_y == label].mean(0) for label in range(ways)])
    theta["head.weight"], theta["head.bias"] = 2 * prototypes, -prototypes.square().sum(1)
    losses = []
    for _ in range(steps):
        points = {name: tensor.clone() for name, tensor in theta.items()}  # partial derivatives: P_k comes from others
        weights = {**norms, **points}
        losses.append(F.cross_entropy(head(weights, features(weights, support_x, **network)), support_y))
        gradients = torch.autograd.grad(losses[-1], list(points.values()), create_graph=second_order)
        for (name, tensor), gradient in zip(theta.items(), gradients, strict=True):
            theta[name] = tensor - learning_rate * gradient
    weights = {**norms, **theta}
    query_logits = head(weights, features(weights, query_x, **network))
    loss = F.cross_entropy(query_logits, query_y)
    return {"loss": loss, "losses": [*losses, loss], "query_logits": query_logits, "adapted": theta}
