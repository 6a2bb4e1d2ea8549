"""Conv-4: four blocks of convolution, norm, LeakyReLU and 2x2 max-pool."""

from __future__ import annotations

from torch import Tensor

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.models.backbone import Backbone
from cxgrad_fast.models.network import Network

DEPTH = 4


class Conv4(Backbone):
    """Vinyals et al. 2016, as in the released program: features flattened (C, H, W)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        self.first_layer = "features.0" if model.norm == "batch" else None
        self.parameters = {}
        channels, size = model.channels, model.image_size
        for layer in range(DEPTH):
            self.parameters |= self._convolution(f"features.{layer}", channels, model.filters, scaled=True)
            channels, size = model.filters, size // 2
        self.width = channels * size * size

    def features(self, net: Network, x: Tensor) -> Tensor:
        for layer in range(DEPTH):
            x = net.block(f"features.{layer}", x, slope=self.model.slope, pool=True)
        return x.flatten(2)
