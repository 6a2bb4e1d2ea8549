"""What the backbones share: their interface, their initial weights, the norm's arguments, the head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.kernels import PatchStatistics, conv_block

LayerStatistics = tuple[Tensor, Tensor]  # mean and biased variance of a BatchNorm's input, [T, C] each


@dataclass
class Output:
    """What one pass gives.

    Attributes:
        logits: ``[T, S, N]``.
        statistics: mean and variance ``[T, C]`` of each BatchNorm, by the name of its convolution; when asked for.
    """

    logits: Tensor
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)


class Backbone(ABC):
    """A network as a pure function of its weights.

    Attributes:
        shapes: name -> shape of every parameter, in the order of initialisation.
        scaled: names of the convolution weights that CxGrad scales, in forward order; their number is ``L``.
    """

    shapes: dict[str, tuple[int, ...]]
    scaled: tuple[str, ...]
    first_layer_patches: bool  # whether the first layer can use the patch statistics of its images

    def __init__(self, model: ModelConfig, ways: int) -> None:
        self.model, self.ways = model, ways

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Names of all convolutions without their ``.weight``: each is followed by a norm."""
        return tuple(name[: -len(".norm.weight")] for name in self.shapes if name.endswith(".norm.weight"))

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names of the parameters that the inner loop moves: all but the norms' affine parts."""
        return tuple(name for name in self.shapes if ".norm." not in name)

    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters in float32: Xavier-uniform weights, zero head bias, identity norms.

        Drawn in the released program's order, so that its seed gives its weights.
        """
        parameters = {}
        for name, shape in self.shapes.items():
            if name.endswith((".norm.weight", ".bias")):
                parameters[name] = torch.full(shape, float(name.endswith(".weight")))
            else:
                parameters[name] = nn.init.xavier_uniform_(torch.empty(shape), generator=generator)
        return parameters

    @abstractmethod
    def forward(
        self,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        eps: Tensor | float,
        *,
        patches: PatchStatistics | None = None,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Output:
        """One pass over all tasks.

        Args:
            parameters: by name, ``[T, ...]``; those of norms ``[T or 1, C]``.
            x: ``[T, S, C, H, W]``.
            eps: ``[T, L]``, epsilon of the norms behind the scaled convolutions; or one number for all.
            patches: patch statistics of ``x``, where ``first_layer_patches``.
            given: statistics to normalise with, by convolution, instead of the batch's own.
            collect: also return the statistics that were used.
        """

    def _conv_block(
        self,
        output: Output,
        parameters: Mapping[str, Tensor],
        name: str,
        x: Tensor,
        eps: Tensor | float,
        *,
        slope: float | None,
        pool: bool,
        given: Mapping[str, LayerStatistics] | None,
        collect: bool,
        patches: PatchStatistics | None = None,
    ) -> Tensor:
        """The block named ``name``; its statistics go to ``output`` when collected."""
        model = self.model
        weights = (parameters[f"{name}.weight"], parameters[f"{name}.norm.weight"], parameters[f"{name}.norm.bias"])
        if model.norm != "batch":
            groups = model.norm_groups if model.norm == "group" else 1
            return conv_block(x, *weights, eps, slope=slope, pool=pool, norm="group", groups=groups)
        y, output_statistics = conv_block(
            x,
            *weights,
            eps,
            slope=slope,
            pool=pool,
            patch_statistics=patches if given is None else None,
            statistics=None if given is None else given[name],
            return_statistics=True,
        )
        if collect:
            output.statistics[name] = output_statistics
        return y


def layers_eps(eps: Tensor | float, layers: int) -> Sequence[Tensor | float]:
    """The ``[T]`` of every scaled convolution, or the number that all share."""
    return eps.unbind(1) if isinstance(eps, Tensor) else [eps] * layers


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    """The affine parameters of the norm behind convolution ``name``."""
    return {f"{name}.norm.weight": (channels,), f"{name}.norm.bias": (channels,)}


def head_logits(parameters: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """``features`` [T, S, D], head weight [T, N, D] and bias [T, N] -> logits [T, S, N]."""
    return torch.baddbmm(parameters["head.bias"][:, None], features, parameters["head.weight"].mT)
