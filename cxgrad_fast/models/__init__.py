"""Backbones and heads: pure functions of task-batched weights."""

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.models.backbone import Backbone
from cxgrad_fast.models.conv4 import Conv4
from cxgrad_fast.models.heads import linear_head
from cxgrad_fast.models.network import (
    BIAS,
    CONVOLUTION,
    HEAD,
    NORM,
    OWN,
    LayerStatistics,
    Network,
    Parameter,
    constant,
    own_linear,
    xavier_uniform,
)
from cxgrad_fast.models.resnet12 import ResNet12

__all__ = [
    "BIAS",
    "CONVOLUTION",
    "HEAD",
    "NORM",
    "OWN",
    "Backbone",
    "Conv4",
    "LayerStatistics",
    "Network",
    "Parameter",
    "ResNet12",
    "build_backbone",
    "constant",
    "linear_head",
    "own_linear",
    "xavier_uniform",
]

BACKBONES: dict[str, type[Backbone]] = {"conv4": Conv4, "resnet12": ResNet12}


def build_backbone(model: ModelConfig) -> Backbone:
    """The backbone that ``model.backbone`` names."""
    return BACKBONES[model.backbone](model)
