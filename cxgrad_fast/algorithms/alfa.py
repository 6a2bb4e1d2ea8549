"""ALFA (Baik et al. 2020): a small network gives the learning rate and the weight decay of every tensor and step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, across, moved, two_layers
from cxgrad_fast.config import ALFAConfig
from cxgrad_fast.models import OWN, Parameter, constant, own_linear


class ALFA(Algorithm):
    """``theta <- (1 - beta B_s) theta - alpha A_s dL/dtheta`` with ``(alpha, beta) = G(means of theta and dL/dtheta)``.

    The gradients' means are constants of the meta-gradient, as released. With ``random_init`` the network stays as it
    was drawn, and a tensor ``D`` of the parameter's shape, meta-learned too, multiplies ``beta B_s``.
    """

    config: ALFAConfig
    released = released.ALFA

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, its head, ``rates`` (A) and ``decays`` (B) ``[steps + 1]`` a tensor, and the generator G."""
        config, network = self.config, super().parameters()
        adapted = {name: each for name, each in network.items() if self.adapts(name, each)}
        shape = (config.steps + 1,)  # the program's last entry is never used
        decay = config.weight_decay * config.learning_rate
        own = {f"rates.{name}": Parameter(shape, OWN, constant(config.learning_rate)) for name in adapted}
        initial = constant(1.0 if config.random_init else decay)
        own |= {f"decays.{name}": Parameter(shape, OWN, initial) for name in adapted}
        if config.random_init:
            network = {name: each.untrained() for name, each in network.items()}
            own |= {f"decay_elements.{name}": Parameter(p.shape, OWN, constant(decay)) for name, p in adapted.items()}
        width = 2 * len(adapted)
        return network | own | own_linear("generator.0", width, width) | own_linear("generator.2", width, width)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        weights, gradients = state.fast, found.gradients
        seen = [*weights.values(), *(gradients[name].detach() for name in weights)]
        means = torch.stack([tensor.flatten(1).mean(1) for tensor in seen], 1)
        alphas, betas = two_layers(shared, "generator", means).chunk(2, 1)
        rates, decays = (torch.stack([shared[f"{kind}.{name}"][k] for name in weights]) for kind in ("rates", "decays"))
        rates, decays = alphas * rates, betas * decays
        if not self.config.random_init:
            return State(moved(found, rates, factors=1 - decays))
        kept = {}
        for name, decay in zip(weights, decays.unbind(1), strict=True):
            elements = across(decay, weights[name]) * shared[f"decay_elements.{name}"]
            kept[name] = (1 - elements) * weights[name]
        return State(moved(replace(found, weights=kept), rates))
