"""Algorithms, one file each."""

from cxgrad_fast.algorithms.alfa import ALFA
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, Images, Output, Phase, State, Support
from cxgrad_fast.algorithms.anil import ANIL
from cxgrad_fast.algorithms.boil import BOIL
from cxgrad_fast.algorithms.cavia import CAVIA
from cxgrad_fast.algorithms.cxgrad import CxGrad
from cxgrad_fast.algorithms.l2f import L2F
from cxgrad_fast.algorithms.maml import MAML
from cxgrad_fast.algorithms.mamlpp import MAMLPP
from cxgrad_fast.algorithms.matchingnet import MatchingNet
from cxgrad_fast.algorithms.metasgd import MetaSGD
from cxgrad_fast.algorithms.modgrad import ModGrad
from cxgrad_fast.algorithms.protomaml import ProtoMAML
from cxgrad_fast.algorithms.protonet import ProtoNet
from cxgrad_fast.algorithms.relationnet import RelationNet
from cxgrad_fast.algorithms.reptile import Reptile
from cxgrad_fast.config import Config
from cxgrad_fast.models import Backbone

__all__ = ["ALGORITHMS", "Algorithm", "Found", "Images", "Output", "Phase", "State", "Support", "build_algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "alfa": ALFA,
    "anil": ANIL,
    "boil": BOIL,
    "cavia": CAVIA,
    "cxgrad": CxGrad,
    "fomaml": MAML,
    "l2f": L2F,
    "maml": MAML,
    "mamlpp": MAMLPP,
    "matchingnet": MatchingNet,
    "metasgd": MetaSGD,
    "modgrad": ModGrad,
    "protomaml": ProtoMAML,
    "protonet": ProtoNet,
    "relationnet": RelationNet,
    "reptile": Reptile,
}


def build_algorithm(config: Config, backbone: Backbone) -> Algorithm:
    """The algorithm that ``config.inner.algorithm`` names, on a backbone."""
    return ALGORITHMS[config.inner.algorithm](config, backbone)
