"""The block's second derivative (MATH.md 1): u = conv(X, w) + conv(x, W) with three sums of it, then one pass.

What the pass gives for y is handed on as it is; the forward operator's backward pushes it through the convolution
together with what the outer pass sends there (kernels/conv_block/chain.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block import ways
from cxgrad_fast.kernels.conv_block.backward import linear, load_partials, merge_blocks, push, store_linear
from cxgrad_fast.kernels.conv_block.convolution import channels_last, empty_images, store_narrowed, widened
from cxgrad_fast.kernels.conv_block.forward import channel_table, load_moments, store_table, table_type
from cxgrad_fast.kernels.conv_block.sums import (
    Context,
    Partials,
    block_sizes,
    gradient_of_z,
    load_norm,
    load_table,
    pass_places,
)

# the seven rows of a first derivative, then what q's gradient, k u + unit (Ge - k Suy/n) + B - k Su/n, and y's take:
# Ge - k Suy/n, B - k Su/n; r a, r d, r S0/n, r R/n
TABLE_ROWS = tl.constexpr(13)


@triton.jit
def _optional(values, task, channel, C: tl.constexpr):
    """One row [N] of [T, C] in float64, or zeros."""
    row = tl.zeros(channel.shape, tl.float64)
    if values is not None:
        row = widened(tl.load(values + task * C + channel, mask=channel < C, other=0.0))
    return row


@triton.jit(do_not_specialize=["count", "blocks"])
def _merge(
    partials,
    moments,
    scale,
    bias,
    eps,
    dscale,
    dbias,
    on_scale,
    on_bias,
    on_eps,
    scale_gradient,
    eps_gradient,
    table,
    count,
    blocks,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients for scale [T, C] and epsilon [T], and the table; all in float64, names as in MATH.md 1.

    ``partials`` [T, blocks, 3, C] are sums of u, u unit and u dz; without any, u is zero.
    """
    task = tl.program_id(0).to(tl.int64)
    kind: tl.constexpr = table.dtype.element_ty
    e = 0.0
    if on_eps is not None:
        e = widened(tl.load(on_eps + task))
    channel = tl.arange(0, BLOCK_C)
    su = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    su_unit = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    su_dz = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    if partials is not None:
        for start in range(0, blocks, BLOCK_B):
            block = start + tl.arange(0, BLOCK_B)
            su += load_partials(partials, task, block, blocks, 0, channel, C, 3)
            su_unit += load_partials(partials, task, block, blocks, 1, channel, C, 3)
            su_dz += load_partials(partials, task, block, blocks, 2, channel, C, 3)
    su, su_unit, su_dz = tl.sum(su, 0), tl.sum(su_unit, 0), tl.sum(su_dz, 0)
    mean, variance = load_moments(moments, task, channel, C)
    g, r = store_table(table, mean, variance, scale, bias, eps, task, channel, C, TABLE_ROWS)
    db = _optional(dbias, task, channel, C)
    dg = _optional(dscale, task, channel, C)
    k = g * r
    store_linear(table, k, db, dg, count, task, channel, C, TABLE_ROWS)
    ge = _optional(on_scale, task, channel, C) - 0.5 * e * r * r * g
    sum_q = su_dz - su * db / count - su_unit * dg / count
    a = -k * dg / count
    d = ge - k * su_unit / count
    s0 = a * su + d * db
    sum_r = a * su_unit + d * dg + k * sum_q - e * r * r * g * dg
    exists = channel < C
    to = table + (task * TABLE_ROWS + 7) * C + channel
    tl.store(to, d.to(kind), mask=exists)
    tl.store(to + C, (_optional(on_bias, task, channel, C) - k * su / count).to(kind), mask=exists)
    tl.store(to + 2 * C, (r * a).to(kind), mask=exists)
    tl.store(to + 3 * C, (r * d).to(kind), mask=exists)
    tl.store(to + 4 * C, (r * s0 / count).to(kind), mask=exists)
    tl.store(to + 5 * C, (r * sum_r / count).to(kind), mask=exists)
    of_scale = r * sum_q - 0.5 * e * r * r * dg
    store_narrowed(scale_gradient + task * C + channel, of_scale, exists)
    store_narrowed(eps_gradient + task, -0.5 * tl.sum(r * r * sum_r, 0), None)


@triton.jit(do_not_specialize=["count"])
def _second(
    u,
    q,
    y,
    corners,
    table,
    q_gradient,
    y_gradient,
    dy,
    count,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One pass over ``count`` positions: the gradients for q and y and, where it is wanted, dy again.

    The gradient for q is written by the position that was the largest of its window.
    """
    task, position, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    mean, inverse, scale, bias = load_norm(table, task, channel, C, TABLE_ROWS)
    gain = load_table(table, task, channel, 4, C, TABLE_ROWS)
    unit = (tl.load(y + at, mask=inside, other=0.0).to(mean.dtype) - mean) * inverse
    dz, at_q, has_q, negative = gradient_of_z(
        q, corners, unit, scale, bias, position, task, channel, inside, count, H, W, SLOPE, C, POOL
    )
    on_q = unit * load_table(table, task, channel, 7, C, TABLE_ROWS) + load_table(
        table, task, channel, 8, C, TABLE_ROWS
    )
    on_y = dz * load_table(table, task, channel, 10, C, TABLE_ROWS)
    on_y -= load_table(table, task, channel, 11, C, TABLE_ROWS)
    on_y -= unit * load_table(table, task, channel, 12, C, TABLE_ROWS)
    if u is not None:
        value = tl.load(u + at, mask=inside, other=0.0).to(mean.dtype)
        on_q += value * gain
        on_y += value * load_table(table, task, channel, 9, C, TABLE_ROWS)
    if SLOPE != 1.0:
        on_q = tl.where(negative, on_q * SLOPE, on_q)
    tl.store(q_gradient + at_q, on_q.to(q_gradient.dtype.element_ty), mask=has_q)
    tl.store(y_gradient + at, on_y.to(y_gradient.dtype.element_ty), mask=inside)
    if dy is not None:
        value = linear(dz, unit, gain, table, task, channel, C, TABLE_ROWS)
        tl.store(dy + at, value.to(dy.dtype.element_ty), mask=inside)


def gradients(
    u: Tensor | None, q: Tensor, y: Tensor, corners: Tensor, table: Tensor, slope: float, pool: bool, want_dy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those for q and y, and dy again where it is wanted."""
    tasks, images, channels, height, width = y.shape
    count = images * height * width
    q_gradient, y_gradient = empty_images(q, *q.shape[2:]), empty_images(y, *y.shape[2:])
    dy = empty_images(y, *y.shape[2:]) if want_dy else None
    settings = block_sizes("conv_block_second", 2048, 8, count=count, channels=channels)
    _second[(launch.divide(count, settings["BLOCK_P"]), launch.divide(channels, settings["BLOCK_C"]), tasks)](
        u,
        q,
        y,
        corners,
        table,
        q_gradient,
        y_gradient,
        dy,
        count,
        H=height,
        W=width,
        C=channels,
        SLOPE=slope,
        POOL=pool,
        **settings,
        **launch.FUSED,
    )
    return q_gradient, y_gradient, dy


def double_backward(
    on_x: Tensor | None,
    on_weight: Tensor | None,
    on_scale: Tensor | None,
    on_bias: Tensor | None,
    on_eps: Tensor | None,
    q: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    y: Tensor,
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    slope: float,
    pool: bool,
    need_x: bool,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of (q, x, weight, scale, eps, y) as in csrc/conv_block.h."""
    q, y = channels_last(q), channels_last(y)
    if pool:
        corners = channels_last(corners)
    tasks, images, channels, height, width = y.shape
    count = images * height * width
    pairs = []
    if on_x is not None:
        on_x = channels_last(on_x)
        pairs.append((on_x, weight))
    if on_weight is not None:
        pairs.append((channels_last(x), on_weight))
    u: Tensor | None = None
    partials: Partials | None = None
    if pairs:
        context = Context(y, channel_table(moments, scale, bias, eps), q, corners, slope, pool)
        u, partials = ways.second(pairs, context, precision=precision)

    scale_gradient, eps_gradient = x.new_empty((tasks, channels)), x.new_empty(tasks)
    table = x.new_empty((tasks, TABLE_ROWS.value, channels), dtype=table_type(x.dtype))
    given = (scale, bias, eps, dscale, dbias, on_scale, on_bias, on_eps)
    _merge[(tasks,)](
        None if partials is None else partials.values,
        moments,
        *(None if tensor is None else tensor.contiguous() for tensor in given),
        scale_gradient,
        eps_gradient,
        table,
        count,
        0 if partials is None else partials.values.shape[1],
        C=channels,
        **merge_blocks(channels),
        **launch.FUSED,
    )

    want_x, want_weight = need_x and on_weight is not None, need_weight and on_x is not None
    q_gradient, y_gradient, dy = gradients(u, q, y, corners, table, slope, pool, want_x or want_weight)
    x_gradient, weight_gradient = x.new_empty(0), x.new_empty(0)
    if dy is not None:
        images_, filters = x if on_x is None else on_x, weight if on_weight is None else on_weight
        x_gradient, weight_gradient = push(dy, images_, filters, want_x, want_weight, precision=precision)
    return q_gradient, x_gradient, weight_gradient, scale_gradient, eps_gradient, y_gradient
