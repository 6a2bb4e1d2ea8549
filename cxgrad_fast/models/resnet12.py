"""ResNet-12: four residual blocks of three convolutions and a point-wise shortcut, then the global average."""

from __future__ import annotations

from torch import Tensor

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.kernels import residual_end
from cxgrad_fast.models.backbone import Backbone
from cxgrad_fast.models.network import Network

BLOCKS, CONVOLUTIONS = 4, 3


class ResNet12(Backbone):
    """The paper's appendix B; filters double from block to block, or are those of ``block_filters``.

    The twelve 3x3 convolutions are scaled, the shortcuts are adapted but not scaled. The paper pools after every block;
    the released ALFA program has ``pool_last = false`` and ``pool_padding = 0,0,1,1``.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.parameters = {}
        channels = model.channels
        for block, filters in enumerate(model.filters_by_block):
            for index in range(CONVOLUTIONS):
                inputs = channels if index == 0 else filters
                self.parameters |= self.convolution(f"features.{block}.{index}", inputs, filters, scaled=True)
            self.parameters |= self.convolution(f"features.{block}.shortcut", channels, filters, kernel=1)
            channels = filters
        self.width = channels

    def features(self, net: Network, x: Tensor) -> Tensor:
        model = self.model
        for block in range(BLOCKS):
            shortcut = net.block(f"features.{block}.shortcut", x, slope=None, pool=False)
            for index in range(CONVOLUTIONS):
                last = index == CONVOLUTIONS - 1
                x = net.block(f"features.{block}.{index}", x, slope=None if last else model.slope, pool=False)
            pool = model.pool_last or block < BLOCKS - 1
            x = residual_end(x, shortcut, slope=model.slope, pool=pool, padding=model.pool_padding[block])
        return x.mean((3, 4))
