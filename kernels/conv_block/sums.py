"""Sums of each channel over the positions of a convolution's output, in blocks: those that its kernel makes as it goes.

Moments for the block itself, three sums for its second derivative (MATH.md 1). A convolution that is not ours is
followed by a pass of this file over what it stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch

QUANTITIES = {"moments": 2, "second": 3}


@dataclass(frozen=True)
class Context:
    """What the sums of a second derivative read beside u: MATH.md 1, and a :func:`channel_table`."""

    y: Tensor
    table: Tensor
    q: Tensor
    corners: Tensor
    slope: float
    pool: bool


@dataclass(frozen=True)
class Partials:
    """Sums of blocks of positions, [T, blocks, quantities, C]."""

    values: Tensor
    block: int


def block_sizes(kernel: str, elements: int, warps: int = 4, **shape: Any) -> dict[str, int]:
    """Of a pass over positions and channels, of so many elements a program."""
    block = min(64, triton.next_power_of_2(shape["channels"]))
    defaults = {"BLOCK_P": min(256, elements // block), "BLOCK_C": block, "num_warps": warps}
    return launch.settings(kernel, defaults, **shape)


# --- what passes over positions begin with ---


@triton.jit
def places(task, position, channel, count, C: tl.constexpr):
    """(which are there, offsets in a tensor [T, count, C]), both [P, N], of positions [P] and channels [N]."""
    inside = (position < count)[:, None] & (channel < C)[None, :]
    return inside, ((task * count + position) * C)[:, None] + channel[None, :]


@triton.jit
def pass_places(count, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """(task, position [P], channel [N], their :func:`places`) of a program of a grid (positions, channels, tasks)."""
    task = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, at = places(task, position, channel, count, C)
    return task, position, channel, inside, at


@triton.jit
def load_table(table, task, channel, row, C: tl.constexpr, ROWS: tl.constexpr):
    """One row [1, N] of numbers of channels, from a table [T, ROWS, C]."""
    return tl.load(table + (task * ROWS + row) * C + channel, mask=channel < C, other=0.0)[None, :]


@triton.jit
def load_norm(table, task, channel, C: tl.constexpr, ROWS: tl.constexpr):
    """The first rows of a table: mean, inverse deviation, scale and bias."""
    mean, inverse = load_table(table, task, channel, 0, C, ROWS), load_table(table, task, channel, 1, C, ROWS)
    scale, bias = load_table(table, task, channel, 2, C, ROWS), load_table(table, task, channel, 3, C, ROWS)
    return mean, inverse, scale, bias


# --- where a position's gradient comes from ---


@triton.jit
def pooled_position(position, H, W):
    """Of positions (s H + h) W + w: that of their window in the pooled images, whether it is one, and their corner."""
    h, w = position // W % H, position % W
    i, j = h // 2, w // 2
    whole = (i < H // 2) & (j < W // 2)
    return (position // (H * W) * (H // 2) + i) * (W // 2) + j, whole, 2 * (w % 2) + h % 2


@triton.jit
def gradient_of_z(q, corners, unit, scale, bias, position, task, channel, inside, count, H, W, SLOPE, C, POOL):
    """(dz, its offset in q, whether q is there, whether the slope applies), all [P, N].

    dz is q behind the activation's derivative, at the largest of a window alone. ``position`` is [P], ``channel`` [N],
    ``inside`` [P, N]; ``unit`` [P, N], the normalised convolution, tells where the slope applies without pooling.
    """
    if POOL:
        pooled, whole, corner = pooled_position(position, H, W)
        size = count // (H * W) * (H // 2) * (W // 2)
        offset = (task * size + pooled)[:, None] * C + channel[None, :]
        inside = inside & whole[:, None]
        code = tl.load(corners + offset, mask=inside, other=0).to(tl.int32)
        inside = inside & (code % 4 == corner[:, None])
        dz = tl.load(q + offset, mask=inside, other=0.0).to(unit.dtype)
        negative = code >= 4
    else:
        offset = (task * count + position)[:, None] * C + channel[None, :]
        dz = tl.load(q + offset, mask=inside, other=0.0).to(unit.dtype)
        negative = unit * scale + bias <= 0
    if SLOPE != 1.0:
        dz = tl.where(negative, dz * SLOPE, dz)
    return dz, offset, inside, negative


# --- the sums of a second derivative ---


@triton.jit
def sums_with_u(
    u,
    partials,
    y,
    table,
    q,
    corners,
    position,
    task,
    channel,
    count,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
):
    """partials [3, C]: sums of u [P, N], u unit and u dz over ``position`` [P]."""
    inside, at = places(task, position, channel, count, C)
    mean, inverse, scale, bias = load_norm(table, task, channel, C, 4)
    unit = (tl.load(y + at, mask=inside, other=0.0).to(u.dtype) - mean) * inverse
    tl.store(partials + channel, tl.sum(u, 0), mask=channel < C)
    tl.store(partials + C + channel, tl.sum(u * unit, 0), mask=channel < C)
    if POOL:
        tl.debug_barrier()
    dz, _, _, _ = gradient_of_z(
        q, corners, unit, scale, bias, position, task, channel, inside, count, H, W, SLOPE, C, POOL
    )
    tl.store(partials + 2 * C + channel, tl.sum(u * dz, 0), mask=channel < C)


# --- passes over an output that is stored ---


@triton.jit(do_not_specialize=["count"])
def _moments(y, partials, count, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """partials [T, blocks, 2, C]: mean and squared deviations of blocks of y's positions, [T, count, C]."""
    task, _, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    block = tl.program_id(0)
    kind: tl.constexpr = partials.dtype.element_ty
    values = tl.load(y + at, mask=inside, other=0.0).to(kind)
    mean = tl.sum(values, 0) / tl.minimum(count - block * BLOCK_P, BLOCK_P).to(kind)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    to = partials + (task * tl.num_programs(0) + block) * (2 * C) + channel
    tl.store(to, mean, mask=channel < C)
    tl.store(to + C, tl.sum(apart * apart, 0), mask=channel < C)


@triton.jit(do_not_specialize=["count"])
def _second(
    u,
    partials,
    y,
    table,
    q,
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
    """partials [T, blocks, 3, C]: sums of u, u unit and u dz over blocks of u's positions, [T, count, C]."""
    task, position, channel, inside, at = pass_places(count, C, BLOCK_P, BLOCK_C)
    values = tl.load(u + at, mask=inside, other=0.0).to(partials.dtype.element_ty)
    to = partials + (task * tl.num_programs(0) + tl.program_id(0)) * (3 * C)
    sums_with_u(values, to, y, table, q, corners, position, task, channel, count, H, W, C, SLOPE, POOL)


def partial_sums(y: Tensor, blocks: int, reductions: str) -> Tensor:
    """An empty [T, blocks, 2 or 3, C] for the sums of ``y`` [T, S, C, H, W]."""
    kind = torch.float64 if y.dtype == torch.float64 else torch.float32
    return y.new_empty((y.shape[0], blocks, QUANTITIES[reductions], y.shape[2]), dtype=kind)


def sums_of(y: Tensor, reductions: str, context: Context | None = None) -> Partials:
    """The sums of ``y`` [T, S, C, H, W], channels last: "moments", or "second" with what they read beside it."""
    tasks, images, channels, height, width = y.shape
    count = images * height * width
    settings = block_sizes(f"conv_block_sums_{reductions}", 4096, 8, count=count, channels=channels)
    blocks = launch.divide(count, settings["BLOCK_P"])
    grid = blocks, launch.divide(channels, settings["BLOCK_C"]), tasks
    partials = partial_sums(y, blocks, reductions)
    if reductions == "moments":
        _moments[grid](y, partials, count, C=channels, **settings, **launch.FUSED)
    else:
        assert context is not None
        _second[grid](
            y,
            partials,
            context.y,
            context.table,
            context.q,
            context.corners,
            count,
            H=height,
            W=width,
            C=channels,
            SLOPE=context.slope,
            POOL=context.pool,
            **settings,
            **launch.FUSED,
        )
    return Partials(partials, settings["BLOCK_P"])
