"""ModGrad (Simon et al. 2020): masks that a context conditions modulate the gradients of some layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import (
    Algorithm,
    Found,
    State,
    Support,
    Tensors,
    cut,
    gradients_of,
    two_layers,
)
from cxgrad_fast.config import ModGradConfig
from cxgrad_fast.models import BIAS, CONVOLUTION, Parameter, own_linear


class ModGrad(Algorithm):
    """``theta' = theta - alpha g * M(nu)``, ``nu = -dL(theta')/dnu``; g is taken once, at the start.

    A mask of a weight is ``relu(u v^T)``, read row by row in the weight's shape, of a bias ``relu(b)``; ``u``, ``v``
    and ``b`` are mixtures of vectors that two linear layers make of nu. ``layers`` are the adapted convolutions.
    """

    config: ModGradConfig
    released = released.MODGRAD

    @property
    def masked(self) -> dict[str, int]:
        """Name -> place among the convolutions, of the adapted ones."""
        return {name: layer for layer, name in self.backbone.chosen(self.config.layers).items()}

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, its head, and ``masks.LAYER.{u,v,bias}``, two linear layers each."""
        declared = super().parameters()
        for name, layer in self.masked.items():
            rows, columns, *kernel = declared[f"{name}.weight"].shape
            sizes = {"u": rows * kernel[0], "v": columns * kernel[1]}
            if f"{name}.bias" in declared:
                sizes["bias"] = rows
            for part, size in sizes.items():
                declared |= own_linear(f"masks.{layer}.{part}.0", self.config.context_dim, size)
                declared |= own_linear(f"masks.{layer}.{part}.2", size, self.config.mixtures * (1 + size))
        return declared

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role in (CONVOLUTION, BIAS) and name.rpartition(".")[0] in self.masked

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        points = dict(zip(fast, cut(list(fast.values()), graph), strict=True))
        losses = self.support_losses(self.network(State(points), 0, shared, support), support)
        found = gradients_of(losses, points, graph)
        carried = {f"start.{name}": weight for name, weight in fast.items()}
        carried |= {f"gradient.{name}": gradient for name, gradient in found.items()}
        context = support.x.new_zeros(len(support.x), self.config.context_dim)
        return State(fast, {**carried, "context": context.requires_grad_(torch.is_grad_enabled())}), [losses]

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        """The round's weights, which are the found ones, and dL/dnu there; the last round's is not used."""
        is_last = k == self.config.steps - 1
        carried = state.carried
        (context,) = cut([carried["context"]], graph)
        weights = self._modulated(state, context, shared)
        losses = self.support_losses(self.network(State(weights), k, shared, support), support)
        turn = {} if is_last else gradients_of(losses, {"context": context}, graph, keep=True)
        return Found(weights, {}, [losses], turn)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        context = -found.extra["context"] if found.extra else state.carried["context"]
        return State(found.weights, {**state.carried, "context": context})

    def _modulated(self, state: State, context: Tensor, shared: Mapping[str, Tensor]) -> Tensors:
        weights = {}
        for name in state.fast:
            layer, _, part = name.rpartition(".")
            gradient = state.carried[f"gradient.{name}"]
            nets = ("u", "v") if part == "weight" else ("bias",)
            vectors = [self._mixed(f"masks.{self.masked[layer]}.{net}", context, shared) for net in nets]
            values = vectors[0] if part == "bias" else vectors[0][:, :, None] * vectors[1][:, None]
            weights[name] = state.carried[f"start.{name}"] - self.config.learning_rate * gradient * (
                values.relu().reshape(gradient.shape)
            )
        return weights

    def _mixed(self, net: str, context: Tensor, shared: Mapping[str, Tensor]) -> Tensor:
        """``[T, size]``: a softmax-weighted sum of the vectors that the net makes."""
        output, mixtures = two_layers(shared, net, context), self.config.mixtures
        shares, vectors = output[:, :mixtures].softmax(1), output[:, mixtures:]
        return torch.bmm(shares[:, None], vectors.view(len(output), mixtures, -1))[:, 0]
