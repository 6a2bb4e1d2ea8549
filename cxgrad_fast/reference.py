"""The oracle: Algorithms 1 and 2 of the paper, literally, one task at a time, in plain torch.

Nothing here is shared with what it judges (only ``config`` is imported) and nothing is ever optimised. Parameters go
by the names of ``Learner.meta_parameters``; episodes are any object with ``support_x``, ``support_y``, ``query_x``,
``query_y`` as :class:`cxgrad_fast.Episodes` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.config import Config, ModelConfig


class _Episodes(Protocol):
    @property
    def support_x(self) -> Tensor: ...
    @property
    def support_y(self) -> Tensor: ...
    @property
    def query_x(self) -> Tensor: ...
    @property
    def query_y(self) -> Tensor: ...


class ReferenceLoss(NamedTuple):
    """As :class:`cxgrad_fast.engine.MetaLoss`; ``loss`` is differentiable in the parameters."""

    loss: Tensor
    query_logits: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracy: Tensor


def meta_loss(config: Config, parameters: Mapping[str, Tensor], episodes: _Episodes) -> ReferenceLoss:
    """Algorithm 1, lines 4-17 and the loss of line 18.

    Args:
        config: reads ``model``, ``inner`` (all but ``form``: this is the scaled one) and ``outer.reduction``.
        parameters: theta and phi by name, requiring gradients.
        episodes: ``T`` tasks.
    """
    losses, logits, traces = [], [], []
    for task in range(len(episodes.support_x)):
        support = (episodes.support_x[task], episodes.support_y[task].long())
        theta, trace = adapt(config, parameters, *support)
        logits.append(network(config.model, theta, episodes.query_x[task]))
        losses.append(F.cross_entropy(logits[-1], episodes.query_y[task].long()))
        traces.append(torch.stack(trace) if trace else losses[-1].new_zeros(0))
    query_losses = torch.stack(losses)
    correct = torch.stack(logits).argmax(2) == episodes.query_y
    return ReferenceLoss(
        loss=query_losses.mean() if config.outer.reduction == "mean" else query_losses.sum(),
        query_logits=torch.stack(logits),
        support_losses=torch.stack(traces).detach(),
        query_losses=query_losses,
        accuracy=correct.to(query_losses.dtype).mean(),
    )


def adapt(
    config: Config, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The inner loop of one task: theta after all steps, and the support loss of every pass.

    Args:
        x: support images ``[S, C, H, W]``.
        y: labels ``[S]``.
    """
    inner = config.inner
    second_order = inner.order == 2
    theta = dict(parameters)
    moved = [name for name in theta if not name.startswith("scaler") and ".norm." not in name]
    trace: list[Tensor] = []

    def loss_of(weights: Mapping[str, Tensor]) -> Tensor:
        loss = F.cross_entropy(network(config.model, weights, x), y)
        trace.append(loss)
        return loss

    def first_context() -> Tensor:
        """Lines 6-10: nu = 0, theta' = IGS(theta, nu), nu <- nu - beta * dL(theta')/dnu."""
        nu = x.new_zeros(inner.context_dim, requires_grad=True)
        keep = second_order and inner.initial_context_order == 2
        loss = loss_of(implicit_gradient_scaling(config, theta, nu))
        (gradient,) = torch.autograd.grad(loss, nu, create_graph=keep, retain_graph=True)
        return nu - inner.context_learning_rate * gradient

    contextual = inner.algorithm == "cxgrad"
    nu = first_context() if contextual and inner.context_update == "task" else None
    for _ in range(inner.steps):
        if contextual:
            if inner.context_update == "step":
                nu = first_context()
            assert nu is not None
            theta = implicit_gradient_scaling(config, theta, nu)  # line 12
        # line 13's gradients are partial: where nu came from theta itself, they do not run through nu
        theta = {name: weight.clone() for name, weight in theta.items()}
        loss = loss_of(theta)
        wanted = [theta[name] for name in moved] + ([nu] if nu is not None else [])
        gradients = torch.autograd.grad(loss, wanted, create_graph=second_order, retain_graph=True)  # line 13
        for name, gradient in zip(moved, gradients, strict=False):  # line 14
            theta[name] = theta[name] - inner.learning_rate * gradient
        if nu is not None:
            nu = nu - inner.context_learning_rate * gradients[-1]
    return theta, trace


def implicit_gradient_scaling(config: Config, theta: Mapping[str, Tensor], nu: Tensor) -> dict[str, Tensor]:
    """Algorithm 2: ``w_l <- gamma_l * w_l / |w_l|`` for every convolution but point-wise shortcuts."""
    hidden = torch.relu(theta["scaler.0.weight"] @ nu + theta["scaler.0.bias"])
    gammas = F.softplus(theta["scaler.2.weight"] @ hidden + theta["scaler.2.bias"])
    scaled = dict(theta)
    backbone = [name for name in theta if name.startswith("features") and theta[name].shape[2:] == (3, 3)]
    for gamma, name in zip(gammas, backbone, strict=True):
        scaled[name] = gamma * theta[name] / theta[name].norm()
    return scaled


def network(model: ModelConfig, theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Images ``[S, C, H, W]`` -> logits ``[S, N]``."""

    def conv_norm(name: str, x: Tensor) -> Tensor:
        weight = theta[f"{name}.weight"]
        y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
        scale, bias = theta[f"{name}.norm.weight"], theta[f"{name}.norm.bias"]
        if model.norm == "batch":
            return F.batch_norm(y, None, None, scale, bias, training=True, eps=model.norm_eps)
        groups = model.norm_groups if model.norm == "group" else 1
        return F.group_norm(y, groups, scale, bias, eps=model.norm_eps)

    for block in range(4):
        if model.backbone == "conv4":
            x = F.max_pool2d(F.leaky_relu(conv_norm(f"features.{block}", x), model.slope), 2)
            continue
        shortcut = conv_norm(f"features.{block}.shortcut", x)
        x = F.leaky_relu(conv_norm(f"features.{block}.0", x), model.slope)
        x = F.leaky_relu(conv_norm(f"features.{block}.1", x), model.slope)
        x = F.leaky_relu(conv_norm(f"features.{block}.2", x) + shortcut, model.slope)
        if block < 3 or model.pool_last:
            x = F.max_pool2d(x, 2, padding=model.pool_padding[block])
    features = x.flatten(1) if model.backbone == "conv4" else x.mean((2, 3))
    return F.linear(features, theta["head.weight"], theta["head.bias"])
