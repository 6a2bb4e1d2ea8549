"""Reptile (Nichol, Achiam, Schulman 2018): towards where a task's training ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import conv_norm, head


def reptile(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    batches: Tensor,
    moments: Mapping[str, Tensor],
    count: int,
    *,
    learning_rate: float,
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    slope: float = 0.0,
    **norm: Any,
) -> dict[str, Any]:
    """One task: Adam without a first moment on the sum of each batch's cross-entropies, its second moments given.

    Adam's epsilon is added to the uncorrected root, as in TensorFlow. Conv-4 whose pools keep the last odd row and
    column and come before the activation; features are flattened (H, W, C).

    Args:
        parameters: ``features.*`` and ``head.*``, requiring gradients. All are adapted.
        x, y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        batches: ``[iterations, batch]``, places in ``x``.
        moments, count: Adam's second moments by name and number of steps so far; they go on from task to task.
        learning_rate, beta2, adam_eps: Adam's.
        slope: of the leaky ReLU.
        norm: keywords of :func:`cxgrad_fast.reference.network.conv_norm`.

    Returns:
        ``losses``: the mean cross-entropy of each batch before its step; ``adapted``: all; ``moments`` and ``count``
        after.
    """
    theta, moments = dict(parameters), dict(moments)
    losses = []
    for batch in batches:
        z = x[batch]
        for block in range(4):
            z = F.max_pool2d(conv_norm(theta, f"features.{block}", z, **norm), 2, ceil_mode=True)
            z = F.leaky_relu(z, slope)
        cross_entropies = F.cross_entropy(head(theta, z.permute(0, 2, 3, 1).flatten(1)), y[batch], reduction="none")
        losses.append(cross_entropies.mean().detach())
        gradients = torch.autograd.grad(cross_entropies.sum(), list(theta.values()))
        count += 1
        for name, gradient in zip(theta, gradients, strict=True):
            moments[name] = beta2 * moments[name] + (1 - beta2) * gradient.square()
            step = learning_rate * (1 - beta2**count) ** 0.5 * gradient / (moments[name].sqrt() + adam_eps)
            theta[name] = (theta[name] - step).detach().requires_grad_()
    return {"losses": losses, "adapted": theta, "moments": moments, "count": count}


def meta_step(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    batches: Tensor,
    moments: Mapping[str, Tensor],
    count: int,
    *,
    meta_rate: float,
    **settings: Any,
) -> dict[str, Any]:
    """All tasks in turn, each from ``parameters``: ``theta + meta_rate * mean(adapted - theta)``.

    Args:
        parameters, moments, count: as :func:`reptile`.
        support_x, support_y, batches: as there, with a first axis of tasks.
        meta_rate: of the step towards the adapted weights' mean.
        settings: keywords of :func:`reptile`.

    Returns:
        ``losses`` [T, iterations]; ``adapted``: name -> [T, ...]; ``parameters``, ``moments`` and ``count`` after.
    """
    tasks = []
    for x, y, its in zip(support_x, support_y.long(), batches, strict=True):
        tasks.append(reptile(parameters, x, y, its, moments, count, **settings))
        moments, count = tasks[-1]["moments"], tasks[-1]["count"]
    adapted = {name: torch.stack([task["adapted"][name] for task in tasks]).detach() for name in parameters}
    moved = {
        name: theta.detach() + meta_rate * (adapted[name] - theta.detach()).mean(0)
        for name, theta in parameters.items()
    }
    losses = torch.stack([torch.stack(task["losses"]) for task in tasks])
    return {"losses": losses, "adapted": adapted, "parameters": moved, "moments": moments, "count": count}
