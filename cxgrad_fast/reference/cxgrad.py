"""CxGrad (Lee, Lee, Song 2022), Algorithms 1 and 2 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def cxgrad(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    learning_rate: float,
    second_order: bool,
    context_dim: int,
    context_learning_rate: float,
    context_update: str = "task",
    initial_context_order: int = 1,
    **network: Any,
) -> dict[str, Any]:
    """One task: Algorithm 1, lines 5-17.

    Args:
        parameters: theta (``features.*``, ``head.*``) and phi (``scaler.*``), requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop.
        learning_rate: alpha.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        context_dim: length of nu.
        context_learning_rate: beta.
        context_update: ``task``: nu goes on from step to step; ``step``: it starts from zero in every step.
        initial_context_order: 2 keeps the gradient that first moves nu differentiable; the released program has 1.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (passes on the support set, query); ``query_logits``; ``adapted``; ``context``: the last
        nu.
    """
    theta = dict(parameters)
    moved = [name for name in theta if name.startswith(("features.", "head.")) and ".norm." not in name]
    losses: list[Tensor] = []

    def loss_of(weights: Mapping[str, Tensor]) -> Tensor:
        losses.append(F.cross_entropy(head(weights, features(weights, support_x, **network)), support_y))
        return losses[-1]

    def first_context() -> Tensor:
        """Lines 6-10: nu = 0, theta' = IGS(theta, nu), nu <- nu - beta * dL(theta')/dnu."""
        nu = support_x.new_zeros(context_dim, requires_grad=True)
        keep = second_order and initial_context_order == 2
        loss = loss_of(implicit_gradient_scaling(theta, nu))
        (gradient,) = torch.autograd.grad(loss, nu, create_graph=keep, retain_graph=True)
        return nu - context_learning_rate * gradient

    nu = first_context() if context_update == "task" else support_x.new_zeros(context_dim)
    for _ in range(steps):
        if context_update == "step":
            nu = first_context()
        theta = implicit_gradient_scaling(theta, nu)  # line 12
        # line 13's gradients are partial: where nu came from theta itself, they do not run through nu
        theta = {name: weight.clone() for name, weight in theta.items()}
        wanted = [*(theta[name] for name in moved), nu]
        gradients = torch.autograd.grad(loss_of(theta), wanted, create_graph=second_order, retain_graph=True)  # line 13
        for name, gradient in zip(moved, gradients[:-1], strict=True):  # line 14
            theta[name] = theta[name] - learning_rate * gradient
        nu = nu - context_learning_rate * gradients[-1]
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    adapted = {name: theta[name] for name in moved}
    return {"loss": losses[-1], "losses": losses, "query_logits": query_logits, "adapted": adapted, "context": nu}


def implicit_gradient_scaling(theta: Mapping[str, Tensor], nu: Tensor) -> dict[str, Tensor]:
    """Algorithm 2: ``w_l <- gamma_l * w_l / |w_l|`` for every convolution but point-wise shortcuts."""
    hidden = torch.relu(theta["scaler.0.weight"] @ nu + theta["scaler.0.bias"])
    gammas = F.softplus(theta["scaler.2.weight"] @ hidden + theta["scaler.2.bias"])
    scaled = dict(theta)
    backbone = [name for name in theta if name.startswith("features.") and theta[name].shape[2:] == (3, 3)]
    for gamma, name in zip(gammas, backbone, strict=True):
        scaled[name] = gamma * theta[name] / theta[name].norm()
    return scaled
