"""One meta-step over a batch of tasks."""

from cxgrad_fast.engine.captured import CudaGraphs, Graphs
from cxgrad_fast.engine.distributed import (
    ALONE,
    RankLostError,
    Ranks,
    SharedGradients,
    ToldElsewhereError,
    is_launched,
    join_ranks,
)
from cxgrad_fast.engine.memory import MemoryPlan
from cxgrad_fast.engine.meta_loss import Adaptation, Engine, MetaLoss
from cxgrad_fast.engine.prediction import predictions_of
from cxgrad_fast.engine.static import Gradients, StaticGradients
from cxgrad_fast.engine.step import (
    CapturedStep,
    NonFiniteError,
    NonFiniteLossError,
    Pending,
    RunningStatistics,
    check_finite,
    is_finite,
    take_over,
)

__all__ = [
    "ALONE",
    "Adaptation",
    "CapturedStep",
    "CudaGraphs",
    "Engine",
    "Gradients",
    "Graphs",
    "MemoryPlan",
    "MetaLoss",
    "NonFiniteError",
    "NonFiniteLossError",
    "Pending",
    "RankLostError",
    "Ranks",
    "RunningStatistics",
    "SharedGradients",
    "StaticGradients",
    "ToldElsewhereError",
    "check_finite",
    "is_finite",
    "is_launched",
    "join_ranks",
    "predictions_of",
    "take_over",
]
