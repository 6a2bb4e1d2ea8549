"""Backbones: pure functions of task-batched weights, head included."""

from cxgrad_fast.config import Config
from cxgrad_fast.models.backbone import Backbone, LayerStatistics, Output
from cxgrad_fast.models.conv4 import Conv4
from cxgrad_fast.models.resnet12 import ResNet12

__all__ = ["Backbone", "Conv4", "LayerStatistics", "Output", "ResNet12", "build_backbone"]


def build_backbone(config: Config) -> Backbone:
    """The backbone that ``config.model`` names, with a head for ``config.task.ways`` classes."""
    backbone = {"conv4": Conv4, "resnet12": ResNet12}[config.model.backbone]
    return backbone(config.model, config.task.ways)
