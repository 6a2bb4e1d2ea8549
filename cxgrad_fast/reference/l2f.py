"""L2F (Baik, Hong, Lee 2020): a task attenuates the initial weights before its inner loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def l2f(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    learning_rate: float,
    second_order: bool,
    embedding_in_graph: bool = False,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta_0 <- gamma * theta_0``, one factor a tensor, from the means of its gradients; then as MAML.

    Args:
        parameters: ``features.*``, ``head.*`` and ``attenuator.*`` (linear, ReLU, linear, sigmoid), requiring
            gradients. The order of the adapted tensors is that of the attenuator's inputs and outputs.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop.
        learning_rate: alpha.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        embedding_in_graph: whether the embedding is differentiated (in the ALFA program's copy) or a constant (L2F's
            own).
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (embedding pass, supports, query); ``embedding_logits``; ``embedding`` and
        ``attenuation`` [L]; ``support_logits`` of each step; ``query_logits``; ``adapted``.
    """
    theta = dict(parameters)
    moved = [name for name in theta if name.startswith(("features.", "head.")) and ".norm." not in name]
    embedding_logits = head(theta, features(theta, support_x, **network))
    losses, support_logits = [F.cross_entropy(embedding_logits, support_y)], []
    gradients = torch.autograd.grad(losses[0], [theta[name] for name in moved], create_graph=embedding_in_graph)
    embedding = torch.stack([gradient.mean() for gradient in gradients])
    hidden = torch.relu(theta["attenuator.0.weight"] @ embedding + theta["attenuator.0.bias"])
    attenuation = torch.sigmoid(theta["attenuator.2.weight"] @ hidden + theta["attenuator.2.bias"])
    for name, gamma in zip(moved, attenuation, strict=True):
        theta[name] = gamma * theta[name]
    for _ in range(steps):
        support_logits.append(head(theta, features(theta, support_x, **network)))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        wanted = [theta[name] for name in moved]
        gradients = torch.autograd.grad(losses[-1], wanted, create_graph=second_order, retain_graph=True)
        for name, gradient in zip(moved, gradients, strict=True):
            theta[name] = theta[name] - learning_rate * gradient
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "embedding_logits": embedding_logits,
        "embedding": embedding,
        "attenuation": attenuation,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": {name: theta[name] for name in moved},
    }
