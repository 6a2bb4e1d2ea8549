"""residual_end for autograd, whatever computes it: piecewise linear, so that its graph keeps one byte an output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.recompute import Recipe, attach
from cxgrad_fast.kernels.registration import refuse_third

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/residual_end.h says what the kernels take and give.

    Attributes:
        forward: (x, shortcut, slope, pool, padding) -> (out, codes).
        backward: (q, codes, height, width, slope, pool, padding) -> the gradient of x, and of shortcut.
        double_backward: (cotangent, codes, slope, pool, padding) -> the gradient of q.
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

    def end(self, x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int) -> Tensor:
        """As the definition."""
        out: Tensor = (self.call or self.apply)(x, shortcut, slope, pool, padding)[0]
        return out

    def apply(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The operator itself, with its derivatives."""
        return _Forward.apply(self, *arguments)

    def apply_backward(self, *arguments: Any) -> Tensor:
        """The first derivative, with its own."""
        return _Backward.apply(self, *arguments)

    def apply_double_backward(self, *arguments: Any) -> Tensor:
        """The second derivative, which has none."""
        return _DoubleBackward.apply(self, *arguments)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> Tensor:
        return chain.double_backward(*arguments)

    backward = staticmethod(refuse_third("residual_end"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, q: Tensor, codes: Tensor, *sizes_and_options: Any) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.chain, ctx.options = chain, sizes_and_options[2:]
        return chain.backward(q, codes, *sizes_and_options)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        (codes,) = ctx.saved_tensors
        call = chain.call_double_backward or chain.apply_double_backward
        return None, call(cotangent, codes, *ctx.options), *[None] * 6


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, shortcut: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, codes = chain.forward(x, shortcut, *options)
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(codes)
        ctx.chain, ctx.options, ctx.size = chain, options, x.shape[3:]
        return out, codes

    @staticmethod
    def backward(ctx: Any, q: Tensor, _: None) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        (codes,) = ctx.saved_tensors
        arguments = (codes, *ctx.size, *ctx.options)
        gradient: Tensor = (chain.call_backward or chain.apply_backward)(q, *arguments)
        if gradient.requires_grad and not torch.compiler.is_compiling():
            # the two convolutions that it goes to would each keep it; a quarter of its size is kept anyway
            attach(gradient, Recipe(chain.backward, (q.detach(), *arguments)))
        return None, gradient, gradient, None, None, None
