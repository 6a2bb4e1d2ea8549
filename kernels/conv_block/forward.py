"""The block itself (MATH.md 1): convolution, its moments, then normalisation, activation and pooling in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block import ways
from cxgrad_fast.kernels.conv_block.convolution import channels_last, empty_images, widened
from cxgrad_fast.kernels.conv_block.sums import Partials, block_sizes, load_norm, pass_places

TABLE_ROWS = tl.constexpr(4)  # mean, inverse deviation, scale, bias


def table_type(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a type are computed in: float32 or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what a channel is normalised by ---


@triton.jit
def store_table(table, mean, variance, scale, bias, eps, task, channel, C: tl.constexpr, ROWS: tl.constexpr):
    """The first rows of a table [T, ROWS, C], from float64 moments [N]; scale and inverse deviation in float64."""
    exists = channel < C
    g = widened(tl.load(scale + task * C + channel, mask=exists, other=0.0))
    b = tl.load(bias + task * C + channel, mask=exists, other=0.0)
    inverse = 1.0 / tl.sqrt(variance + widened(tl.load(eps + task)))
    to = table + task * (ROWS * C) + channel
    kind: tl.constexpr = table.dtype.element_ty
    tl.store(to, mean.to(kind), mask=exists)
    tl.store(to + C, inverse.to(kind), mask=exists)
    tl.store(to + 2 * C, g.to(kind), mask=exists)
    tl.store(to + 3 * C, b.to(kind), mask=exists)
    return g, inverse


@triton.jit
def load_moments(moments, task, channel, C: tl.constexpr):
    """Mean and variance [N] of moments [T, 2, C]; 0 and 1 beyond."""
    row = moments + task * (2 * C) + channel
    return tl.load(row, mask=channel < C, other=0.0), tl.load(row + C, mask=channel < C, other=1.0)


@triton.jit
def _channel_table(moments, scale, bias, eps, table, C: tl.constexpr, BLOCK: tl.constexpr):
    task = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mean, variance = load_moments(moments, task, channel, C)
    store_table(table, mean, variance, scale, bias, eps, task, channel, C, TABLE_ROWS)


def channel_table(moments: Tensor, scale: Tensor, bias: Tensor, eps: Tensor) -> Tensor:
    """[T, 4, C] in the type of computation: mean, inverse deviation, scale and bias of moments [T, 2, C]."""
    tasks, _, channels = moments.shape
    table = scale.new_empty((tasks, TABLE_ROWS.value, channels), dtype=table_type(scale.dtype))
    affine = scale.contiguous(), bias.contiguous(), eps.contiguous()
    _channel_table[(launch.divide(channels, 64), tasks)](
        moments, *affine, table, C=channels, BLOCK=64, num_warps=2, **launch.FUSED
    )
    return table


@triton.jit(do_not_specialize=["count", "blocks"])
def _merge_moments(
    partials,
    scale,
    bias,
    eps,
    moments,
    table,
    count,
    blocks,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """moments [T, 2, C] float64 of ``count`` positions, from those of blocks of SIZE of them (Chan et al. 1979)."""
    task = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (channel < C)[None, :]
    mean = tl.zeros((BLOCK_C,), tl.float64)
    square = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        size = tl.minimum(count - block * SIZE, SIZE).to(tl.float64)
        at = partials + (task * blocks + block)[:, None] * (2 * C) + channel[None, :]
        part = tl.load(at, mask=(block < blocks)[:, None] & exists, other=0.0).to(tl.float64)
        mean += tl.sum(part * size[:, None], 0)
    mean /= count
    for start in range(0, blocks, BLOCK_B):
        block = start + tl.arange(0, BLOCK_B)
        size = tl.minimum(count - block * SIZE, SIZE).to(tl.float64)
        inside = (block < blocks)[:, None] & exists
        at = partials + (task * blocks + block)[:, None] * (2 * C) + channel[None, :]
        apart = tl.load(at, mask=inside, other=0.0).to(tl.float64) - mean[None, :]
        part = tl.load(at + C, mask=inside, other=0.0).to(tl.float64)
        square += tl.sum(tl.where(inside, part + apart * apart * size[:, None], 0.0), 0)
    variance = square / count
    to = moments + task * (2 * C) + channel
    tl.store(to, mean, mask=channel < C)
    tl.store(to + C, variance, mask=channel < C)
    store_table(table, mean, variance, scale, bias, eps, task, channel, C, TABLE_ROWS)


def merged_moments(y: Tensor, partials: Partials, scale: Tensor, bias: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Moments [T, 2, C] of ``y`` from those of its blocks, and the :func:`channel_table` of the pass behind."""
    tasks, images, channels, height, width = y.shape
    moments = y.new_empty((tasks, 2, channels), dtype=torch.float64)
    table = y.new_empty((tasks, TABLE_ROWS.value, channels), dtype=table_type(y.dtype))
    _merge_moments[(launch.divide(channels, 16), tasks)](
        partials.values,
        scale,
        bias,
        eps,
        moments,
        table,
        images * height * width,
        partials.values.shape[1],
        C=channels,
        SIZE=partials.block,
        BLOCK_B=128,
        BLOCK_C=16,
        num_warps=4,
        **launch.FUSED,
    )
    return moments, table


# --- normalisation, activation, pooling ---


@triton.jit(do_not_specialize=["count"])
def _activate(
    y,
    table,
    out,
    selected,
    corners,
    count,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out [T, count, C] = leaky(unit scale + bias), unit = (y - mean) inverse; with pooling of the largest of a window.

    selected [T, count, C] is unit there, corners says which one it is: 2 column + row, and 4 if the slope applies.
    """
    task, position, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    mean, inverse, scale, bias = load_norm(table, task, channel, C, TABLE_ROWS)
    if POOL:
        rows: tl.constexpr = H // 2
        columns: tl.constexpr = W // 2
        image, window = position // (rows * columns), position % (rows * columns)
        size = count // (rows * columns) * (H * W)
        first = task * size + image * (H * W) + window // columns * (2 * W) + window % columns * 2
        from_ = (first * C)[:, None] + channel[None, :]
    else:
        from_ = at
    unit = (tl.load(y + from_, mask=inside, other=0.0).to(mean.dtype) - mean) * inverse
    z = unit * scale + bias
    if POOL:
        code = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
        for corner in tl.static_range(1, 4):  # row-major order decides ties
            step = (corner // 2 * W + corner % 2) * C
            value = tl.load(y + from_ + step, mask=inside, other=0.0).to(mean.dtype)
            other_unit = (value - mean) * inverse
            other = other_unit * scale + bias
            larger = other > z
            z = tl.where(larger, other, z)
            unit = tl.where(larger, other_unit, unit)
            code = tl.where(larger, corner % 2 * 2 + corner // 2, code)
        tl.store(selected + at, unit.to(selected.dtype.element_ty), mask=inside)
        tl.store(corners + at, tl.where(z > 0, code, code + 4).to(tl.uint8), mask=inside)
    if SLOPE != 1.0:
        z = tl.where(z > 0, z, z * SLOPE)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


def activated(y: Tensor, table: Tensor, slope: float, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, selected, corners) of the convolution ``y``."""
    tasks, images, channels, height, width = y.shape
    size = (height // 2, width // 2) if pool else (height, width)
    out = empty_images(y, channels, *size)
    selected = empty_images(y, channels, *size) if pool else y.new_empty(0)
    corners = empty_images(y, channels, *size, torch.uint8) if pool else y.new_empty(0, dtype=torch.uint8)
    count = images * size[0] * size[1]
    settings = block_sizes("conv_block_activate", 2048, count=count, channels=channels)
    blocks = launch.divide(count, settings["BLOCK_P"]), launch.divide(channels, settings["BLOCK_C"])
    _activate[(*blocks, tasks)](
        y,
        table,
        out,
        selected,
        corners,
        count,
        H=height,
        W=width,
        C=channels,
        SLOPE=slope,
        POOL=pool,
        **settings,
        **launch.FUSED,
    )
    return out, selected, corners


def activation(y: Tensor, scale: Tensor, bias: Tensor, eps: Tensor, moments: Tensor, slope: float) -> Tensor:
    """The block's output without pooling from its convolution, again."""
    return activated(channels_last(y), channel_table(moments, scale, bias, eps), slope, False)[0]


def forward(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor, slope: float, pool: bool, *, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, y, selected, corners, moments) as in csrc/conv_block.h."""
    y, partials = ways.convolution(channels_last(x), weight, precision=precision)
    moments, table = merged_moments(y, partials, scale.contiguous(), bias.contiguous(), eps.contiguous())
    out, selected, corners = activated(y, table, slope, pool)
    return out, y, selected, corners, moments
