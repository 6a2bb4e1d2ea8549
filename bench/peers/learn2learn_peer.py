"""MAML by ``learn2learn`` (Arnold et al. 2020).

Its last release (0.2.0) ships C files that predate Python 3.11. To build it, in a folder with its source archive:

    pip install "cython<3" "setuptools<66" wheel && rm learn2learn/data/*.c && python setup.py build_ext bdist_wheel
    pip install --no-deps dist/*.whl gym gym-notices requests urllib3 idna charset-normalizer certifi
"""

from __future__ import annotations

import torch.nn.functional as F
from side import Parameters, Side
from torch import Tensor

from cxgrad_fast import Config, Episodes
from peers import Conv4, load_package, maml_side, require_conv4


def build(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    """The side; Unavailable says why not."""
    require_conv4(config)
    library = load_package("learn2learn")
    inner, module = config.inner, Conv4(config)
    named = module.named_by_us()
    for norm in module.norm:  # it adapts whatever is registered, and norms are not adapted here
        for part in ("weight", "bias"):
            held = getattr(norm, part).detach()
            delattr(norm, part)
            setattr(norm, part, held)
    named |= {name: tensor for name, tensor in module.named_by_us().items() if ".norm." in name}
    learner = library.algorithms.MAML(module, lr=inner.learning_rate, first_order=inner.order == 1)

    def adapt(learner: object, x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        adapted = learner.clone()  # type: ignore[attr-defined]  # learn2learn's
        for _ in range(inner.steps):
            adapted.adapt(F.cross_entropy(adapted(x), y))
        return adapted(query_x)

    return maml_side(adapt, named, learner, config, episodes, parameters)
