"""Inner-loop rules, one file each."""

from cxgrad_fast.algorithms.cxgrad import CxGrad
from cxgrad_fast.algorithms.maml import MAML
from cxgrad_fast.algorithms.rule import FastState, InnerLoop, Support
from cxgrad_fast.config import Config
from cxgrad_fast.models import Backbone

__all__ = ["MAML", "CxGrad", "FastState", "InnerLoop", "Support", "build_inner_loop"]


def build_inner_loop(config: Config, backbone: Backbone) -> InnerLoop:
    """The inner-loop rule that ``config.inner.algorithm`` names."""
    rule = {"cxgrad": CxGrad, "maml": MAML}[config.inner.algorithm]
    return rule(config, backbone)
