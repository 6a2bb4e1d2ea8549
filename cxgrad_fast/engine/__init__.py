"""One meta-step over a batch of tasks."""

from cxgrad_fast.engine.meta_loss import Engine, MetaLoss
from cxgrad_fast.engine.static import Gradients, StaticGradients

__all__ = ["Engine", "Gradients", "MetaLoss", "StaticGradients"]
