"""One meta-step over a batch of tasks."""

from cxgrad_fast.engine.meta_loss import Engine, MetaLoss

__all__ = ["Engine", "MetaLoss"]
