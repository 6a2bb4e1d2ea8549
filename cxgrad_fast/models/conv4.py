"""Conv-4: four blocks of convolution, norm, LeakyReLU and 2x2 max-pool, then a linear head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.kernels import PatchStatistics
from cxgrad_fast.models.backbone import Backbone, LayerStatistics, Output, head_logits, layers_eps, norm_shapes

DEPTH = 4


class Conv4(Backbone):
    """Vinyals et al. 2016, as in the released program: no convolution bias, features flattened (C, H, W)."""

    def __init__(self, model: ModelConfig, ways: int) -> None:
        super().__init__(model, ways)
        self.scaled = tuple(f"features.{layer}.weight" for layer in range(DEPTH))
        self.first_layer_patches = model.norm == "batch"
        self.shapes = {}
        channels, size = model.channels, model.image_size
        for layer in range(DEPTH):
            self.shapes[f"features.{layer}.weight"] = (model.filters, channels, 3, 3)
            self.shapes |= norm_shapes(f"features.{layer}", model.filters)
            channels, size = model.filters, size // 2
        self.shapes |= {"head.weight": (ways, channels * size * size), "head.bias": (ways,)}

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
        output = Output(x)
        for layer, own_eps in enumerate(layers_eps(eps, DEPTH)):
            x = self._conv_block(
                output,
                parameters,
                f"features.{layer}",
                x,
                own_eps,
                slope=self.model.slope,
                pool=True,
                given=given,
                collect=collect,
                patches=patches if layer == 0 else None,
            )
        output.logits = head_logits(parameters, x.flatten(2))
        return output
