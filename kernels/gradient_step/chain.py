"""gradient_step for autograd, whatever computes it.

With cotangents v of the moved weights, s = <v, w> and t = <v, g> of a task and weight:

    w_bar = f v    g_bar = -(r / d) v    f_bar = s    d_bar = (r / d^2) t    r_bar = -t / d

A second-order meta-gradient differentiates a step once. The derivative of these formulas is plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """One backend's kernels as a differentiable operator; csrc/gradient_step.h says what the kernels take and give.

    Attributes:
        forward: (weights, gradients, rate, rates, factors, divisors) -> moved weights.
        backward: (the same, v, needs) -> gradients of (weights with a factor, gradients, rates, factors, divisors).
        call: how the operator is called where it is registered, with :meth:`apply` as its formula.
        call_backward: the same of its derivative.
    """

    forward: Kernel
    backward: Kernel
    call: Kernel | None = None
    call_backward: Kernel | None = None

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], *numbers: Any) -> list[Tensor]:
        """As the definition; ``numbers`` are (rate, rates, factors, divisors)."""
        moved: list[Tensor] = (self.call or self.apply)(weights, gradients, *numbers)
        return moved

    def apply(self, weights: Sequence[Tensor], gradients: Sequence[Tensor], *numbers: Any) -> list[Tensor]:
        """The operator itself, with its derivatives."""
        return list(_Forward.apply(self, len(weights), *numbers, *weights, *gradients))

    def apply_backward(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], *rest: Any
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """The first derivative, with its own; ``rest`` are the numbers, the cotangents and what is needed."""
        *numbers, v, needs = rest
        found = _Backward.apply(self, len(weights), tuple(needs), *numbers, *weights, *gradients, *v)
        *lists, of_rates, of_factors, of_divisors = found
        factors: Tensor | None = numbers[2]
        scaled = factors.shape[1] if needs[0] and factors is not None else 0
        return lists[:scaled], lists[scaled:], of_rates, of_factors, of_divisors


def needs_of(
    weights: bool, gradients: bool, rates: Tensor | None, factors: Tensor | None, divisors: Tensor | None
) -> tuple[bool, ...]:
    """Which gradients are wanted, in the order of the backward's results."""
    numbers = (tensor is not None and tensor.requires_grad for tensor in (rates, factors, divisors))
    return (weights and factors is not None, gradients, *numbers)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, needs: tuple[bool, ...], *rest: Any) -> tuple[Tensor, ...]:
        rate, rates, factors, divisors, *lists = rest
        ctx.layers, ctx.needs, ctx.rate = layers, needs, rate
        ctx.save_for_backward(rates, factors, divisors, *lists)
        weights, gradients, v = lists[:layers], lists[layers : 2 * layers], lists[2 * layers :]
        of_weights, of_gradients, *numbers = chain.backward(
            weights, gradients, rate, rates, factors, divisors, v, needs
        )
        ctx.mark_non_differentiable(*(found for found, need in zip(numbers, needs[2:], strict=True) if not need))
        return (*of_weights, *of_gradients, *numbers)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        rates, factors, divisors, *lists = ctx.saved_tensors
        layers, count = ctx.layers, len(cotangents) - 3
        scaled = count - layers * ctx.needs[1]
        a, b = cotangents[:scaled], cotangents[scaled:count]
        on_rates, on_factors, on_divisors = (
            cotangent if need else None for cotangent, need in zip(cotangents[count:], ctx.needs[2:], strict=True)
        )
        columns: list[list[Tensor | None]] = [[], [], []]  # gradients of rates, factors, divisors, a column a weight
        lists_bar: list[list[Tensor | None]] = [[], [], []]  # of weights, gradients, v
        for k, (w, g, v) in enumerate(zip(lists[:layers], lists[layers:-layers], lists[-layers:], strict=True)):
            r = ctx.rate if rates is None else rates[:, k].double()
            f, d, on_f, on_d = (_column(table, k) for table in (factors, divisors, on_factors, on_divisors))
            on_r = _column(on_rates, k)
            inverse = 1.0 if d is None else 1 / d
            # <v, g> has the cotangent c, <v, w> on_f
            c = None if on_r is None else -on_r * inverse
            if on_d is not None:
                c = on_d * r * inverse**2 + (0.0 if c is None else c)
            v_bar = _sum([(f, a[k] if k < scaled else None), (-r * inverse, b[k] if b else None), (on_f, w), (c, g)])
            lists_bar[0].append(_sum([(on_f, v)]))
            lists_bar[1].append(_sum([(c, v)]))
            lists_bar[2].append(v_bar)
            t = _inner(v, g)
            q = _inner(b[k], v) if b else torch.zeros_like(t)
            columns[0].append(-q * inverse + (0.0 if on_d is None else t * on_d * inverse**2))
            if f is not None:
                columns[1].append(_inner(a[k], v) if k < scaled else torch.zeros_like(f))
            if d is not None:
                of_d = q * r * inverse**2
                of_d = of_d - (0.0 if on_d is None else 2 * t * on_d * r * inverse**3)
                columns[2].append(of_d + (0.0 if on_r is None else t * on_r * inverse**2))
        numbers = (_joined(table, found) for table, found in zip((rates, factors, divisors), columns, strict=True))
        return None, None, None, None, *numbers, *lists_bar[0], *lists_bar[1], *lists_bar[2]


# numbers in float64, as the kernels have them


def _column(table: Tensor | None, layer: int) -> Tensor | None:
    return None if table is None or layer >= table.shape[1] else table[:, layer].double()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Of each task, ``[T]``."""
    return (a.double() * b.double()).flatten(1).sum(1)


def _sum(terms: Sequence[tuple[Tensor | float | None, Tensor | None]]) -> Tensor | None:
    """``number * tensor`` of the terms that there are; numbers are one or ``[T or 1]``."""
    total: Tensor | None = None
    for number, tensor in terms:
        if number is None or tensor is None:
            continue
        if isinstance(number, Tensor):
            number = number.view(-1, *[1] * (tensor.ndim - 1)).to(tensor.dtype)
        total = number * tensor if total is None else total + number * tensor
    return total


def _joined(table: Tensor | None, columns: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient of a table ``[T or 1, L]``."""
    if table is None:
        return None
    found = torch.stack([column for column in columns if isinstance(column, Tensor)], 1).to(table.dtype)
    return found if len(found) == len(table) else found.sum(0, keepdim=True)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, layers: int, rate: float, *rest: Any) -> tuple[Tensor, ...]:
        rates, factors, divisors, *lists = rest
        ctx.chain, ctx.layers, ctx.rate = chain, layers, rate
        ctx.save_for_backward(rates, factors, divisors, *lists)
        return tuple(chain.forward(lists[:layers], lists[layers:], rate, rates, factors, divisors))

    @staticmethod
    def backward(ctx: Any, *v: Tensor) -> tuple[Tensor | None, ...]:
        chain: Chain = ctx.chain
        layers: int = ctx.layers
        rates, factors, divisors, *lists = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:]
        needs = needs_of(any(wanted[:layers]), any(wanted[layers:]), rates, factors, divisors)
        arguments = lists[:layers], lists[layers:], ctx.rate, rates, factors, divisors, v, needs
        scaled, moved, *numbers = (chain.call_backward or chain.apply_backward)(*arguments)
        of_weights = [*scaled, *v[len(scaled) :]]  # a factor of 1
        of_gradients = moved or [None] * layers
        of_numbers = (found if need else None for found, need in zip(numbers, needs[2:], strict=True))
        return None, None, None, *of_numbers, *of_weights, *of_gradients
