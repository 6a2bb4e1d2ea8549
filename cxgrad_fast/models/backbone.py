"""What the backbones share: their interface and the declarations of their layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from cxgrad_fast.config import InputError, ModelConfig
from cxgrad_fast.kernels import PatchStatistics, patch_statistics
from cxgrad_fast.models.network import BIAS, CONVOLUTION, NORM, Network, Parameter, constant


class Backbone(ABC):
    """From images to features, as a pure function of the weights that a :class:`Network` holds; without a head.

    Attributes:
        parameters: by name, in the order of initialisation.
        width: ``D``, the number of features of an image.
        first_layer: the convolution that reads the images, where patch statistics of them speed it up; else None.
    """

    parameters: dict[str, Parameter]
    width: int
    first_layer: str | None = None

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    @abstractmethod
    def features(self, net: Network, x: Tensor) -> Tensor:
        """Images ``[T, S, C, H, W]`` -> features ``[T, S, D]``."""

    def maps(self, net: Network, x: Tensor) -> Tensor:
        """The features ``[T, S, ...]`` before they are flattened, where that saves a call."""
        return self.features(net, x)

    @property
    def scaled(self) -> tuple[str, ...]:
        """Names of the convolution weights that CxGrad scales, in forward order; their number is ``L``."""
        return tuple(name for name, parameter in self.parameters.items() if parameter.scaled)

    @property
    def convolutions(self) -> tuple[str, ...]:
        """Names of all convolutions without their ``.weight``: each is followed by a norm."""
        return tuple(
            name.removesuffix(".weight") for name, parameter in self.parameters.items() if parameter.role == CONVOLUTION
        )

    def chosen(self, layers: Sequence[int]) -> dict[int, str]:
        """Place among the convolutions -> name, of those at ``layers``; -1 is the last.

        Raises:
            InputError: there is no such convolution.
        """
        names = self.convolutions
        for layer in layers:
            if not -len(names) <= layer < len(names):
                raise InputError(
                    f"setting 'inner.layers' (={', '.join(map(str, layers))}): {self.model.backbone} has the "
                    f"convolutions 0 to {len(names) - 1}, not {layer}"
                )
        return {layer % len(names): names[layer] for layer in layers}

    def patches(self, x: Tensor) -> Mapping[str, PatchStatistics]:
        """Patch statistics of images ``[T, S, C, H, W]``, by the convolution that can use them.

        They pay even where images are seen once. They carry no gradient: images that require one go without.
        """
        if self.first_layer is None or x.requires_grad:
            return {}
        return {self.first_layer: patch_statistics(x)}

    def convolution(
        self, name: str, inputs: int, filters: int, kernel: int = 3, scaled: bool = False
    ) -> dict[str, Parameter]:
        """The parameters of one convolution and of the norm behind it."""
        declared = {f"{name}.weight": Parameter((filters, inputs, kernel, kernel), CONVOLUTION, scaled=scaled)}
        if self.model.conv_bias:
            declared[f"{name}.bias"] = Parameter((filters,), BIAS, constant(0.0))
        return declared | {
            f"{name}.norm.weight": Parameter((filters,), NORM, constant(1.0)),
            f"{name}.norm.bias": Parameter((filters,), NORM, constant(0.0)),
        }
