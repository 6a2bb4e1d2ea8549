"""ModGrad (Simon, Koniusz, Nock, Harandi 2020): the gradient, taken once, under masks that a context generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head


def modgrad(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    rounds: int,
    learning_rate: float,
    context_dim: int,
    layers: Sequence[str],
    second_order: bool,
    mixtures: int = 5,
    added: bool = False,
    **network: Any,
) -> dict[str, Any]:
    """One task: ``theta' = theta - alpha g * M(nu)``, ``nu = -dL_S(theta')/dnu`` in every round; then the query.

    Args:
        parameters: ``features.*``, ``head.*`` and ``masks.LAYER.{u,v,bias}.*``, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        rounds: how often theta' is made; twice the program's ``inner_step``. The last context is not used.
        learning_rate: alpha.
        context_dim: length of nu.
        layers: convolutions whose weight and, where there is one, bias are adapted; all else is used as it is.
        second_order: whether the gradients stay differentiable; without it, they are constants.
        mixtures: parts that a mask is the weighted sum of.
        added: the new context is added to the old one; the released program sets it.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (support at theta, support of each round, query); ``support_logits`` alike;
        ``query_logits``; ``adapted``.
    """
    parts = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    moved = [name for name in parts if name in parameters]
    support_logits = [head(parameters, features(parameters, support_x, **network))]
    losses = [F.cross_entropy(support_logits[-1], support_y)]
    gradients = torch.autograd.grad(losses[-1], [parameters[name] for name in moved], create_graph=second_order)
    nu = support_x.new_zeros(context_dim, requires_grad=True)
    theta = dict(parameters)
    for each in range(rounds):
        for name, gradient in zip(moved, gradients, strict=True):
            mask = _mask(parameters, name, nu, mixtures).reshape(gradient.shape)
            theta[name] = parameters[name] - learning_rate * gradient * mask
        support_logits.append(head(theta, features(theta, support_x, **network)))
        losses.append(F.cross_entropy(support_logits[-1], support_y))
        if each < rounds - 1:
            (turn,) = torch.autograd.grad(losses[-1], nu, create_graph=second_order, retain_graph=True)
            nu = (nu - turn if added else -turn).requires_grad_()
    query_logits = head(theta, features(theta, query_x, **network))
    losses.append(F.cross_entropy(query_logits, query_y))
    return {
        "loss": losses[-1],
        "losses": losses,
        "support_logits": support_logits,
        "query_logits": query_logits,
        "adapted": {name: theta[name] for name in moved},
    }


def _mask(parameters: Mapping[str, Tensor], name: str, nu: Tensor, mixtures: int) -> Tensor:
    """Of a weight: relu(u v^T), 3C x 3C, to be read row by row as [C, C, 3, 3]; of a bias: relu(b), C."""
    layer, part = name.rsplit(".", 1)

    def mixed(net: str) -> Tensor:
        net = f"masks.{layer.removeprefix('features.')}.{net}"
        hidden = torch.relu(parameters[f"{net}.0.weight"] @ nu + parameters[f"{net}.0.bias"])
        output = parameters[f"{net}.2.weight"] @ hidden + parameters[f"{net}.2.bias"]
        return torch.softmax(output[:mixtures], 0) @ output[mixtures:].reshape(mixtures, -1)

    return torch.relu(mixed("bias") if part == "bias" else torch.outer(mixed("u"), mixed("v")))
