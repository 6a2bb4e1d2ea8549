"""Algorithms, one file each."""

from cxgrad_fast.algorithms.algorithm import Algorithm, Found, Images, Output, State, Support
from cxgrad_fast.algorithms.cxgrad import CxGrad
from cxgrad_fast.algorithms.maml import MAML
from cxgrad_fast.config import Config
from cxgrad_fast.models import Backbone

__all__ = ["ALGORITHMS", "Algorithm", "Found", "Images", "Output", "State", "Support", "build_algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {"cxgrad": CxGrad, "fomaml": MAML, "maml": MAML}


def build_algorithm(config: Config, backbone: Backbone) -> Algorithm:
    """The algorithm that ``config.inner.algorithm`` names, on a backbone."""
    return ALGORITHMS[config.inner.algorithm](config, backbone)
