"""The block's first derivative (MATH.md 1): sums over pooled elements, dy in one pass, then two convolutions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block import ways
from cxgrad_fast.kernels.conv_block.convolution import channels_last, empty_images, store_narrowed
from cxgrad_fast.kernels.conv_block.forward import channel_table, load_moments, store_table, table_type
from cxgrad_fast.kernels.conv_block.sums import block_sizes, gradient_of_z, load_norm, load_table, pass_places

# mean, inverse deviation, scale, bias; gain, shift and slant: dy = gain dz - shift - unit slant
TABLE_ROWS = tl.constexpr(7)


@triton.jit(do_not_specialize=["count"])
def _reduce(
    q,
    y,
    selected,
    corners,
    table,
    partials,
    count,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials [T, blocks, 2, C]: sums of dz and dz unit over blocks of q's positions, [T, count, C]."""
    task, _, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    kind: tl.constexpr = partials.dtype.element_ty
    dz = tl.load(q + at, mask=inside, other=0.0).to(kind)
    if POOL:
        unit = tl.load(selected + at, mask=inside, other=0.0).to(kind)
        negative = tl.load(corners + at, mask=inside, other=0) >= 4
    else:
        mean, inverse, scale, bias = load_norm(table, task, channel, C, 4)
        unit = (tl.load(y + at, mask=inside, other=0.0).to(kind) - mean) * inverse
        negative = unit * scale + bias <= 0
    if SLOPE != 1.0:
        dz = tl.where(negative, dz * SLOPE, dz)
    to = partials + (task * tl.num_programs(0) + tl.program_id(0)) * (2 * C) + channel
    tl.store(to, tl.sum(dz, 0), mask=channel < C)
    tl.store(to + C, tl.sum(dz * unit, 0), mask=channel < C)


@triton.jit
def load_partials(partials, task, block, blocks, quantity, channel, C: tl.constexpr, QUANTITIES: tl.constexpr):
    """One quantity [B, N] in float64 of partials [T, blocks, QUANTITIES, C]; zero beyond."""
    at = ((task * blocks + block) * QUANTITIES + quantity)[:, None] * C + channel[None, :]
    inside = (block < blocks)[:, None] & (channel < C)[None, :]
    return tl.load(partials + at, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def store_linear(table, k, dbias, dscale, count, task, channel, C: tl.constexpr, ROWS: tl.constexpr):
    """Rows 4 to 6 of a table: dy = gain dz - shift - unit slant."""
    to = table + (task * ROWS + 4) * C + channel
    kind: tl.constexpr = table.dtype.element_ty
    tl.store(to, k.to(kind), mask=channel < C)
    tl.store(to + C, (k * dbias / count).to(kind), mask=channel < C)
    tl.store(to + 2 * C, (k * dscale / count).to(kind), mask=channel < C)


@triton.jit
def linear(dz, unit, gain, table, task, channel, C: tl.constexpr, ROWS: tl.constexpr):
    """dy [P, N] by those rows, of which ``gain`` is the first."""
    value = dz * gain - load_table(table, task, channel, 5, C, ROWS)
    return value - unit * load_table(table, task, channel, 6, C, ROWS)


@triton.jit(do_not_specialize=["count", "blocks"])
def _merge(
    partials,
    moments,
    scale,
    bias,
    eps,
    dscale,
    dbias,
    deps,
    table,
    count,
    blocks,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dscale and dbias [T, C], deps [T] = -1/2 sum r^2 g dg, and the table of the pass over ``count`` positions."""
    task = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    db = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    dg = tl.zeros((BLOCK_B, BLOCK_C), tl.float64)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        db += load_partials(partials, task, block, blocks, 0, channel, C, 2)
        dg += load_partials(partials, task, block, blocks, 1, channel, C, 2)
    db, dg = tl.sum(db, 0), tl.sum(dg, 0)
    mean, variance = load_moments(moments, task, channel, C)
    g, inverse = store_table(table, mean, variance, scale, bias, eps, task, channel, C, TABLE_ROWS)
    store_linear(table, g * inverse, db, dg, count, task, channel, C, TABLE_ROWS)
    store_narrowed(dbias + task * C + channel, db, channel < C)
    store_narrowed(dscale + task * C + channel, dg, channel < C)
    store_narrowed(deps + task, -0.5 * tl.sum(inverse * inverse * g * dg, 0), None)


def merge_blocks(channels: int) -> dict[str, int]:
    """Of a task's merge, which sums over its channels too: the fewer partial sums at once, the more channels."""
    block = triton.next_power_of_2(channels)
    return {"BLOCK_B": max(1, 4096 // block), "BLOCK_C": block, "num_warps": 8}


@triton.jit(do_not_specialize=["count"])
def _gradient(
    q,
    y,
    corners,
    more,
    table,
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
    """dy [T, count, C] = k (dz - db/n - unit dg/n), plus ``more`` where there is more."""
    task, position, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    mean, inverse, scale, bias = load_norm(table, task, channel, C, TABLE_ROWS)
    unit = (tl.load(y + at, mask=inside, other=0.0).to(mean.dtype) - mean) * inverse
    dz, _, _, _ = gradient_of_z(
        q, corners, unit, scale, bias, position, task, channel, inside, count, H, W, SLOPE, C, POOL
    )
    value = linear(dz, unit, load_table(table, task, channel, 4, C, TABLE_ROWS), table, task, channel, C, TABLE_ROWS)
    if more is not None:
        value += tl.load(more + at, mask=inside, other=0.0).to(value.dtype)
    tl.store(dy + at, value.to(dy.dtype.element_ty), mask=inside)


def gradient_of_y(
    q: Tensor, y: Tensor, corners: Tensor, more: Tensor | None, table: Tensor, slope: float, pool: bool
) -> Tensor:
    """dy, like ``y``; ``more`` is added."""
    tasks, images, channels, height, width = y.shape
    dy, count = empty_images(y, channels, height, width), images * height * width
    settings = block_sizes("conv_block_gradient", 2048, 8, count=count, channels=channels)
    _gradient[(launch.divide(count, settings["BLOCK_P"]), launch.divide(channels, settings["BLOCK_C"]), tasks)](
        q,
        y,
        corners,
        more,
        table,
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
    return dy


def push(
    dy: Tensor, x: Tensor, dx_weight: Tensor, need_x: bool, need_weight: bool, *, precision: str
) -> tuple[Tensor, Tensor]:
    """A gradient of a convolution's output to its input, for a weight, and to its weight, for an input ``x``."""
    dx, dweight = dy.new_empty(0), dy.new_empty(0)
    if need_x:
        dx = ways.transpose(dy, dx_weight, precision=precision)
    if need_weight:
        dweight = ways.weight_gradient(x, dy, dx_weight.shape[3], precision=precision)
    return dx, dweight


def backward(
    q: Tensor,
    y_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    y: Tensor,
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    slope: float,
    pool: bool,
    need_x: bool,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dscale, dbias, deps, sparse) as in csrc/conv_block.h; sparse is the first layer's alone."""
    q, y = channels_last(q), channels_last(y)
    if pool:
        selected, corners = channels_last(selected), channels_last(corners)
    tasks, images, channels, height, width = y.shape
    pooled, count = images * q.shape[3] * q.shape[4], images * height * width
    kind = table_type(x.dtype)
    settings = block_sizes("conv_block_reduce", 4096, count=pooled, channels=channels)
    blocks = launch.divide(pooled, settings["BLOCK_P"])
    partials = x.new_empty((tasks, blocks, 2, channels), dtype=kind)
    _reduce[(blocks, launch.divide(channels, settings["BLOCK_C"]), tasks)](
        q,
        y,
        selected,
        corners,
        partials if pool else channel_table(moments, scale, bias, eps),
        partials,
        pooled,
        C=channels,
        SLOPE=slope,
        POOL=pool,
        **settings,
        **launch.FUSED,
    )
    dscale, dbias, deps = x.new_empty((tasks, channels)), x.new_empty((tasks, channels)), x.new_empty(tasks)
    table = x.new_empty((tasks, TABLE_ROWS.value, channels), dtype=kind)
    affine = scale.contiguous(), bias.contiguous(), eps.contiguous()
    _merge[(tasks,)](
        partials,
        moments,
        *affine,
        dscale,
        dbias,
        deps,
        table,
        count,
        blocks,
        C=channels,
        **merge_blocks(channels),
        **launch.FUSED,
    )
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if need_x or need_weight:
        more = None if y_gradient is None else channels_last(y_gradient)
        dy = gradient_of_y(q, y, corners, more, table, slope, pool)
        dx, dweight = push(dy, channels_last(x), weight, need_x, need_weight, precision=precision)
    return dx, dweight, dscale, dbias, deps, x.new_empty(0, dtype=torch.float64)
