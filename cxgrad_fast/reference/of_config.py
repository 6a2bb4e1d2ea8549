"""The oracle's meta-loss of a :class:`cxgrad_fast.Config`: the rule that it names, and what its settings are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cxgrad_fast.reference.alfa import alfa
from cxgrad_fast.reference.anil import anil
from cxgrad_fast.reference.boil import boil
from cxgrad_fast.reference.cavia import cavia
from cxgrad_fast.reference.cxgrad import cxgrad
from cxgrad_fast.reference.l2f import l2f
from cxgrad_fast.reference.maml import maml
from cxgrad_fast.reference.mamlpp import mamlpp, step_weights
from cxgrad_fast.reference.matchingnet import matchingnet
from cxgrad_fast.reference.metasgd import metasgd
from cxgrad_fast.reference.modgrad import modgrad
from cxgrad_fast.reference.protomaml import protomaml
from cxgrad_fast.reference.protonet import protonet
from cxgrad_fast.reference.relationnet import relationnet
from cxgrad_fast.reference.reptile import meta_loss as reptile_loss
from cxgrad_fast.reference.tasks import Episodes, Rule, over_tasks

_CONTEXT = ("context_dim", "context_learning_rate", "context_update", "initial_context_order")
# the algorithm's name -> its rule, and those of its settings that go by the same name there
_RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "alfa": (alfa, ("steps",)),
    "anil": (anil, ("steps", "learning_rate", "joint")),
    "boil": (boil, ("steps", "learning_rate", "head_learning_rate")),
    "cavia": (cavia, ("steps", "context_dim")),
    "cxgrad": (cxgrad, ("steps", "learning_rate", *_CONTEXT)),
    "fomaml": (maml, ("steps", "learning_rate")),
    "l2f": (l2f, ("steps", "learning_rate", "embedding_in_graph")),
    "maml": (maml, ("steps", "learning_rate")),
    "mamlpp": (mamlpp, ("steps",)),
    "matchingnet": (matchingnet, ("joint", "full_context", "attention")),
    "metasgd": (metasgd, ("steps",)),
    "modgrad": (modgrad, ("learning_rate", "context_dim", "mixtures")),
    "protomaml": (protomaml, ("steps", "learning_rate")),
    "protonet": (protonet, ("joint", "distance")),
    "relationnet": (relationnet, ("joint", "shots_rule", "relation_padding")),
}
ALGORITHMS = tuple(_RULES)  # those whose meta-loss it has
_WITHOUT_INNER_LOOP: tuple[Rule, ...] = (matchingnet, protonet, relationnet)
_CONVOLUTIONS = 4  # of Conv-4
_SHAPE = ("backbone", "pool_last", "pool_padding", "pool_ceil", "channels_last")


class ReferenceLoss(NamedTuple):
    """As :class:`cxgrad_fast.engine.MetaLoss`; ``loss`` is differentiable in the parameters."""

    loss: Tensor
    query_logits: Tensor
    support_losses: Tensor
    query_losses: Tensor
    accuracy: Tensor


def meta_loss(
    config: Any, parameters: Mapping[str, Tensor], episodes: Episodes, iteration: int | None = None
) -> ReferenceLoss:
    """The meta-loss that a Config asks for.

    Args:
        config: a :class:`cxgrad_fast.Config`; reads ``model``, ``inner`` (all but ``form``: this is the scaled one),
            ``task`` and ``outer.reduction``.
        parameters: by our names, requiring gradients.
        episodes: ``T`` tasks.
        iteration: of meta-training, counted from 0; None: after all phases.
    """
    if config.inner.algorithm == "reptile":
        return _reptile(config, parameters, episodes)
    rule, settings = _of_config(config, iteration)
    found = over_tasks(rule, parameters, episodes, reduction=config.outer.reduction, **settings)
    losses = found["losses"]
    if settings.get("query_weights"):  # a query pass behind every step
        losses = torch.cat([losses[:, ::2], losses[:, -1:]], 1)
    correct = found["query_logits"].argmax(2) == episodes.query_y
    return ReferenceLoss(
        loss=found["loss"],
        query_logits=found["query_logits"],
        support_losses=losses[:, :-1].detach(),
        query_losses=losses[:, -1],
        accuracy=correct.to(losses.dtype).mean(),
    )


def _reptile(config: Any, parameters: Mapping[str, Tensor], episodes: Any) -> ReferenceLoss:
    """Of Reptile; ``episodes`` also have ``batches``, ``parameters`` what goes on from task to task."""
    model, inner = config.model, config.inner
    theta = {name: tensor for name, tensor in parameters.items() if name.startswith(("features.", "head."))}
    carried = "count" in parameters
    moments = {n: parameters[f"moments.{n}"].detach() if carried else torch.zeros_like(t) for n, t in theta.items()}
    found = reptile_loss(
        theta,
        episodes,
        episodes.batches,
        moments,
        parameters["count"].item() if carried else 0,
        reduction=config.outer.reduction,
        carried=carried,
        learning_rate=inner.learning_rate,
        optimizer=inner.optimizer,
        loss=inner.reduction,
        beta2=inner.beta2,
        adam_eps=inner.adam_eps,
        slope=model.slope,
        eps=model.norm_eps,
        norm=model.norm,
        norm_groups=model.norm_groups,
        **_shape(model),
    )
    correct = found["query_logits"].argmax(2) == episodes.query_y
    return ReferenceLoss(
        loss=found["loss"],
        query_logits=found["query_logits"],
        support_losses=found["losses"],
        query_losses=found["query_losses"],
        accuracy=correct.to(found["losses"].dtype).mean(),
    )


def _of_config(config: Any, iteration: int | None) -> tuple[Rule, dict[str, Any]]:
    """The rule that a Config names, and its keywords."""
    model, inner = config.model, config.inner
    rule, own = _RULES[inner.algorithm]
    settings = {name: getattr(inner, name) for name in own} | {
        "slope": model.slope,
        "eps": model.norm_eps,
        "norm": model.norm,
        "norm_groups": model.norm_groups,
    }
    if inner.any_ways:
        settings["ways"] = config.task.of_training().ways
    if rule not in _WITHOUT_INNER_LOOP:
        settings["second_order"] = inner.order == 2 and (iteration is None or iteration >= inner.first_order_iterations)
    if rule is relationnet:  # a network of its own
        return rule, settings | {"loss_type": inner.loss}
    if rule is cavia:  # a network of its own
        modulated = {layer % _CONVOLUTIONS for layer in inner.layers}
        context_in = [*(block in modulated for block in range(_CONVOLUTIONS)), inner.context_at_head]
        return rule, settings | {"context_learning_rate": inner.learning_rate, "context_in": context_in}
    if rule is modgrad:
        layers = sorted({layer % _CONVOLUTIONS for layer in inner.layers})
        settings |= {"rounds": inner.steps, "layers": [f"features.{layer}" for layer in layers]}
    if rule is mamlpp:
        is_early = iteration is not None and iteration < inner.multi_step_iterations
        epoch, epochs = (iteration or 0) // inner.multi_step_epoch, inner.multi_step_iterations / inner.multi_step_epoch
        settings["query_weights"] = step_weights(inner.steps, epoch, epochs) if is_early else None
    return rule, settings | _shape(model)


def _shape(model: Any) -> dict[str, Any]:
    """Keywords of the network that every rule but CAVIA's has."""
    return {name: getattr(model, name) for name in _SHAPE}
