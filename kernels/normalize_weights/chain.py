"""normalize_weights for autograd, whatever computes it (MATH.md 3 with a factor of 1, and the norms as outputs)."""

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
        forward: (weights) -> (units, norms).
        backward: (weights, v, n) -> gradients of weights.
        double_backward: (weights, v, n, a) -> gradients of (weights, v, n).
        call_backward: how the derivative is called where it is registered, with :meth:`apply_backward` as its formula.
        call_double_backward: the same of its derivative.
    """

    forward: Kernel
    backward: Kernel
    double_backward: Kernel
    call_backward: Kernel | None = None
    call_double_backward: Kernel | None = None

    def apply(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The operator itself, with its derivatives."""
        norms, *units = _Forward.apply(self, *weights)
        return units, norms

    def apply_backward(self, weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor) -> list[Tensor]:
        """The first derivative, with its own."""
        return list(_Backward.apply(self, len(weights), n, *weights, *v))

    def apply_double_backward(
        self, weights: Sequence[Tensor], v: Sequence[Tensor], n: Tensor, a: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The second derivative, which has none."""
        n_bar, *lists = _DoubleBackward.apply(self, len(weights), n, *weights, *v, *a)
        return lists[: len(weights)], lists[len(weights) :], n_bar


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, n: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        weights, v, a = lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]
        weights_bar, v_bar, n_bar = chain.double_backward(weights, v, n, a)
        return n_bar, *weights_bar, *v_bar

    backward = staticmethod(refuse_third("normalize_weights"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, n: Tensor, *lists: Tensor) -> tuple[Tensor, ...]:
        ctx.chain, ctx.layers = chain, layers
        ctx.save_for_backward(n, *lists)
        return tuple(chain.backward(lists[:layers], lists[layers:], n))

    @staticmethod
    def backward(ctx: Any, *a: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        n, *lists = ctx.saved_tensors
        weights, v = lists[: ctx.layers], lists[ctx.layers :]
        call = chain.call_double_backward or chain.apply_double_backward
        weights_bar, v_bar, n_bar = call(weights, v, n, a)
        return None, None, n_bar, *weights_bar, *v_bar


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.chain = chain
        ctx.save_for_backward(*weights)
        units, norms = chain.forward(weights)
        return norms, *units

    @staticmethod
    def backward(ctx: Any, n: Tensor, *v: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        return None, *(chain.call_backward or chain.apply_backward)(ctx.saved_tensors, v, n)
