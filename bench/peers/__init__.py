"""Other people's libraries, each in a few lines of ours, imported only when asked for; a missing one is a reason.

``jax_peer`` takes the whole step, CxGrad too; ``higher_peer`` and ``learn2learn_peer`` are MAML;
``parallel_metalearn_peer`` has MAML, ANIL, BOIL and MAML++. To have them all:

    make bench-peers  # pip install jax higher parallel-metalearn
    # learn2learn 0.2.0: learn2learn_peer says how
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from side import Parameters, Side, TorchSide, Unavailable, backward, device_of, dtype_of, why_not_plain
from torch import Tensor, nn

from cxgrad_fast import Config, Episodes

DEPTH = 4
# (module, support x, support y, query x) -> query logits, differentiable in the module's tensors
Adapt = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def load_package(name: str) -> Any:
    """The package, its import warnings aside.

    Raises:
        Unavailable: it does not import.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"does not import: {type(error).__name__}: {error}") from None


class Conv4(nn.Module):
    """Conv-4 as a user of such a library writes it: ``[S, C, H, W]`` -> ``[S, N]``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, size = config.model, config.model.image_size >> DEPTH
        inputs = [model.channels, *[model.filters] * (DEPTH - 1)]
        self.conv = nn.ModuleList(nn.Conv2d(channels, model.filters, 3, padding=1, bias=False) for channels in inputs)
        self.norm = nn.ModuleList(
            nn.BatchNorm2d(model.filters, eps=model.norm_eps, track_running_stats=False) for _ in inputs
        )
        self.head = nn.Linear(model.filters * size * size, config.task.ways)
        self.slope = model.slope
        self.to(device_of(config), dtype_of(config))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.conv, self.norm, strict=True):
            x = F.max_pool2d(F.leaky_relu(norm(conv(x)), self.slope), 2)
        return self.head(x.flatten(1))

    def named_by_us(self) -> dict[str, Tensor]:
        """The parameters by our names, for the inner loop and the meta-gradient."""
        named: dict[str, Tensor] = {}
        for layer, (conv, norm) in enumerate(zip(self.conv, self.norm, strict=True)):
            named[f"features.{layer}.weight"] = conv.weight
            named |= {f"features.{layer}.norm.weight": norm.weight, f"features.{layer}.norm.bias": norm.bias}
        return named | {"head.weight": self.head.weight, "head.bias": self.head.bias}


def maml_side(
    adapt: Adapt, named: dict[str, Tensor], module: Conv4, config: Config, episodes: Episodes, parameters: Parameters
) -> Side:
    """MAML by a library that adapts an ``nn.Module``, one task after the other.

    Args:
        adapt: the library's part.
        named: the module's tensors by our names.
        module: what is adapted.
        config: of the case.
        episodes: of the case.
        parameters: initial values by our names.
    """

    def find(leaves: dict[str, Tensor], episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        losses = []
        for task in range(len(episodes)):
            logits = adapt(module, episodes.support_x[task], episodes.support_y[task], episodes.query_x[task])
            losses.append(F.cross_entropy(logits, episodes.query_y[task]))
        total = torch.stack(losses)
        return backward(total.mean() if config.outer.reduction == "mean" else total.sum(), leaves)

    return TorchSide(find, config, episodes, parameters, named)


def require_conv4(config: Config) -> None:
    """Raises Unavailable unless the network is the plain Conv-4."""
    if reason := why_not_plain(config.model):
        raise Unavailable(reason)
