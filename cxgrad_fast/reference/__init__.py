"""The oracle: every algorithm literally, one task at a time, in plain torch.

It judges the engine; golden files judge it (``bench/golden.py``). One function an algorithm, one file a function, and
nothing shared but the network's layers (``network``) and the loop over tasks (``tasks``); ``of_config`` reads a Config.
Nothing of what it judges is imported, and nothing is ever optimised.

    from cxgrad_fast.reference.maml import maml
    found = maml(parameters, support_x, support_y, query_x, query_y, steps=5, learning_rate=0.01, second_order=True)
    found = over_tasks(maml, parameters, episodes, steps=5, learning_rate=0.01, second_order=True, slope=0.01)
"""

from cxgrad_fast.reference.of_config import ALGORITHMS, ReferenceLoss, meta_loss
from cxgrad_fast.reference.tasks import over_tasks

__all__ = ["ALGORITHMS", "ReferenceLoss", "meta_loss", "over_tasks"]
