"""Reptile (Nichol, Achiam, Schulman 2018): towards where a task's training ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import features, head

_OF_STEPS = ("learning_rate", "optimizer", "loss", "beta2", "adam_eps")  # the other settings are the network's


def reptile(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    batches: Tensor,
    moments: Mapping[str, Tensor],
    count: float,
    *,
    learning_rate: float,
    optimizer: str = "adam",
    loss: str = "sum",
    beta2: float = 0.999,
    adam_eps: float = 1e-8,
    **network: Any,
) -> dict[str, Any]:
    """One task: Adam without a first moment on each batch's cross-entropies, its second moments given.

    Adam's epsilon is added to the uncorrected root, as in TensorFlow.

    Args:
        parameters: ``features.*`` and ``head.*``, requiring gradients. All are adapted.
        x, y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        batches: ``[iterations, batch]``, places in ``x``.
        moments, count: Adam's second moments by name and number of steps so far; they go on from task to task.
        learning_rate, beta2, adam_eps: Adam's.
        optimizer: ``adam``, or ``sgd``: gradient descent, which leaves moments and count as they are.
        loss: ``sum`` or ``mean`` of a batch's cross-entropies, whose gradient is taken.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``losses``: the mean cross-entropy of each batch before its step; ``adapted``: all; ``moments`` and ``count``
        after.
    """
    theta, moments = dict(parameters), dict(moments)
    losses = []
    for batch in batches:
        cross_entropies = F.cross_entropy(head(theta, features(theta, x[batch], **network)), y[batch], reduction="none")
        losses.append(cross_entropies.mean().detach())
        goal = cross_entropies.sum() if loss == "sum" else cross_entropies.mean()
        gradients = torch.autograd.grad(goal, list(theta.values()))
        if optimizer == "sgd":
            for name, gradient in zip(theta, gradients, strict=True):
                theta[name] = (theta[name] - learning_rate * gradient).detach().requires_grad_()
            continue
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
    count: float,
    *,
    meta_rate: float,
    carried: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """All tasks in turn, each from ``parameters``: ``theta + meta_rate * mean(adapted - theta)``.

    Args:
        parameters, moments, count: as :func:`reptile`.
        support_x, support_y, batches: as there, with a first axis of tasks.
        meta_rate: of the step towards the adapted weights' mean.
        carried: whether moments and count go on from task to task; otherwise each task has those given.
        settings: keywords of :func:`reptile`.

    Returns:
        ``losses`` [T, iterations]; ``adapted``: name -> [T, ...]; ``parameters``, ``moments`` and ``count`` after.
    """
    tasks, start = [], (moments, count)
    for x, y, its in zip(support_x, support_y.long(), batches, strict=True):
        tasks.append(reptile(parameters, x, y, its, *((moments, count) if carried else start), **settings))
        moments, count = tasks[-1]["moments"], tasks[-1]["count"]
    adapted = {name: torch.stack([task["adapted"][name] for task in tasks]).detach() for name in parameters}
    moved = {
        name: theta.detach() + meta_rate * (adapted[name] - theta.detach()).mean(0)
        for name, theta in parameters.items()
    }
    losses = torch.tensor([[loss.item() for loss in task["losses"]] for task in tasks], dtype=support_x.dtype)
    return {"losses": losses, "adapted": adapted, "parameters": moved, "moments": moments, "count": count}


def meta_loss(
    parameters: Mapping[str, Tensor],
    episodes: Any,
    batches: Tensor,
    moments: Mapping[str, Tensor],
    count: float,
    *,
    reduction: str,
    carried: bool,
    **settings: Any,
) -> dict[str, Any]:
    """The query losses of the adapted weights; their gradient is Reptile's, ``theta - adapted``, summed or averaged.

    Args:
        parameters, batches, moments, count, carried, settings: as :func:`meta_step`.
        episodes: any object with the fields of :class:`cxgrad_fast.Episodes`.
        reduction: of the tasks' losses, ``mean`` or ``sum``.

    Returns:
        ``loss``; ``losses`` [T, iterations]; ``query_losses`` [T]; ``query_logits`` [T, Q, N].
    """
    sets = (episodes.support_x, episodes.support_y, batches)
    found = meta_step(parameters, *sets, moments, count, meta_rate=1.0, carried=carried, **settings)
    network = {name: value for name, value in settings.items() if name not in _OF_STEPS}
    logits, slope = [], torch.zeros((), dtype=episodes.query_x.dtype)
    for task, x in enumerate(episodes.query_x):
        adapted = {name: tensor[task] for name, tensor in found["adapted"].items()}
        logits.append(head(adapted, features(adapted, x, **network)))
        for name, theta in parameters.items():
            slope = slope + (theta * (theta.detach() - adapted[name])).sum()
    losses = torch.stack([F.cross_entropy(z, y.long()) for z, y in zip(logits, episodes.query_y, strict=True)])
    total = losses.sum() + slope - slope.detach()
    loss = total / len(losses) if reduction == "mean" else total
    return {"loss": loss, "losses": found["losses"], "query_losses": losses, "query_logits": torch.stack(logits)}
