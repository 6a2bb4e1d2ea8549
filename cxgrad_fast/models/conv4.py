"""Conv-4: four blocks of convolution, norm, LeakyReLU and 2x2 max-pool."""

from __future__ import annotations

from torch import Tensor

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.models.backbone import Backbone
from cxgrad_fast.models.network import Network

DEPTH = 4


class Conv4(Backbone):
    """Vinyals et al. 2016, as in the released program: features flattened (C, H, W).

    ``pool_ceil`` and ``channels_last`` are what the released Reptile has instead.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        is_fused = model.norm == "batch" and not (model.pool_ceil and model.image_size % 2)
        self.first_layer = "features.0" if is_fused else None
        self.parameters = {}
        channels = model.channels
        for layer in range(DEPTH):
            self.parameters |= self.convolution(f"features.{layer}", channels, model.filters, scaled=True)
            channels = model.filters
        self.width = channels * model.sizes_by_block()[-1] ** 2

    def features(self, net: Network, x: Tensor) -> Tensor:
        return self.maps(net, x).flatten(2)

    def maps(self, net: Network, x: Tensor) -> Tensor:
        for layer in range(DEPTH):
            x = net.block(f"features.{layer}", x, slope=self.model.slope, pool=True)
        return x.permute(0, 1, 3, 4, 2) if self.model.channels_last else x
