"""scale_weights in Triton, and the kernels that it shares with normalize_weights (MATH.md 3).

Everything is inner products of rows, a few numbers made of them, and linear combinations of rows, where a row is a
weight of one task (or the shared one), or what has its shape. With N = |w|, u = w / N, a factor f (gamma or 1):

    h = f / N    s = <u, v>    t = <u, a>    q = <a, v>
    m = (c - h t) / N    o = (n - h s) / N    k = -(h (q - 3 s t) + c s + n t) / N^2

    value             out = h w
    backward          w_bar = h v + o w                                  factor_bar = s
    double backward   w_bar = m v + o a + k w      v_bar = h a + m w     factor_bar = (q - s t) / N      n_bar = t

All layers and tasks are one launch: a program sums its row, and makes one part of the results. Every program of a row
sums all of it, each for itself and in the same order: reading 80 KiB again is faster than to wait for another program.
Where rows are long, or a weight is shared by tasks that each have a v, blocks are summed by a launch before. The inner
products are float64, in which those of float32 numbers are exact; the combinations have the weights' own precision, in
which powers of two keep the factors of rows near their norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import cases, launch
from cxgrad_fast.kernels.scale_weights import reference
from cxgrad_fast.kernels.scale_weights.chain import Chain
from cxgrad_fast.kernels.triton_rows import LAYERS_AT_ONCE, choose, layer_of, load

_SHORT = 40960  # entries of a row that every program of it may sum
_PROGRAMS = 128  # as many as run at once on a large device
_ORDERS = ("value", "backward", "double_backward")
_PRODUCTS = (1, 2, 4)  # inner products of each order


# --- kernels ---


@triton.jit
def _add_products(w, v, a, at, size, ww, wv, wa, av, ORDER: tl.constexpr):
    """The entries' products, added to those of other blocks."""
    w_there = load(w, at, size, tl.float64)
    ww += w_there * w_there
    if ORDER > 0:
        v_there = load(v, at, size, tl.float64)
        wv += w_there * v_there
        if ORDER > 1:
            a_there = load(a, at, size, tl.float64)
            wa += w_there * a_there
            av += a_there * v_there
    return ww, wv, wa, av


@triton.jit
def _coefficients(ww, wv, wa, av, f, c, n):
    """(N, s, t, q, h, m, o, k)"""
    norm = tl.sqrt(ww)
    s, t, h = wv / norm, wa / norm, f / norm
    m, o = (c - h * t) / norm, (n - h * s) / norm
    return norm, s, t, av, h, m, o, -(h * (av - 3 * s * t) + c * s + n * t) / ww


@triton.jit
def _powers_of_two(norm):
    """One near 1 / norm and its inverse, float32: they round nothing, and a row times the first is about one."""
    exponent = ((norm.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    return ((127 - exponent) << 23).to(tl.float32, bitcast=True), ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sums_of_row(w, v, a, size, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float64)
    ww, wv, wa, av = zero, zero, zero, zero
    for block in range(tl.cdiv(size, BLOCK)):
        at = block * BLOCK + tl.arange(0, BLOCK)
        ww, wv, wa, av = _add_products(w, v, a, at, size, ww, wv, wa, av, ORDER)
    return tl.sum(ww), tl.sum(wv), tl.sum(wa), tl.sum(av)


@triton.jit
def _sums_of_blocks(parts, count, BLOCKS: tl.constexpr, ORDER: tl.constexpr, LONGEST: tl.constexpr):
    """The same from ``count`` blocks, which lie side by side for every product."""
    at = tl.arange(0, LONGEST)
    ww = tl.sum(load(parts, at, count, tl.float64))
    wv, wa, av = ww, ww, ww
    if ORDER > 0:
        wv = tl.sum(load(parts + BLOCKS, at, count, tl.float64))
    if ORDER > 1:
        wa = tl.sum(load(parts + 2 * BLOCKS, at, count, tl.float64))
        av = tl.sum(load(parts + 3 * BLOCKS, at, count, tl.float64))
    return ww, wv, wa, av


@triton.jit
def _given(factors, c, n, task, tasks, layer, columns, shared, ORDER: tl.constexpr, NORMALIZE: tl.constexpr, TASKS):
    """(f, c, n) of a task and layer; a shared weight has one norm, of which every task has a cotangent."""
    zero = tl.full((), 0.0, tl.float64)
    f, c_here, n_here = zero + 1.0, zero, zero
    at = task * columns + layer
    if not NORMALIZE:
        f = tl.load(factors + at).to(tl.float64)
        if ORDER > 1:
            c_here = tl.load(c + at).to(tl.float64)
    elif ORDER > 0:
        other = tl.arange(0, TASKS)
        wanted = tl.where(shared, other < tasks, other == task)
        n_here = tl.sum(tl.load(n + other * columns + layer, mask=wanted, other=0.0).to(tl.float64))
    return f, c_here, n_here


@triton.jit
def _sum_blocks(
    weights,
    v,
    a,
    partials,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    SHARED: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials [T, PRODUCTS, BLOCKS]: inner products of every block of every layer."""
    program, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = layer_of(program, STARTS, LAYERS)
    size = choose(SIZES, layer, LAYERS)
    row = tl.where(choose(SHARED, layer, LAYERS) > 0, 0, task) * size
    at = (program - choose(STARTS, layer, LAYERS)) * BLOCK + tl.arange(0, BLOCK)
    w = choose(weights, layer, LAYERS) + row
    v_row, a_row = w, w
    if ORDER > 0:
        v_row = choose(v, layer, LAYERS) + (row if NORMALIZE else task * size)
    if ORDER > 1:
        a_row = choose(a, layer, LAYERS) + row
    zero = tl.zeros((BLOCK,), tl.float64)
    ww, wv, wa, av = _add_products(w, v_row, a_row, at, size, zero, zero, zero, zero, ORDER)
    to = partials + task * (PRODUCTS * BLOCKS) + program
    tl.store(to, tl.sum(ww))
    if ORDER > 0:
        tl.store(to + BLOCKS, tl.sum(wv))
    if ORDER > 1:
        tl.store(to + 2 * BLOCKS, tl.sum(wa))
        tl.store(to + 3 * BLOCKS, tl.sum(av))


@triton.jit(do_not_specialize=["tasks", "columns"])
def _combine(
    weights,
    v,
    a,
    factors,
    c,
    n,
    partials,
    out,
    v_bar,
    numbers,
    tasks,
    columns,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    SHARED: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPAN: tl.constexpr,
    ORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SUMMED: tl.constexpr,
    LONGEST: tl.constexpr,
    TASKS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """SPAN blocks of a row of the results; factors, c, n and numbers are [T, layers] with ``columns`` to a row.

    ``SUMMED``: the inner products come from partials [T, PRODUCTS, BLOCKS], at most LONGEST blocks a row. The gradient
    of a weight that tasks share is summed over them by the first task's programs.
    """
    precision: tl.constexpr = tl.float64 if WIDE else tl.float32
    program, task = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = layer_of(program, STARTS, LAYERS)
    size, start = choose(SIZES, layer, LAYERS), choose(STARTS, layer, LAYERS)
    shared = choose(SHARED, layer, LAYERS) > 0
    row = tl.where(shared, 0, task)
    spread: tl.constexpr = not NORMALIZE  # a shared weight has results of every task
    size_here = size if spread and ORDER == 0 else tl.where(task == row, size, 0)  # of what this program may write

    w = choose(weights, layer, LAYERS) + row * size
    to = choose(out, layer, LAYERS) + (task if spread and ORDER == 0 else row) * size
    v_rows, v_to, a_row = w, w, w
    if ORDER > 0:
        v_rows = choose(v, layer, LAYERS)
    if ORDER > 1:
        v_to = choose(v_bar, layer, LAYERS)
        a_row = choose(a, layer, LAYERS) + row * size

    zero = tl.full((), 0.0, tl.float64)
    ww, wv, wa, av = zero, zero, zero, zero
    first_use, last_use = task, task + 1
    if SUMMED:
        if spread and ORDER > 0:
            first_use = row
            last_use = tl.where(shared, tl.where(task == 0, tasks, 0), last_use)
    else:
        ww, wv, wa, av = _sums_of_row(w, v_rows + row * size, a_row, size, ORDER, BLOCK)

    for block in range((program - start) * SPAN, (program - start + 1) * SPAN):
        at = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), precision)
        of_w, of_a = zero, zero
        power = tl.full((), 1.0, tl.float32)  # that w is multiplied by, and its factors are by the inverse
        inverse = power
        for use in range(first_use, last_use):
            if SUMMED:
                parts = partials + use * (PRODUCTS * BLOCKS) + start
                ww, wv, wa, av = _sums_of_blocks(parts, tl.cdiv(size, BLOCK), BLOCKS, ORDER, LONGEST)
            given = _given(factors, c, n, use, tasks, layer, columns, shared, ORDER, NORMALIZE, TASKS)
            norm, s, t, q, h, m, o, k = _coefficients(ww, wv, wa, av, given[0], given[1], given[2])
            power, inverse = _powers_of_two(norm)
            number = norm if ORDER == 0 else s
            if ORDER > 1:
                number = t if NORMALIZE else (q - s * t) / norm
            if numbers is not None:
                to_number = numbers + use * columns + layer
                tl.store(to_number, number.to(precision).to(numbers.dtype.element_ty), mask=block == 0)
            if ORDER == 0:
                of_w += h
            else:
                v_row = (use if spread else row) * size
                of_v = h if ORDER == 1 else m
                total += of_v.to(precision) * load(v_rows + v_row, at, size_here, precision)
                of_w += o if ORDER == 1 else k
            if ORDER > 1:
                of_a += o
                gradient = h.to(precision) * load(a_row, at, size_here, precision)
                gradient += (m * inverse).to(precision) * (load(w, at, size_here, precision) * power)
                tl.store(v_to + v_row + at, gradient.to(v_to.dtype.element_ty), mask=at < size_here)
        if ORDER > 1:
            total += of_a.to(precision) * load(a_row, at, size_here, precision)
        total += (of_w * inverse).to(precision) * (load(w, at, size_here, precision) * power)
        tl.store(to + at, total.to(to.dtype.element_ty), mask=at < size_here)


# --- launches ---


class Results(NamedTuple):
    """Of a launch: ``out`` (values, or gradients of the weights), gradients of v, and the numbers [T, L]."""

    out: list[Tensor]
    v_bar: list[Tensor]
    numbers: Tensor | None


def combine(
    weights: Sequence[Tensor],
    tasks: int,
    *,
    factors: Tensor | None = None,
    v: Sequence[Tensor] = (),
    a: Sequence[Tensor] = (),
    c: Tensor | None = None,
    n: Tensor | None = None,
    tells: bool = True,
) -> Results:
    """The value, the backward where there is ``v``, the double backward where there is ``a``; see the file's head.

    Args:
        weights: one tensor a layer, ``[T or 1, ...]``.
        tasks: T, not zero.
        factors: gammas ``[T, L]``; None: units and norms, with no more rows than the weights have.
        v, a: one tensor a layer.
        c, n: ``[T, L]``.
        tells: whether there are numbers: norms, or the gradient of factors or n.
    """
    order = (len(v) > 0) + (len(a) > 0)
    spread = factors is not None
    like = [w.shape if order or not spread else (tasks, *w.shape[1:]) for w in weights]
    out = [w.new_empty(shape) for w, shape in zip(weights, like, strict=True)]
    v_bar = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in v] if order == 2 else []
    numbers = weights[0].new_empty((tasks, len(weights))) if tells else None
    lists = [[each.contiguous() for each in tensors] for tensors in (weights, v, a)]
    tables = [None if table is None else table.contiguous() for table in (factors, c, n)]
    for first in range(0, len(weights), LAYERS_AT_ONCE):
        part = slice(first, first + LAYERS_AT_ONCE)
        columns = [None if table is None else table[:, part] for table in (*tables, numbers)]
        _launch([tuple(each[part]) for each in (*lists, out, v_bar)], columns, tasks, len(weights), order, spread)
    return Results(out, v_bar, numbers)


def _launch(
    lists: Sequence[tuple[Tensor, ...]],
    tables: Sequence[Tensor | None],
    tasks: int,
    columns: int,
    order: int,
    spread: bool,
) -> None:
    """One launch for up to 16 layers, or two."""
    weights, v, a, out, v_bar = (each or None for each in lists)
    factors, c, n, numbers = tables
    assert weights is not None
    sizes = tuple(weight[0].numel() for weight in weights)
    shared = tuple(int(len(weight) == 1 and tasks > 1) for weight in weights)
    settings = _settings(_ORDERS[order], max(sizes), sum(sizes), weights[0].dtype)
    summed = settings.pop("LAUNCHES") > 1 or (spread and order > 0 and any(shared))
    blocks = [max(1, launch.divide(size, settings["BLOCK"])) for size in sizes]
    span = 1 if summed else launch.divide(sum(blocks) * tasks, _PROGRAMS)
    parts = [launch.divide(count, span) for count in blocks]
    layout = {"SIZES": sizes, "STARTS": (0, *accumulate(parts[:-1])), "SHARED": shared, "LAYERS": len(weights)}
    kind = {"BLOCKS": sum(blocks), "ORDER": order, "NORMALIZE": not spread, "PRODUCTS": _PRODUCTS[order]}
    grid = sum(parts), tasks
    partials = None
    if summed:
        partials = weights[0].new_empty((tasks, _PRODUCTS[order], sum(blocks)), dtype=torch.float64)
        _sum_blocks[grid](weights, v, a, partials, **layout, **kind, **settings, **launch.FUSED)
    _combine[grid](
        weights,
        v,
        a,
        factors,
        c,
        n,
        partials,
        out,
        v_bar,
        numbers,
        tasks,
        columns,
        SPAN=span,
        SUMMED=summed,
        LONGEST=triton.next_power_of_2(max(blocks)),
        TASKS=triton.next_power_of_2(tasks),
        WIDE=weights[0].dtype == torch.float64,
        **layout,
        **kind,
        **settings,
        **launch.FUSED,
    )


def _settings(order: str, largest: int, entries: int, dtype: torch.dtype) -> dict[str, int]:
    """Whatever the number of tasks: their bits do not depend on it."""
    short = largest <= _SHORT
    defaults = {"LAUNCHES": 1 if short else 2, "BLOCK": 2048 if short else 4096, "num_warps": 16}
    kind = str(dtype).removeprefix("torch.")
    return dict(launch.settings("weights", defaults, order=order, largest=largest, entries=entries, dtype=kind))


# --- what is measured ---


def _candidates(defaults: launch.Settings, shape: launch.Shape) -> Iterable[launch.Settings]:
    for launches in (1, 2) if int(shape["largest"]) <= _SHORT else (2,):
        for block in (1024, 2048, 4096, 8192):
            for warps in (4, 8, 16, 32):
                yield {"LAUNCHES": launches, "BLOCK": block, "num_warps": warps}


@launch.tunable(
    "weights",
    candidates=_candidates,
    examples=[
        {"shapes": shapes, "tasks": tasks, "order": order}
        for shapes, tasks in ((cases.CONV4, 4), (cases.RESNET12, 2))
        for order in range(3)
    ],
)
def _example(shapes: Sequence[tuple[int, ...]], tasks: int, order: int) -> Callable[[], Any]:
    def rows(seed: int) -> list[Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn((tasks, *shape), device="cuda", generator=generator) for shape in shapes]

    weights, gammas = rows(0), torch.rand(tasks, len(shapes), device="cuda")
    v, a = rows(1) if order else [], rows(2) if order == 2 else []
    return lambda: combine(weights, tasks, factors=gammas, v=v, a=a, c=gammas if a else None)


# --- the operator ---


def _forward(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    return combine(weights, len(gammas), factors=gammas, tells=False).out


def _backward(weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    found = combine(weights, len(gammas), factors=gammas, v=v)
    return found.out, found.numbers


def _double_backward(
    weights: Sequence[Tensor], gammas: Tensor, v: Sequence[Tensor], a: Sequence[Tensor], c: Tensor
) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
    found = combine(weights, len(gammas), factors=gammas, v=v, a=a, c=c)
    return found.out, found.numbers, found.v_bar


chain = Chain(forward=_forward, backward=_backward, double_backward=_double_backward)


def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """``gamma * w / |w|``; see :func:`cxgrad_fast.kernels.scale_weights`. No task is left to the definition."""
    return chain.apply(weights, gammas) if len(gammas) else reference.scale_weights(weights, gammas)
