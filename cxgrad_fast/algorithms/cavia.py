"""CAVIA (Zintgraf et al. 2019): context parameters alone are adapted; they modulate layers by FiLM."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import (
    Algorithm,
    Found,
    Images,
    State,
    Support,
    Tensors,
    cut,
    gradients_of,
    two_layers,
)
from cxgrad_fast.config import CAVIAConfig
from cxgrad_fast.models import LayerStatistics, Network, Parameter, linear_head, own_linear


class CAVIA(Algorithm):
    """``nu <- nu - beta * dL/dnu`` from zero; block: convolution, norm, pooling, FiLM, activation.

    ``layers`` are the convolutions that are modulated; with ``context_at_head`` nu joins the features too.
    """

    config: CAVIAConfig
    released = released.CAVIA

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, a head, and for each modulated layer one or two linear layers from nu to scales and shifts."""
        config = self.config
        declared = dict(self.backbone.parameters)
        declared |= linear_head(self.backbone.width + config.context_at_head * config.context_dim, self.ways)
        for layer, name in self.backbone.chosen(self.config.layers).items():
            values = 2 * self.backbone.parameters[f"{name}.weight"].shape[0]
            declared |= own_linear(f"film.{layer}.0", config.context_dim, values)
            if config.hidden:
                declared |= own_linear(f"film.{layer}.2", values, values)
        return declared

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return False

    def network(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        images: Images,
        *,
        eps: Mapping[str, Tensor] | None = None,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Network:
        context, film = state.carried["context"], {}
        for layer, name in self.backbone.chosen(self.config.layers).items():
            values = two_layers(shared, f"film.{layer}", context)
            scale, shift = values.chunk(2, 1)
            film[name] = (scale, shift)
        patches = images.patches if given is None else None
        beside = {"head": context} if self.config.context_at_head else None
        return Network(
            self.model, shared, eps=eps, patches=patches, film=film, beside=beside, given=given, collect=collect
        )

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        context = support.x.new_zeros(len(support.x), self.config.context_dim)
        return State({}, {"context": context.requires_grad_(torch.is_grad_enabled())}), []

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        (context,) = cut([state.carried["context"]], graph)
        others = shared if graph else {name: tensor.detach() for name, tensor in shared.items()}
        net = self.network(State({}, {"context": context}), k, others, support)
        losses = self.support_losses(net, support)
        return Found({}, {}, [losses], gradients_of(losses, {"context": context}, graph))

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        return State({}, {"context": state.carried["context"] - self.config.learning_rate * found.extra["context"]})
