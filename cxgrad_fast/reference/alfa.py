"""ALFA (Baik, Choi, Choi, Kim, Lee 2020): a generated rate and decay for every tensor in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def alfa(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    second_order: bool,
    conditioning_in_graph: bool = False,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta <- (1 - beta B_s) theta - alpha A_s dL_S/dtheta`` in every step, then the query.

    ``(alpha, beta) = G(tau)``, where tau is the means of all adapted tensors, then those of their gradients.

    Args:
        parameters: ``features.*`` and ``head.*``; ``rates.NAME`` (A) and ``decays.NAME`` (B) [steps + 1] of every
            adapted tensor, whose last entry is never used; ``generator.*`` (G: linear, ReLU, linear); from random
            initialisation also ``decay_elements.NAME`` (D) of the tensor's shape, which multiplies ``beta B_s``.
            Requiring gradients. The order of the adapted tensors is that of G's inputs and outputs.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop.
        second_order: whether the gradient in the update stays differentiable; without it, it is a constant.
        conditioning_in_graph: whether the gradient means in tau stay differentiable too; not in the released program.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (supports, query); ``support_logits``, ``generator_input`` and ``generator_output`` [2L]
        of each step; ``query_logits``; ``adapted``.
    """
    theta = dict(parameters)
    moved = [name for name in theta if name.startswith(("features.", "head.")) and ".norm." not in name]
    losses, support_logits, inputs, outputs = [], [], [], []
    for step in range(steps):
        support_logits.append(head(theta, features(theta, support_x, **network)))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        wanted = [theta[name] for name in moved]
        gradients = torch.autograd.grad(losses[-1], wanted, create_graph=second_order, retain_graph=True)
        seen = gradients if conditioning_in_graph else [gradient.detach() for gradient in gradients]
        inputs.append(torch.stack([tensor.mean() for tensor in (*wanted, *seen)]))
        hidden = torch.relu(theta["generator.0.weight"] @ inputs[-1] + theta["generator.0.bias"])
        outputs.append(theta["generator.2.weight"] @ hidden + theta["generator.2.bias"])
        alphas, betas = outputs[-1][: len(moved)], outputs[-1][len(moved) :]
        for name, gradient, alpha, beta in zip(moved, gradients, alphas, betas, strict=True):
            decay = beta * parameters[f"decays.{name}"][step] * parameters.get(f"decay_elements.{name}", 1.0)
            theta[name] = (1 - decay) * theta[name] - alpha * parameters[f"rates.{name}"][step] * gradient
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "generator_input": inputs,
        "generator_output": outputs,
        "query_logits": query_logits,
        "adapted": {name: theta[name] for name in moved},
    }
