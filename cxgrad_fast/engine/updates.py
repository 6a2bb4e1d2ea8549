"""From the meta-gradient to the meta-update: the optimizer, the schedule of its rate, clipping, its restarts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxgrad_fast.config.groups import OuterConfig

# what a group of parameters is trained with, of the optimizers' own names, which a state says and takes back
HYPERPARAMETERS = {"adam": ("lr", "betas", "eps", "weight_decay"), "sgd": ("lr", "weight_decay")}


def build_optimizer(
    outer: OuterConfig, trained: Sequence[Tensor], device: torch.device, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that ``outer.optimizer`` names, over the parameters ``trained``.

    Args:
        outer: the settings.
        trained: the parameters.
        device: theirs; the form that a CUDA graph can hold is chosen there.
        fused: that form on any device.
    """
    is_cuda = device.type == "cuda"
    how: dict[str, Any] = {"fused": True} if fused or is_cuda else {}
    rate = float(np.float32(outer.learning_rate)) if how else outer.learning_rate  # there it is read as a float32
    if outer.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=rate, **how)
    if is_cuda:
        how["capturable"] = True
    return torch.optim.Adam(trained, lr=rate, **how)


def learning_rate(outer: OuterConfig, iteration: int | None) -> float:
    """The outer learning rate of an iteration, counted from 0; None: ``outer.learning_rate``."""
    first, last = outer.learning_rate, outer.final_learning_rate
    if iteration is None or outer.schedule == "constant":
        return first
    if outer.schedule == "step":
        return first * outer.schedule_factor ** (iteration // outer.schedule_every)
    done = min(1.0, iteration / outer.iterations)
    if outer.schedule == "linear":
        return first + (last - first) * done
    return last + (first - last) * (1 + math.cos(math.pi * done)) / 2


def clipped(outer: OuterConfig, gradients: Sequence[Tensor], is_clipped: Sequence[bool]) -> list[Tensor]:
    """Gradients of which no element is above ``clip_value``, whose norm together is not above ``clip_norm``.

    What is not finite stays so: the step that it belongs to has to be refused.

    Args:
        outer: 0 is no bound.
        gradients: of all parameters.
        is_clipped: which of them are clipped.
    """
    found = list(gradients)
    chosen = [index for index, is_one in enumerate(is_clipped) if is_one]
    if outer.clip_value:
        for index in chosen:
            gradient = found[index]
            bounded = gradient.clamp(-outer.clip_value, outer.clip_value)
            found[index] = torch.where(gradient.isfinite(), bounded, gradient)
    if outer.clip_norm and chosen:
        norm = torch.stack([found[index].norm() for index in chosen]).norm()
        share = (outer.clip_norm / norm).clamp_max(1.0)
        for index in chosen:
            found[index] = found[index] * share
    return found


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Forget all that the optimizer has gathered, in place."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
