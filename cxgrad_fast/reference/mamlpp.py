"""MAML++ (Antoniou, Edwards, Storkey 2019): a rate a tensor and step, norms a step, and a loss of every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import Statistics, features, head


def mamlpp(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    second_order: bool,
    query_weights: Sequence[float] | None,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta <- theta - rate_s dL_S/dtheta`` with norm row s; the query under the row of the step before it.

    Args:
        parameters: ``features.*`` with norms ``[steps, C]``, ``head.*``, and ``rates.NAME`` [steps + 1] of every
            adapted tensor, whose last entry is never used; requiring gradients. Norms are meta-learned only.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop, at least one.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        query_weights: of the query loss after each step (:func:`step_weights`); None asks the query after the last
            only.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (support, query, support, query, ...; without weights the supports, then the query);
        ``support_logits`` and ``step_query_logits`` of each step; ``query_logits``; ``adapted``; ``passes``: for each
        step, the statistics of its passes.
    """
    theta = dict(parameters)
    moved = [name.removeprefix("rates.") for name in parameters if name.startswith("rates.")]
    passes: list[list[dict[str, Statistics]]] = [[] for _ in range(steps)]

    def logits_of(step: int, x: Tensor) -> Tensor:
        row = {name: tensor[step] if ".norm." in name else tensor for name, tensor in theta.items()}
        passes[step].append({})
        return head(row, features(row, x, found=passes[step][-1], **network))

    losses, support_logits, query_logits = [], [], []
    loss = support_x.new_zeros(())
    for step in range(steps):
        support_logits.append(logits_of(step, support_x))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        gradients = torch.autograd.grad(losses[-1], [theta[name] for name in moved], create_graph=second_order)
        for name, gradient in zip(moved, gradients, strict=True):
            theta[name] = theta[name] - parameters[f"rates.{name}"][step] * gradient
        if query_weights is not None or step == steps - 1:
            query_logits.append(logits_of(step, query_x))
            losses.append(F.cross_entropy(query_logits[-1], query_y))
            loss = loss + (1.0 if query_weights is None else query_weights[step]) * losses[-1]
    return {
        "loss": loss,
        "losses": losses,
        "support_logits": support_logits,
        "step_query_logits": query_logits,
        "query_logits": query_logits[-1],
        "adapted": {name: theta[name] for name in moved},
        "passes": passes,
    }


def step_weights(steps: int, epoch: int, epochs: float) -> list[float]:
    """Of the query losses in an epoch from 0 on: equal at first, then less and less before the last, in ``epochs``.

    The released program goes on computing them after that, and no longer applies them.
    """
    early = max(1 / steps - epoch / (steps * epochs), 0.03 / steps)
    last = min(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - 0.03 * (steps - 1) / steps)
    return [early] * (steps - 1) + [last]
