"""The oracle's loss of a batch of tasks: one task after the other, by the rule of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Rule = Callable[..., dict[str, Any]]


class Episodes(Protocol):
    """Any object with the fields of :class:`cxgrad_fast.Episodes`."""

    @property
    def support_x(self) -> Tensor: ...
    @property
    def support_y(self) -> Tensor: ...
    @property
    def query_x(self) -> Tensor: ...
    @property
    def query_y(self) -> Tensor: ...


def over_tasks(
    rule: Rule, parameters: Mapping[str, Tensor], episodes: Episodes, *, reduction: str = "mean", **settings: Any
) -> dict[str, Any]:
    """What ``rule`` returns for each task, stacked along a first axis of tasks, with the loss of all.

    Args:
        rule: the function of an algorithm, for one task.
        parameters: by our names, requiring gradients.
        episodes: ``T`` tasks, any object with the fields of :class:`cxgrad_fast.Episodes`.
        reduction: of the tasks' losses, ``mean`` or ``sum``.
        settings: the rule's keywords.

    Returns:
        ``loss``, differentiable; ``losses`` [T, passes]; ``query_logits`` [T, Q, N]; ``adapted``: name -> [T, ...];
        whatever else the rule returns, but ``passes``, which stays a list with an entry a task.
    """
    sets = zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True)
    tasks = [
        rule(parameters, support_x, support_y.long(), query_x, query_y.long(), **settings)
        for support_x, support_y, query_x, query_y in sets
    ]
    passes = [task.pop("passes", []) for task in tasks]
    found: dict[str, Any] = _stacked(tasks)
    loss = found["loss"].mean() if reduction == "mean" else found["loss"].sum()
    return found | {"loss": loss, "passes": passes}


def _stacked(values: Sequence[Any]) -> Any:
    """Tensors stacked; dicts and lists of tensors entry by entry."""
    if not values:
        return torch.empty(0)
    if isinstance(values[0], Mapping):
        return {name: _stacked([value[name] for value in values]) for name in values[0]}
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return _stacked([_stacked(value) for value in values])
