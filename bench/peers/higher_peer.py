"""MAML by ``higher`` (Grefenstette et al. 2019): its differentiable SGD over convolutions and head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from side import Parameters, Side, Unavailable
from torch import Tensor

from cxgrad_fast import Config, Episodes
from peers import Conv4, load_package, maml_side, require_conv4


def build(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    """The side; Unavailable says why not."""
    require_conv4(config)
    if config.inner.order == 1:
        raise Unavailable("second order only: without its graph nothing leads back to the start")
    higher = load_package("higher")
    inner, module = config.inner, Conv4(config)
    moved = [*module.conv.parameters(), *module.head.parameters()]
    descent = torch.optim.SGD(moved, lr=inner.learning_rate)

    def adapt(module: Conv4, x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        with higher.innerloop_ctx(module, descent, copy_initial_weights=False) as (adapted, steps):
            for _ in range(inner.steps):
                steps.step(F.cross_entropy(adapted(x), y))
            return adapted(query_x)

    return maml_side(adapt, module.named_by_us(), module, config, episodes, parameters)
