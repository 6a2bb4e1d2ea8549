"""patch_statistics in Triton: float64 products of patches on tensor cores; it has no derivative.

A patch z is shifted by its channels' means, and has a one behind its last entry: the sum of z z' over all positions
holds every product and, in its last column, every sum. Both are far from cancelling, as in the C++ operator. The images
are read through their strides; float64 is the 67 TFLOP/s kind on data-centre GPUs, and done once an image set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch

_PARTS = 256  # of a task's positions, summed each by itself: what fills a large device with one task
_SHORTEST = 256  # positions of a part


@triton.jit
def _entries(
    x,
    shift,
    position,
    inside,
    k,
    task,
    task_stride,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
):
    """Entries k [K] of the shifted patches about positions [P]: [P, K] float64; the one, and then zeros."""
    image, i, j = position // (H * W), position // W % H, position % W
    channel, row, column = k // 9, k // 3 % 3 - 1, k % 3 - 1
    h, w = i[:, None] + row[None, :], j[:, None] + column[None, :]
    entry = inside[:, None] & (k < 9 * C)[None, :]
    at = task * task_stride + image.to(tl.int64) * image_stride
    at = at[:, None] + (channel.to(tl.int64) * channel_stride)[None, :]
    at += h.to(tl.int64) * row_stride + w.to(tl.int64) * column_stride
    values = tl.load(x + at, mask=entry & (h >= 0) & (h < H) & (w >= 0) & (w < W), other=0.0).to(tl.float64)
    means = tl.load(shift + task * C + channel, mask=k < 9 * C, other=0.0)
    one = tl.where(inside[:, None] & (k == 9 * C)[None, :], 1.0, 0.0).to(tl.float64)
    return tl.where(entry, values - means[None, :], one)


@triton.jit(do_not_specialize=["count", "span"])
def _products(
    x,
    shift,
    partials,
    count,
    span,
    task_stride,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partials [T, parts, K, K] = the sum of z z' over a part's `span` positions, a block of it a program."""
    size: tl.constexpr = 9 * C + 1
    blocks: tl.constexpr = (size + BLOCK_K - 1) // BLOCK_K
    task, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    k = tl.program_id(0) // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    other = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_K, BLOCK_K), tl.float64)
    for start in tl.range(0, span, BLOCK_P, num_stages=1):
        position = part * span + start + tl.arange(0, BLOCK_P)
        inside = position < count
        a = _entries(
            x,
            shift,
            position,
            inside,
            k,
            task,
            task_stride,
            image_stride,
            channel_stride,
            row_stride,
            column_stride,
            H,
            W,
            C,
        )
        b = a
        if blocks > 1:
            b = _entries(
                x,
                shift,
                position,
                inside,
                other,
                task,
                task_stride,
                image_stride,
                channel_stride,
                row_stride,
                column_stride,
                H,
                W,
                C,
            )
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee", out_dtype=tl.float64)
    at = (task * tl.num_programs(1) + part) * (size * size) + k[:, None] * size + other[None, :]
    tl.store(partials + at, total, mask=(k < size)[:, None] & (other < size)[None, :])


@triton.jit
def _merged(partials, task, parts, at, exists, SIZE: tl.constexpr, BLOCK_B: tl.constexpr):
    """Entries ``at`` [N] of the sum of partials [T, parts, SIZE], always in the same order."""
    total = tl.zeros(at.shape, tl.float64)
    for start in range(0, parts, BLOCK_B):
        part = start + tl.arange(0, BLOCK_B)
        from_ = partials + (task * parts + part)[:, None] * SIZE + at[None, :]
        total += tl.sum(tl.load(from_, mask=(part < parts)[:, None] & exists[None, :], other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["count", "parts"])
def _merge(
    partials,
    shift,
    mean,
    covariance,
    count,
    parts,
    C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mean [T, K] and covariance [T, K, K] of sums [T, parts, K + 1, K + 1], BLOCK_N entries of the covariance each."""
    length: tl.constexpr = 9 * C
    size: tl.constexpr = length + 1
    task = tl.program_id(1).to(tl.int64)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, other = entry // length, entry % length
    exists = k < length
    share = 1.0 / count.to(tl.float64)
    low, high = tl.minimum(k, other), tl.maximum(k, other)  # the two halves are the same to the bit
    products = _merged(partials, task, parts, low * size + high, exists, size * size, BLOCK_B) * share
    excess = _merged(partials, task, parts, k * size + length, exists, size * size, BLOCK_B) * share
    other_excess = _merged(partials, task, parts, other * size + length, exists, size * size, BLOCK_B) * share
    tl.store(covariance + task * (length * length) + entry, products - excess * other_excess, mask=exists)
    means = tl.load(shift + task * C + k // 9, mask=exists, other=0.0)
    tl.store(mean + task * length + k, means + excess, mask=exists & (other == 0))


def patch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the zero-padded 3x3 patches; see :func:`cxgrad_fast.kernels.patch_statistics`."""
    tasks, images, channels, height, width = x.shape
    length, count = 9 * channels, images * height * width
    mean = x.new_empty((tasks, length), dtype=torch.float64)
    covariance = x.new_empty((tasks, length, length), dtype=torch.float64)
    if not tasks:
        return mean, covariance
    shift = x.mean((1, 3, 4), dtype=torch.float64)
    size = length + 1
    block = min(64, max(16, triton.next_power_of_2(size)))
    defaults = {"BLOCK_P": 32, "BLOCK_K": block, "num_warps": 4}
    settings = launch.settings("patch_statistics", defaults, count=count, channels=channels)
    span = launch.divide(max(_SHORTEST, launch.divide(count, _PARTS)), settings["BLOCK_P"]) * settings["BLOCK_P"]
    parts, blocks = launch.divide(count, span), launch.divide(size, settings["BLOCK_K"])
    partials = x.new_empty((tasks, parts, size, size), dtype=torch.float64)
    _products[(blocks * blocks, parts, tasks)](
        x, shift, partials, count, span, *x.stride(), H=height, W=width, C=channels, **settings, **launch.FUSED
    )
    _merge[(launch.divide(length * length, 32), tasks)](
        partials, shift, mean, covariance, count, parts, C=channels, BLOCK_B=32, BLOCK_N=32, num_warps=8, **launch.FUSED
    )
    return mean, covariance


# --- what is measured ---


@launch.tunable(
    "patch_statistics",
    candidates=lambda defaults, shape: [
        {"BLOCK_P": positions, "num_warps": warps} for positions in (16, 32, 64) for warps in (4, 8)
    ],
    examples=[
        {"tasks": tasks, "images": images, "size": size}
        for size in (28, 84)
        for tasks, images in ((4, 5), (2, 25), (2, 75))
    ],
)
def _example(tasks: int, images: int, size: int) -> Callable[[], Any]:
    x = torch.randn(tasks, images, 3, size, size, device="cuda")
    return lambda: patch_statistics(x)
