"""gradient_step in Triton: all tensors and tasks in one launch, and one more where numbers have gradients.

A program makes a block of one task's row of a tensor, and in the backward the block's part of <v, w> and <v, g>; the
second launch adds the parts up, in a fixed order and in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.gradient_step import reference
from cxgrad_fast.kernels.gradient_step.chain import Chain
from cxgrad_fast.kernels.triton_rows import LAYERS_AT_ONCE, choose, layer_of, load

_BLOCK = 1024
_WARPS = 4


@triton.jit
def _number(table, task, layer, columns, OTHERWISE: tl.constexpr):
    """A task's number for a layer from ``[T, columns]``, in float64; layers beyond the columns have the other one."""
    number = tl.full((), OTHERWISE, tl.float64)
    if table is not None:
        there = layer < columns
        found = tl.load(table + task * columns + layer, mask=there, other=0.0).to(tl.float64)
        number = tl.where(there, found, number)
    return number


@triton.jit
def _rate_of(rates, task, layer, layers, RATE: tl.constexpr, ROWS: tl.constexpr):
    number = tl.full((), RATE, tl.float64)
    if rates is not None:
        row = layer + task * layers if ROWS > 1 else layer
        number = tl.load(rates + row).to(tl.float64)
    return number


@triton.jit(do_not_specialize=["first", "layers", "scaled", "divided"])
def _step(
    weights,
    gradients,
    v,
    rates,
    factors,
    divisors,
    out,
    of_gradients,
    parts,
    first,
    layers,
    scaled,
    divided,
    SIZES: tl.constexpr,
    STEPS: tl.constexpr,
    STARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATE: tl.constexpr,  # a launch's argument would be float32
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of ``f w - r/d g``; where there is v, of ``f v`` and ``-r/d v``, with its parts [T, 2, BLOCKS] of sums.

    STEPS: elements from a task's weight to the next one's, 0 where all tasks share it.
    """
    precision: tl.constexpr = tl.float64 if WIDE else tl.float32
    program, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    here = layer_of(program, STARTS, LAYERS)
    size = choose(SIZES, here, LAYERS)
    at = (program - choose(STARTS, here, LAYERS)) * BLOCK + tl.arange(0, BLOCK)
    layer = first + here
    f = _number(factors, task, layer, scaled, 1.0)
    of_gradient = -_rate_of(rates, task, layer, layers, RATE, ROWS) / _number(divisors, task, layer, divided, 1.0)
    w_row = choose(weights, here, LAYERS) + task * choose(STEPS, here, LAYERS)
    row = task * size
    if v is None:
        w = load(w_row, at, size, precision)
        g = load(choose(gradients, here, LAYERS) + row, at, size, precision)
        moved = f.to(precision) * w + of_gradient.to(precision) * g
        to = choose(out, here, LAYERS) + row + at
        tl.store(to, moved.to(to.dtype.element_ty), mask=at < size)
    else:
        v_here = load(choose(v, here, LAYERS) + row, at, size, precision)
        if out is not None:
            to = choose(out, here, LAYERS) + row + at
            tl.store(to, (f.to(precision) * v_here).to(to.dtype.element_ty), mask=(at < size) & (layer < scaled))
        if of_gradients is not None:
            to = choose(of_gradients, here, LAYERS) + row + at
            tl.store(to, (of_gradient.to(precision) * v_here).to(to.dtype.element_ty), mask=at < size)
        if parts is not None:
            w = load(w_row, at, size, tl.float64)
            g = load(choose(gradients, here, LAYERS) + row, at, size, tl.float64)
            to_part = parts + task * 2 * BLOCKS + program
            tl.store(to_part, tl.sum(v_here.to(tl.float64) * w))
            tl.store(to_part + BLOCKS, tl.sum(v_here.to(tl.float64) * g))


@triton.jit(do_not_specialize=["first", "layers", "scaled", "divided"])
def _numbers(
    parts,
    rates,
    divisors,
    of_rates,
    of_factors,
    of_divisors,
    first,
    layers,
    scaled,
    divided,
    STARTS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RATE: tl.constexpr,  # a launch's argument would be float32
    ROWS: tl.constexpr,
    LONGEST: tl.constexpr,
):
    """A task's gradients of a layer's rate, factor and divisor; of_rates is [T, layers] whatever rates is."""
    here, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = first + here
    start = choose(STARTS, here, LAYERS)
    end = BLOCKS
    for other in tl.static_range(LAYERS - 1, 0, -1):
        end = tl.where(here < other, STARTS[other], end)
    row = parts + task * 2 * BLOCKS
    at = tl.arange(0, LONGEST)
    s = tl.zeros((LONGEST,), tl.float64)
    t = tl.zeros((LONGEST,), tl.float64)
    for block in range(start, end, LONGEST):
        s += load(row, block + at, end, tl.float64)
        t += load(row + BLOCKS, block + at, end, tl.float64)
    s, t = tl.sum(s), tl.sum(t)
    r = _rate_of(rates, task, layer, layers, RATE, ROWS)
    d = _number(divisors, task, layer, divided, 1.0)
    if of_rates is not None:
        to = of_rates + task * layers + layer
        tl.store(to, (-t / d).to(to.dtype.element_ty))
    if of_factors is not None:
        to = of_factors + task * scaled + layer
        tl.store(to, s.to(to.dtype.element_ty), mask=layer < scaled)
    if of_divisors is not None:
        to = of_divisors + task * divided + layer
        tl.store(to, (t / d * r / d).to(to.dtype.element_ty), mask=layer < divided)


def _launch(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    rates: Tensor | None,
    factors: Tensor | None,
    divisors: Tensor | None,
    v: Sequence[Tensor] | None,
    out: Sequence[Tensor],
    of_gradients: Sequence[Tensor],
    numbers: Sequence[Tensor | None],
) -> None:
    tasks, layers = len(weights[0]), len(weights)
    rates, factors, divisors = (None if each is None else each.contiguous() for each in (rates, factors, divisors))
    scaled, divided = (0 if each is None else each.shape[1] for each in (factors, divisors))
    rows = [_by_rows(weight) for weight in weights]
    gradients = [gradient.contiguous() for gradient in gradients]
    v = None if v is None else [each.contiguous() for each in v]
    with_numbers = any(number is not None for number in numbers)
    for first in range(0, layers, LAYERS_AT_ONCE):
        part = slice(first, first + LAYERS_AT_ONCE)
        sizes = tuple(weight[0].numel() for weight in weights[part])
        blocks = [launch.divide(size, _BLOCK) for size in sizes]
        layout: dict[str, Any] = {"STARTS": (0, *accumulate(blocks[:-1])), "LAYERS": len(sizes), "BLOCKS": sum(blocks)}
        layout |= {"RATE": float(rate), "ROWS": 1 if rates is None else len(rates)}
        parts = None
        if with_numbers:
            parts = weights[0].new_empty((tasks, 2, sum(blocks)), dtype=torch.float64)
        # a launch that writes some layers' alone gets pointers for all
        to_weights = [*out, *[weights[0]] * (layers - len(out))][part] if out else ()
        counts = first, layers, scaled, divided
        _step[(sum(blocks), tasks)](
            tuple(row for row, _ in rows[part]),
            tuple(gradients[part]),
            None if v is None else tuple(v[part]),
            rates,
            factors,
            divisors,
            tuple(to_weights) or None,
            tuple(of_gradients[part]) or None,
            parts,
            *counts,
            SIZES=sizes,
            STEPS=tuple(step for _, step in rows[part]),
            WIDE=weights[0].dtype == torch.float64,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            **layout,
            **launch.FUSED,
        )
        if with_numbers:
            longest = min(1024, triton.next_power_of_2(max(blocks)))
            tables = parts, rates, divisors
            _numbers[(len(sizes), tasks)](
                *tables, *numbers, *counts, LONGEST=longest, num_warps=_WARPS, **layout, **launch.FUSED
            )


def _by_rows(weight: Tensor) -> tuple[Tensor, int]:
    """A tensor that holds the tasks' rows, and the elements from one to the next."""
    if weight.stride(0) == 0 and weight[0].is_contiguous():
        return weight[0], 0
    weight = weight.contiguous()
    return weight, weight[0].numel()


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _forward(weights: Sequence[Tensor], gradients: Sequence[Tensor], *numbers: Any) -> list[Tensor]:
    out = _like(weights)
    rate, rates, factors, divisors = numbers
    _launch(weights, gradients, rate, rates, factors, divisors, None, out, [], [None] * 3)
    return out


def _backward(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    rates: Tensor | None,
    factors: Tensor | None,
    divisors: Tensor | None,
    v: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    scaled = _like(weights[: factors.shape[1]]) if needs[0] and factors is not None else []
    moved = _like(gradients) if needs[1] else []
    numbers: list[Tensor | None] = [
        table.new_empty(len(weights[0]), table.shape[1]) if table is not None and need else None
        for table, need in zip((rates, factors, divisors), needs[2:], strict=True)
    ]
    _launch(weights, gradients, rate, rates, factors, divisors, v, scaled, moved, numbers)
    if rates is not None and numbers[0] is not None and len(rates) == 1:
        numbers[0] = numbers[0].sum(0, keepdim=True)
    of_rates, of_factors, of_divisors = (weights[0].new_empty(0) if each is None else each for each in numbers)
    return scaled, moved, of_rates, of_factors, of_divisors


chain = Chain(forward=_forward, backward=_backward)


def gradient_step(weights: Sequence[Tensor], gradients: Sequence[Tensor], *numbers: Any) -> list[Tensor]:
    """The moved weights; see :func:`cxgrad_fast.kernels.gradient_step`. No task is left to the definition."""
    step = chain.step if len(weights[0]) else reference.gradient_step
    return step(weights, gradients, *numbers)
