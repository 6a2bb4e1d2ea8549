"""scaling_factors for autograd, whatever computes it: its graph keeps nothing but the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import refuse_third, wanted

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/scaling_factors.h says what the kernels take and give.

    ``scaler`` is (context, w0, b0, w2, b2), ``options`` (norm_eps, least).

    Attributes:
        forward: (*scaler, *options) -> (gammas, eps).
        backward: (v, e, *scaler, *options, needed) -> gradients of the scaler.
        double_backward: (five cotangents of those, v, e, *scaler, *options, needed) -> gradients of (v, e, *scaler).
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

    def factors(
        self, context: Tensor, w0: Tensor, b0: Tensor, w2: Tensor, b2: Tensor, *, norm_eps: float, least: float
    ) -> tuple[Tensor, Tensor]:
        """As the definition."""
        gammas, eps = (self.call or self.apply)(context, w0, b0, w2, b2, norm_eps, least)
        return gammas, eps

    def apply(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The operator itself, with its derivatives."""
        return _Forward.apply(self, *arguments)

    def apply_backward(self, v: Tensor | None, e: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        """The first derivative, with its own."""
        return _Backward.apply(self, *rest[:5], v, e, *rest[5:])

    def apply_double_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The second derivative, which has none."""
        return _DoubleBackward.apply(self, *arguments)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, ...]:
        return chain.double_backward(*arguments)

    backward = staticmethod(refuse_third("scaling_factors"))


class _Backward(torch.autograd.Function):
    """The scaler comes before the cotangents, so that what may be missing is behind."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, ...]:
        *scaler, v, e, norm_eps, least, needed = arguments
        ctx.save_for_backward(v, e, *scaler)
        ctx.chain, ctx.options = chain, (norm_eps, least)
        ctx.set_materialize_grads(False)
        gradients: tuple[Tensor, ...] = tuple(chain.backward(v, e, *scaler, norm_eps, least, needed))
        ctx.mark_non_differentiable(*(gradient for gradient, need in zip(gradients, needed, strict=True) if not need))
        return gradients

    @staticmethod
    def backward(ctx: Any, *on: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        v, e, *scaler = ctx.saved_tensors
        needed = [
            v is not None and wanted(ctx, 6, 1),
            e is not None and wanted(ctx, 7, 1 if v is not None else 2),
            *(wanted(ctx, index, 1) for index in range(1, 6)),
        ]
        call = chain.call_double_backward or chain.apply_double_backward
        v_bar, e_bar, *scaler_bar = _those_needed(call(*on, v, e, *scaler, *ctx.options, needed), needed)
        return None, *scaler_bar, v_bar, e_bar, None, None, None


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, Tensor]:
        *scaler, norm_eps, least = arguments
        ctx.save_for_backward(*scaler)
        ctx.chain, ctx.options = chain, (norm_eps, least)
        ctx.set_materialize_grads(False)
        gammas, eps = chain.forward(*arguments)
        return gammas, eps

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, e: Tensor | None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        needed = [wanted(ctx, index, 1) for index in range(1, 6)]
        call = chain.call_backward or chain.apply_backward
        return None, *_those_needed(call(v, e, *ctx.saved_tensors, *ctx.options, needed), needed), None, None


def _those_needed(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Operators return an empty vector for a gradient that nobody needs."""
    return [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
