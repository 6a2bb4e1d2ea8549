"""One meta-training step as a user of ``torch.func`` writes it: one task as a function, ``vmap`` over tasks.

Weights are scaled outright (the scaled form), as in the released program; nothing here is taken from the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from side import why_not_plain
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from cxgrad_fast import Config, Episodes
from cxgrad_fast.config import ModelConfig

DEPTH = 4
Parameters = dict[str, Tensor]


def limits(config: Config) -> str:
    """Why the step written here cannot serve a config; empty where it can. The JAX peer has the same limits."""
    inner = config.inner
    if reason := why_not_plain(config.model):
        return reason
    if inner.algorithm == "cxgrad" and inner.context_update != "task":
        return "written for inner.context_update = task"
    return ""


def loss_and_gradients(config: Config) -> Callable[[Parameters, Episodes], tuple[Parameters, Tensor]]:
    """``(parameters, episodes) -> (gradients, loss)``, a mean (or sum) over the tasks of Algorithm 1's query loss."""

    def meta_loss(parameters: Parameters, episodes: Episodes) -> Tensor:
        def one(*sets: Tensor) -> Tensor:
            return task_loss(config, parameters, *sets)

        losses = vmap(one)(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        return losses.mean() if config.outer.reduction == "mean" else losses.sum()

    return grad_and_value(meta_loss)


def task_loss(
    config: Config, meta: Parameters, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
) -> Tensor:
    """Query loss of one task after its inner loop: images ``[S, C, H, W]``, labels ``[S]``."""
    inner, model = config.inner, config.model
    names = [name for name in meta if ".norm." not in name and not name.startswith("scaler")]
    fast = {name: meta[name] for name in names}

    def loss(weights: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(model, meta | weights, x), y)

    def at(context: Tensor, moves: Parameters) -> tuple[Tensor, Parameters]:
        weights = scaled(meta, fast, context)
        return loss({name: weights[name] + moves[name] for name in names}, support_x, support_y), weights

    def keep(gradient: Tensor, order: int) -> Tensor:
        return gradient if order == 2 else gradient.detach()

    still = {name: torch.zeros_like(meta[name]) for name in names}
    if inner.algorithm == "cxgrad":
        context = support_x.new_zeros(inner.context_dim)
        first, _ = grad(at, has_aux=True)(context, still)
        order = min(inner.order, inner.initial_context_order)
        context = context - inner.context_learning_rate * keep(first, order)
    for _ in range(inner.steps):
        if inner.algorithm == "cxgrad":
            (turn, found), fast = grad(at, argnums=(0, 1), has_aux=True)(context, still)
            context = context - inner.context_learning_rate * keep(turn, inner.order)
        else:
            found = grad(loss)(fast, support_x, support_y)
        fast = {name: fast[name] - inner.learning_rate * keep(found[name], inner.order) for name in names}
    return loss(fast, query_x, query_y)


def scaled(meta: Parameters, weights: Parameters, context: Tensor) -> Parameters:
    """Implicit gradient scaling (Algorithm 2) of the convolutions; the head as it is."""
    hidden = F.relu(F.linear(context, meta["scaler.0.weight"], meta["scaler.0.bias"]))
    gammas = F.softplus(F.linear(hidden, meta["scaler.2.weight"], meta["scaler.2.bias"]))
    names = [f"features.{layer}.weight" for layer in range(DEPTH)]
    return weights | {name: gammas[i] * weights[name] / weights[name].norm() for i, name in enumerate(names)}


def network(model: ModelConfig, p: dict[str, Any], x: Tensor) -> Tensor:
    """Conv-4: ``[S, C, H, W]`` -> ``[S, N]``.

    Batch norm in elementary operations: under vmap and two gradients it took 0.85 of the time of ``F.batch_norm``.
    """
    for layer in range(DEPTH):
        x = F.conv2d(x, p[f"features.{layer}.weight"], padding=1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = centred.square().mean((0, 2, 3), keepdim=True)
        scale, bias = (p[f"features.{layer}.norm.{part}"][:, None, None] for part in ("weight", "bias"))
        x = centred * torch.rsqrt(variance + model.norm_eps) * scale + bias
        x = F.leaky_relu(F.max_pool2d(x, 2), model.slope)
    return F.linear(x.flatten(1), p["head.weight"], p["head.bias"])
