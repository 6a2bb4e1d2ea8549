"""Tensors that autograd keeps as the way to make them again.

A backward pass needs the inputs and outputs of its operators. Where one follows from another that is kept anyway by a
pass over memory (an activation from what it normalises) or by little arithmetic (a 1x1 convolution), keeping the second
as well only costs memory. An operator attaches the recipe to its result with :func:`attach`; whoever saves that tensor
does so within :func:`keeping`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NAME = "_cxgrad_recipe"


@dataclass(frozen=True)
class Recipe:
    """``make(*arguments)`` is the tensor, to the bit; recipes among the arguments are made first."""

    make: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.make(*(part() if isinstance(part, Recipe) else part for part in self.arguments))


def attach(tensor: Tensor, recipe: Recipe) -> None:
    """Say how ``tensor`` can be made again."""
    setattr(tensor, _NAME, recipe)


def recipe_of(tensor: Tensor) -> Recipe | None:
    """What was attached to this very tensor."""
    return getattr(tensor, _NAME, None)


class Recipes:
    """The recipes of a call's tensors, by their memory: what autograd hands to its hooks are aliases.

    Attributes:
        more: whether the call will add some.
    """

    def __init__(self, known: Iterable[tuple[Tensor, Recipe | None]] = (), more: bool = False) -> None:
        self.more = more
        self._known: dict[tuple[int, torch.Size], Recipe] = {}
        for tensor, recipe in known:
            self.add(tensor, recipe)

    def add(self, tensor: Tensor, recipe: Recipe | None) -> None:
        """From here on ``tensor`` is kept as ``recipe``, if there is one; one without memory (traced) as it is."""
        if recipe is not None and type(tensor) is Tensor:
            self._known[_key(tensor)] = recipe

    def keeping(self) -> AbstractContextManager[Any]:
        """Within it autograd saves these tensors as their recipes; hooks around it see only calls that have none."""
        if not self.more and not self._known:
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | Recipe:
        return self._known.get(_key(tensor), tensor) if type(tensor) is Tensor else tensor


def _key(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _unpack(kept: Tensor | Recipe) -> Tensor:
    return kept() if isinstance(kept, Recipe) else kept
