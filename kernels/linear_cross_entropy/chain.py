"""linear_cross_entropy for autograd, whatever computes it: each derivative is one call (docs/math.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import refuse_third, wanted

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/linear_cross_entropy.h says what they take and give.

    Attributes:
        forward: (x, weight, bias, labels) -> (losses, logits, probabilities).
        backward: (losses gradient, logits gradient, x, weight, bias, labels, probabilities, need x, need weight) ->
            gradients of (x, weight, bias). Of the first two one may be None; a gradient that is not needed is an empty
            vector.
        double_backward: (on x, on weight, on bias, and all that backward takes) -> gradients of (x, weight, bias,
            losses gradient, logits gradient). Of the first three two may be None.
        call: how the operator is called where it is registered, with :meth:`apply` as its formula.
        call_backward: the same of its derivative.
        call_double_backward: and of that one's.
    """

    forward: Kernel
    backward: Kernel
    double_backward: Kernel
    call: Kernel | None = None
    call_backward: Kernel | None = None
    call_double_backward: Kernel | None = None

    def head(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As the definition."""
        losses, logits, _ = (self.call or self.apply)(x, weight, bias, labels)
        return losses, logits

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operator itself, with its derivatives."""
        return _Forward.apply(self, x, weight, bias, labels)

    def apply_backward(
        self, losses_gradient: Tensor | None, logits_gradient: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        """The first derivative, with its own: its probabilities are what x, weight and bias make, no input."""
        return _Backward.apply(self, *rest, losses_gradient, logits_gradient)

    def apply_double_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The second derivative, which has none."""
        return _DoubleBackward.apply(self, *arguments)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, ...]:
        return chain.double_backward(*arguments)

    backward = staticmethod(refuse_third("linear_cross_entropy"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, need_x, need_weight, losses_gradient, logits_gradient = arguments
        dx, dweight, dbias = chain.backward(losses_gradient, logits_gradient, *tensors, need_x, need_weight)
        ctx.save_for_backward(losses_gradient, logits_gradient, *tensors)
        ctx.chain, ctx.needs = chain, (need_x, need_weight)
        ctx.mark_non_differentiable(*([] if need_x else [dx]), *([] if need_weight else [dweight]))
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    def backward(
        ctx: Any, on_x: Tensor | None, on_weight: Tensor | None, on_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        cotangents = (on_x if ctx.needs[0] else None, on_weight if ctx.needs[1] else None, on_bias)
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * 10
        given = ctx.saved_tensors
        need_x, need_weight = wanted(ctx, 1, 1), wanted(ctx, 2, 1)
        call = chain.call_double_backward or chain.apply_double_backward
        x, weight, bias, *rest = call(*cotangents, *given, need_x, need_weight)
        losses, logits = (None if had is None else made for had, made in zip(given[:2], rest, strict=True))
        return None, x if need_x else None, weight if need_weight else None, bias, *[None] * 4, losses, logits


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chain: Chain, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, logits, probabilities = chain.forward(x, weight, bias, labels)
        ctx.save_for_backward(x, weight, bias, labels, probabilities)
        ctx.mark_non_differentiable(probabilities)
        ctx.set_materialize_grads(False)
        ctx.chain = chain
        return losses, logits, probabilities

    @staticmethod
    def backward(
        ctx: Any, losses_gradient: Tensor | None, logits_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        if losses_gradient is None and logits_gradient is None:
            return (None,) * 5
        need_x, need_weight = wanted(ctx, 1, 1), wanted(ctx, 2, 1)
        call = chain.call_backward or chain.apply_backward
        dx, dweight, dbias = call(losses_gradient, logits_gradient, *ctx.saved_tensors, need_x, need_weight)
        return None, dx if need_x else None, dweight if need_weight else None, dbias, None
