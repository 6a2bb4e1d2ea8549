"""The oracle's meta-loss of a :class:`cxgrad_fast.Config`: the rule that it names, and what its settings are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cxgrad_fast.reference.cxgrad import cxgrad
from cxgrad_fast.reference.maml import maml
from cxgrad_fast.reference.tasks import Episodes, Rule, over_tasks

_CONTEXT = ("context_dim", "context_learning_rate", "context_update", "initial_context_order")
# the algorithm's name -> its rule, and those of its settings that go by the same name there
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "cxgrad": (cxgrad, _CONTEXT),
    "fomaml": (maml, ()),
    "maml": (maml, ()),
}


class ReferenceLoss(NamedTuple):
    """As :class:`cxgrad_fast.engine.MetaLoss`; ``loss`` is differentiable in the parameters."""

    loss: Tensor
    query_logits: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracy: Tensor


def meta_loss(config: Any, parameters: Mapping[str, Tensor], episodes: Episodes) -> ReferenceLoss:
    """The meta-loss that a Config asks for.

    Args:
        config: a :class:`cxgrad_fast.Config`; reads ``model``, ``inner`` (all but ``form``: this is the scaled one) and
            ``outer.reduction``.
        parameters: by our names, requiring gradients.
        episodes: ``T`` tasks.
    """
    rule, settings = _of_config(config)
    found = over_tasks(rule, parameters, episodes, reduction=config.outer.reduction, **settings)
    losses = found["losses"]
    correct = found["query_logits"].argmax(2) == episodes.query_y
    return ReferenceLoss(
        loss=found["loss"],
        query_logits=found["query_logits"],
        support_losses=losses[:, :-1].detach(),
        query_losses=losses[:, -1],
        accuracy=correct.to(losses.dtype).mean(),
    )


def _of_config(config: Any) -> tuple[Rule, dict[str, Any]]:
    """The rule that a Config names, and its keywords."""
    model, inner = config.model, config.inner
    settings = {
        "steps": inner.steps,
        "learning_rate": inner.learning_rate,
        "second_order": inner.order == 2,
        "backbone": model.backbone,
        "slope": model.slope,
        "eps": model.norm_eps,
        "norm": model.norm,
        "norm_groups": model.norm_groups,
        "pool_last": model.pool_last,
        "pool_padding": model.pool_padding,
    }
    rule, own = _RULES[inner.algorithm]
    return rule, settings | {name: getattr(inner, name) for name in own}
