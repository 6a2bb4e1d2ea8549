"""The protocol of a side of the episodes bench: something that takes whole meta-training steps on fixed episodes.

What stands below the peers; the table of all sides is bench/sides.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from cxgrad_fast import Config, Episodes
from cxgrad_fast.algorithms import build_algorithm
from cxgrad_fast.config import ModelConfig
from cxgrad_fast.models import OWN, build_backbone

Parameters = Mapping[str, Tensor]


class Unavailable(Exception):
    """A side that cannot run here, or not with these settings; the message is the reason."""


class Side(Protocol):
    """Takes meta-training steps on fixed episodes, from given meta-parameters."""

    def step(self) -> None:
        """A whole meta-training step: forward, inner loop, meta-gradient, Adam's update."""
        ...

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Meta-loss, and its gradients by our names, at the current parameters; changes nothing."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The current meta-parameters by our names."""
        ...

    def load(self, parameters: Parameters) -> None:
        """Take over the values of ``parameters``."""
        ...


Factory = Callable[[Config, Episodes, Parameters], Side]


def device_of(config: Config) -> torch.device:
    """What ``run.device`` names; ``auto`` is CUDA where there is some."""
    if config.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.run.device)


def dtype_of(config: Config) -> torch.dtype:
    """What ``run.precision`` names.

    Raises:
        Unavailable: a precision that torch's own operators do not have.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(config.run.precision)
    if dtype is None:
        raise Unavailable(f"runs in float32 and float64, not {config.run.precision}")
    return dtype


def why_not_plain(model: ModelConfig) -> str:
    """Why a network is not the plain Conv-4 that other programs are written for here; empty where it is."""
    if (model.backbone, model.norm) != ("conv4", "batch"):
        return f"written for conv4 with batch norm, not {model.backbone} with {model.norm} norm"
    extras = [name for name in ("conv_bias", "pool_ceil", "channels_last") if getattr(model, name)]
    return f"written for conv4 without {' and '.join(extras)}" if extras else ""


class TorchSide:
    """A side made of a function ``(leaf parameters, episodes) -> (loss, gradients)``, torch's clipping and optimizer.

    Args:
        find: the function.
        config: of the case.
        episodes: of the case.
        parameters: initial values by our names.
        leaves: the tensors that hold the parameters, where they are not to be made here (those of a module).

    Raises:
        Unavailable: a precision that torch's own operators do not have.
    """

    def __init__(
        self,
        find: Callable[[dict[str, Tensor], Episodes], tuple[Tensor, dict[str, Tensor]]],
        config: Config,
        episodes: Episodes,
        parameters: Parameters,
        leaves: dict[str, Tensor] | None = None,
    ) -> None:
        device, dtype = device_of(config), dtype_of(config)
        if device.type == "cuda":  # float32 means float32 on every side
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._find, self._episodes = find, episodes.to(device, dtype)
        if leaves is None:
            leaves = {name: torch.empty_like(t, device=device, dtype=dtype) for name, t in parameters.items()}
        self._leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        self.load(parameters)
        self._outer, declared = config.outer, build_algorithm(config, build_backbone(config.model)).declared
        trained = [leaf for name, leaf in self._leaves.items() if declared[name].trained]
        rule = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[config.outer.optimizer]
        self._optimizer: torch.optim.Optimizer = rule(trained, lr=config.outer.learning_rate)
        self._clipped = [
            leaf for name, leaf in self._leaves.items() if config.outer.clip == "all" or declared[name].role != OWN
        ]

    def step(self) -> None:
        _, gradients = self._find(self._leaves, self._episodes)
        for name, leaf in self._leaves.items():
            leaf.grad = gradients[name]
        if self._outer.clip_value:
            torch.nn.utils.clip_grad_value_(self._clipped, self._outer.clip_value)
        if self._outer.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._clipped, self._outer.clip_norm)
        self._optimizer.step()
        for leaf in self._leaves.values():
            leaf.grad = None

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = self._find(self._leaves, self._episodes)
        return float(loss), copies(gradients)

    def parameters(self) -> dict[str, Tensor]:
        return copies(self._leaves)

    def load(self, parameters: Parameters) -> None:
        fill(self._leaves, parameters)


def backward(loss: Tensor, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its gradients by name, zeros where a parameter takes no part."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found, strict=True))


def differentiated(loss: Tensor, leaves: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """As :func:`backward`, in float64 on the CPU."""
    value, gradients = backward(loss, leaves)
    return float(value), copies(gradients)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in float64 on the CPU."""
    return {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in tensors.items()}


def fill(leaves: Mapping[str, Tensor], values: Parameters) -> None:
    """Write ``values`` into the leaves."""
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(values[name])
