"""conv_block for autograd, whatever computes it: the block, its first and its second derivative (MATH.md 1 and 2).

The forward kernel gives the convolution's output ``y`` too, and the backward reads it as an input of its own. The
double backward can then return y's gradient as it is; autograd adds it to what the outer pass sends to the same block,
and the backward turns both into the gradients of input and weight at once: six units of convolution in the outer pass
instead of eight. The first layer has no ``y``: its derivatives are closed forms of the patch statistics.

Memory: a block without pooling keeps ``y``; its output, which the next block would keep as its input, is made from
``y`` again, and ``y`` itself where its convolution is cheap (:mod:`cxgrad_fast.kernels.recompute`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.conv_block import reference
from cxgrad_fast.kernels.recompute import Recipe, Recipes, attach, recipe_of
from cxgrad_fast.kernels.registration import refuse_third, wanted

Kernel = Callable[..., Any]

_CHEAP = 27  # products for one value of a convolution of few channels: as cheap as reading the value back


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/conv_block.h says what the kernels take and give.

    Attributes:
        forward: (x, weight, scale, bias, eps, slope, pool, patch mean, patch covariance) ->
            (out, y, selected, corners, moments).
        backward: -> (dx, dweight, dscale, dbias, deps, sparse).
        double_backward: -> gradients of (q, x, weight, scale, eps, y).
        convolution: (x, weight) -> y.
        activation: (y, scale, bias, eps, moments, slope) -> out, without pooling.
        call: how the block calls its operator where that is registered, with :meth:`apply` as its formula.
        call_backward: the same of its derivative.
        call_double_backward: and of that one's.
    """

    forward: Kernel
    backward: Kernel
    double_backward: Kernel
    convolution: Kernel
    activation: Kernel
    call: Kernel | None = None
    call_backward: Kernel | None = None
    call_double_backward: Kernel | None = None

    def block(
        self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor | float, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the definition, with its options; group norm and given statistics are left to it."""
        if options["norm"] != "batch" or options["statistics"] is not None:
            return reference.conv_block(x, weight, scale, bias, eps, **options)
        pool = options["pool"]
        slope = 1.0 if options["slope"] is None else options["slope"]  # LeakyReLU of slope 1 is no activation
        tasks, channels = weight.shape[:2]
        if not isinstance(eps, Tensor):
            # not of x: a traced program makes it once for all blocks
            eps = torch.full((tasks,), eps, dtype=x.dtype, device=x.device)
        mean, covariance = options["patch_statistics"] or (None, None)
        g, b = (each if len(each) == tasks else each.expand(tasks, channels) for each in (scale, bias))
        out, y, _, _, moments = (self.call or self.apply)(x, weight, g, b, eps, slope, pool, mean, covariance)
        if not pool and out.requires_grad and not torch.compiler.is_compiling():
            made_from = recipe_of(y) or y.detach()
            attach(out, Recipe(self.activation, (made_from, g.detach(), b.detach(), eps.detach(), moments, slope)))
        mean, variance = moments.to(x.dtype).unbind(1)
        return out, mean, variance

    def apply(self, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """The operator itself, with its derivatives."""
        weight, pool, patch_mean = rest[0], rest[5], rest[6]
        cheap = weight.shape[3] == 1 or weight.shape[2:].numel() <= _CHEAP
        recipes = Recipes([(x, recipe_of(x))], more=cheap and not pool and patch_mean is None)
        with recipes.keeping():
            return _Forward.apply(self, recipes, x, *rest)

    def apply_backward(self, q: Tensor, y_gradient: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        """The first derivative, with its own."""
        with Recipes((tensor, recipe_of(tensor)) for tensor in (q, rest[0], rest[5])).keeping():  # x and y
            return _Backward.apply(self, q, *rest, y_gradient)

    def apply_double_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """The second derivative, which has none."""
        return _DoubleBackward.apply(self, *arguments)


class _DoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, *arguments: Any) -> tuple[Tensor, ...]:
        return chain.double_backward(*arguments)

    backward = staticmethod(refuse_third("conv_block"))


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *tensors, slope, pool, patch_mean, patch_covariance, need_x, need_weight, y_gradient = rest
        outputs = chain.backward(q, y_gradient, *rest[:-1])
        dx, dweight, dscale, dbias, _, sparse = outputs
        ctx.save_for_backward(q, *tensors, dscale, dbias, sparse, patch_mean, patch_covariance)
        ctx.chain, ctx.options, ctx.with_y = chain, (slope, pool), y_gradient is not None
        unwanted = [] if need_weight else [dweight]
        if not need_x or patch_mean is not None:
            unwanted.append(dx)
        ctx.mark_non_differentiable(sparse, *unwanted)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.with_y:  # a derivative of a second derivative's sum
            refuse_third("conv_block")(ctx)
        *saved, patch_mean, patch_covariance = ctx.saved_tensors
        patches = (patch_mean, patch_covariance)
        chain: Chain = ctx.chain
        arguments: list[Any] = [*cotangents[:5], *saved, *ctx.options, *patches, wanted(ctx, 2, 1), wanted(ctx, 3, 1)]
        q, x, weight, scale, eps, y = (chain.call_double_backward or chain.apply_double_backward)(*arguments)
        return None, q, _or_none(x), _or_none(weight), scale, None, eps, _or_none(y), *[None] * 10


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, recipes: Recipes, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weight, scale, bias, eps, slope, pool, patch_mean, patch_covariance = rest
        outputs = chain.forward(x, *rest)
        out, y, selected, corners, moments = outputs
        ctx.recipes = recipe_of(x), None
        if recipes.more:
            ctx.recipes = recipe_of(x), Recipe(chain.convolution, (recipe_of(x) or x.detach(), weight.detach()))
            attach(y, ctx.recipes[1])
            recipes.add(y, ctx.recipes[1])
        ctx.save_for_backward(x, weight, scale, bias, eps, y, selected, corners, moments, patch_mean, patch_covariance)
        ctx.chain, ctx.options, ctx.shape = chain, (slope, pool), out.shape
        ctx.mark_non_differentiable(selected, corners, moments, *([] if patch_mean is None else [y]))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, q: Tensor | None, y_gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *saved, patch_mean, patch_covariance = ctx.saved_tensors
        for tensor, recipe in zip((saved[0], saved[5]), ctx.recipes, strict=True):
            if recipe is not None:  # the first derivative keeps them likewise
                attach(tensor, recipe)
        if q is None:
            q = saved[0].new_zeros(ctx.shape)
        patches = (patch_mean, patch_covariance)
        chain: Chain = ctx.chain
        arguments: list[Any] = [q, y_gradient, *saved, *ctx.options, *patches, wanted(ctx, 2, 2), wanted(ctx, 3, 2)]
        dx, dweight, dscale, dbias, deps, _sparse = (chain.call_backward or chain.apply_backward)(*arguments)
        return None, None, _or_none(dx), _or_none(dweight), dscale, dbias, deps, None, None, None, None


def _or_none(tensor: Tensor) -> Tensor | None:
    """Operators return an empty vector for a gradient that nobody wanted."""
    return None if tensor.shape == (0,) else tensor
