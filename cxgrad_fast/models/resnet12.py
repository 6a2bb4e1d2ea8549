"""ResNet-12: four residual blocks of three convolutions and a point-wise shortcut, global average, linear head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.kernels import PatchStatistics, residual_end
from cxgrad_fast.models.backbone import Backbone, LayerStatistics, Output, head_logits, layers_eps, norm_shapes

BLOCKS, CONVOLUTIONS = 4, 3


class ResNet12(Backbone):
    """The paper's appendix B; filters double from block to block.

    The twelve 3x3 convolutions are scaled, the shortcuts are adapted but not scaled. The paper pools after every block;
    the released ALFA program has ``pool_last = false`` and ``pool_padding = 0,0,1,1``.
    """

    first_layer_patches = False  # its first block does not pool

    def __init__(self, model: ModelConfig, ways: int) -> None:
        super().__init__(model, ways)
        self.scaled = tuple(f"features.{b}.{c}.weight" for b in range(BLOCKS) for c in range(CONVOLUTIONS))
        self.shapes = {}
        channels = model.channels
        for block in range(BLOCKS):
            filters = model.filters << block
            for conv in range(CONVOLUTIONS):
                inputs = channels if conv == 0 else filters
                self.shapes[f"features.{block}.{conv}.weight"] = (filters, inputs, 3, 3)
                self.shapes |= norm_shapes(f"features.{block}.{conv}", filters)
            self.shapes[f"features.{block}.shortcut.weight"] = (filters, channels, 1, 1)
            self.shapes |= norm_shapes(f"features.{block}.shortcut", filters)
            channels = filters
        self.shapes |= {"head.weight": (ways, channels), "head.bias": (ways,)}

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
        model, output = self.model, Output(x)

        def conv(name: str, x: Tensor, eps: Tensor | float, slope: float | None) -> Tensor:
            return self._conv_block(
                output, parameters, name, x, eps, slope=slope, pool=False, given=given, collect=collect
            )

        own_eps = layers_eps(eps, len(self.scaled))
        for block in range(BLOCKS):
            shortcut = conv(f"features.{block}.shortcut", x, model.norm_eps, None)
            for index in range(CONVOLUTIONS):
                last = index == CONVOLUTIONS - 1
                layer = block * CONVOLUTIONS + index
                x = conv(f"features.{block}.{index}", x, own_eps[layer], None if last else model.slope)
            pool = model.pool_last or block < BLOCKS - 1
            x = residual_end(x, shortcut, slope=model.slope, pool=pool, padding=model.pool_padding[block])
        output.logits = head_logits(parameters, x.mean((3, 4)))
        return output
