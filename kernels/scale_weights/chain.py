"""scale_weights for autograd, whatever computes it (MATH.md 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import refuse_third

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/weights.h says what the kernels take and give.

    Attributes:
        forward: (weights, gammas) -> the scaled weights.
        backward: (weights, gammas, v) -> gradients of (weights, gammas).
        double_backward: (weights, gammas, v, a, c) -> gradients of (weights, gammas, v).
        call_backward: how the derivative is called where it is registered, with :meth:`apply_backward` as its formula.
        call_double_backward: the same of its derivative.
    """

    forward: Kernel
    backward: Kernel
    double_backward: Kernel
    call_backward: Kernel | None = None
    call_double_backward: Kernel | None = None

    def apply(self, weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
        """The operator itself, with its derivatives."""
        return list(_Forward.apply(self, gammas, *weights))

    def apply_backward(
        self, weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """The first derivative, with its own."""
        gammas_bar, *weights_bar = _Backward.apply(self, len(weights), gammas, *weights, *v)
        return weights_bar, gammas_bar

    def apply_double_backward(
        self, weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor], a: Sequence[Tensor], c: Tensor
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The second derivative, which has none."""
        gammas_bar, *lists = _DoubleBackward.apply(self, len(weights), gammas, c, *weights, *v, *a)
        return lists[: len(weights)], gammas_bar, lists[len(weights) :]


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, gammas: Tensor, c: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        weights, v, a = lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]
        weights_bar, gammas_bar, v_bar = chain.double_backward(weights, gammas, v, a, c)
        return gammas_bar, *weights_bar, *v_bar

    backward = staticmethod(refuse_third("scale_weights"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, gammas: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        ctx.chain, ctx.layers = chain, layers
        ctx.save_for_backward(gammas, *lists)
        weights_bar, gammas_bar = chain.backward(lists[:layers], gammas, lists[layers:])
        return gammas_bar, *weights_bar

    @staticmethod
    def backward(ctx: Any, c: Tensor, *a: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        gammas, *lists = ctx.saved_tensors
        weights, v = lists[: ctx.layers], lists[ctx.layers :]
        call = chain.call_double_backward or chain.apply_double_backward
        weights_bar, gammas_bar, v_bar = call(weights, gammas, v, a, c)
        return None, None, gammas_bar, *weights_bar, *v_bar


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, gammas: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.chain = chain
        ctx.save_for_backward(gammas, *weights)
        return tuple(chain.forward(weights, gammas))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        gammas, *weights = ctx.saved_tensors
        weights_bar, gammas_bar = (chain.call_backward or chain.apply_backward)(weights, gammas, v)
        return None, gammas_bar, *weights_bar
