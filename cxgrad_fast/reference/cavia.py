"""CAVIA (Zintgraf et al. 2019): the inner loop moves context parameters alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import conv_norm, head


def cavia(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    steps: int,
    context_learning_rate: float,
    context_dim: int,
    context_in: Sequence[bool],
    second_order: bool,
    slope: float = 0.0,
    **norm: Any,
) -> dict[str, Any]:
    """One task: ``nu <- nu - beta dL_S/dnu`` from zero in every step, then the query. Conv-4 with FiLM layers.

    Args:
        parameters: ``features.*``, ``head.*``, and of each block l with a context ``film.l.0.*`` (linear, to C
            scales, then C shifts), or ``film.l.0.*``, ReLU, ``film.l.2.*``. Requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        steps: of the inner loop.
        context_learning_rate: beta.
        context_dim: length of nu.
        context_in: for the four blocks and the head, whether nu acts there; at the head it joins the features.
        second_order: whether the inner gradients stay differentiable; without it, they are constants.
        slope: of the leaky ReLU, which comes after pooling and FiLM here.
        norm: keywords of :func:`cxgrad_fast.reference.network.conv_norm`.

    Returns:
        ``loss``; ``losses`` (supports, query); ``support_logits`` of each step; ``query_logits``; ``adapted``:
        ``context``.
    """

    def film(block: int, nu: Tensor) -> tuple[Tensor, Tensor]:
        values = parameters[f"film.{block}.0.weight"] @ nu + parameters[f"film.{block}.0.bias"]
        if f"film.{block}.2.weight" in parameters:
            values = parameters[f"film.{block}.2.weight"] @ torch.relu(values) + parameters[f"film.{block}.2.bias"]
        scale, shift = values[:, None, None].chunk(2)
        return scale, shift

    def logits_of(x: Tensor, nu: Tensor) -> Tensor:
        for block in range(4):
            x = F.max_pool2d(conv_norm(parameters, f"features.{block}", x, **norm), 2)
            if context_in[block]:
                scale, shift = film(block, nu)
                x = scale * x + shift
            x = F.leaky_relu(x, slope)
        z = x.flatten(1)
        return head(parameters, torch.cat([z, nu.expand(len(z), -1)], 1) if context_in[4] else z)

    nu = support_x.new_zeros(context_dim, requires_grad=True)
    losses, support_logits = [], []
    for _ in range(steps):
        support_logits.append(logits_of(support_x, nu))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        (gradient,) = torch.autograd.grad(losses[-1], nu, create_graph=second_order, retain_graph=True)
        nu = nu - context_learning_rate * gradient
    query_logits = logits_of(query_x, nu)
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": {"context": nu},
    }
