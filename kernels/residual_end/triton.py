"""residual_end in Triton: its graph keeps one byte an output, and each derivative is one pass.

Images lie [T, S, H, W, C]. A program does a block of elements of one image, neighbours along the channels; where a
tensor has windows and another positions, the pass goes over what it writes, so that every element is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block.convolution import channels_last, empty_images
from cxgrad_fast.kernels.residual_end import reference
from cxgrad_fast.kernels.residual_end.chain import Chain


def residual_end(x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int) -> Tensor:
    """As the definition; no task is left to it."""
    if not len(x):
        return reference.residual_end(x, shortcut, slope=slope, pool=pool, padding=padding)
    return _CHAIN.end(x, shortcut, slope=slope, pool=pool, padding=padding)


@triton.jit
def _element(size, C: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of one image's ``size`` elements: its number, the elements, which exist, and their row, column and channel."""
    blocks = tl.cdiv(size, BLOCK)
    element = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    position = element // C
    image = (tl.program_id(0) // blocks).to(tl.int64)
    return image, element, element < size, position // COLUMNS, position % COLUMNS, element % C


@triton.constexpr_function
def _wide(kind):
    """What numbers of a type are computed in."""
    return tl.float64 if kind == tl.float64 else tl.float32


@triton.jit
def _forward(
    x,
    shortcut,
    out,
    codes,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out and codes [images, ROWS, COLUMNS, C]: the arg-max's corner, 2 column + row, and 4 where the slope applies."""
    kind: tl.constexpr = _wide(x.dtype.element_ty)
    image, element, exists, i, j, channel = _element(ROWS * COLUMNS * C, C, COLUMNS, BLOCK)
    from_ = image * (H * W * C)
    best = tl.zeros((BLOCK,), kind)
    code = tl.zeros((BLOCK,), tl.int32)
    found = tl.zeros((BLOCK,), tl.int1)
    for corner in tl.static_range(4 if POOL else 1):  # row-major order decides ties
        h, w = i, j
        if POOL:
            h, w = 2 * i - PADDING + corner // 2, 2 * j - PADDING + corner % 2
        inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = from_ + (h * W + w) * C + channel
        z = tl.load(x + at, mask=inside, other=0.0).to(kind) + tl.load(shortcut + at, mask=inside, other=0.0).to(kind)
        larger = inside & ((z > best) | (z != z) | (found == 0))  # what is not a number wins, as in the framework
        best = tl.where(larger, z, best)
        code = tl.where(larger, 2 * (corner % 2) + corner // 2, code)
        found |= inside
    to = image * (ROWS * COLUMNS * C) + element
    tl.store(codes + to, tl.where(best > 0, code, code + 4).to(tl.uint8), mask=exists)
    tl.store(out + to, tl.where(best > 0, best, best * SLOPE).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _backward(
    q,
    codes,
    gradient,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient [images, H, W, C]: q times the activation's derivative, where its window was largest."""
    image, element, exists, h, w, channel = _element(H * W * C, C, W, BLOCK)
    i, j = h, w
    corner = tl.zeros((BLOCK,), tl.int32)
    if POOL:
        i, j = (h + PADDING) // 2, (w + PADDING) // 2
        corner = (w + PADDING) % 2 * 2 + (h + PADDING) % 2
    inside = exists & (i < ROWS) & (j < COLUMNS)
    at = image * (ROWS * COLUMNS * C) + (i * COLUMNS + j) * C + channel
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    value = tl.load(q + at, mask=inside, other=0.0).to(_wide(q.dtype.element_ty))
    value = tl.where(code >= 4, value * SLOPE, value)
    value = tl.where(inside & (code % 4 == corner), value, 0.0)
    tl.store(gradient + image * (H * W * C) + element, value.to(gradient.dtype.element_ty), mask=exists)


@triton.jit
def _double_backward(
    cotangent,
    codes,
    out,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [images, ROWS, COLUMNS, C]: the cotangent at the largest of a window, times the activation's derivative."""
    image, element, exists, i, j, channel = _element(ROWS * COLUMNS * C, C, COLUMNS, BLOCK)
    to = image * (ROWS * COLUMNS * C) + element
    code = tl.load(codes + to, mask=exists, other=0).to(tl.int32)
    value = tl.zeros((BLOCK,), _wide(out.dtype.element_ty))
    for corner in tl.static_range(4 if POOL else 1):  # all of a window lies in memory that is read anyway
        h, w = i, j
        if POOL:
            h, w = 2 * i - PADDING + corner // 2, 2 * j - PADDING + corner % 2
        inside = exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = image * (H * W * C) + (h * W + w) * C + channel
        other = tl.load(cotangent + at, mask=inside, other=0.0).to(value.dtype)
        value = tl.where(code % 4 == 2 * (corner % 2) + corner // 2, other, value)
    value = tl.where(code >= 4, value * SLOPE, value)
    tl.store(out + to, value.to(out.dtype.element_ty), mask=exists)


def _launched(
    kernel: str, images: Tensor, size: tuple[int, int], slope: float, pool: bool, padding: int
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and options of a pass that writes ``images``, for images of a size before pooling."""
    tasks, count, channels, rows, columns = images.shape
    defaults = {"BLOCK": 1024, "num_warps": 4}
    settings = launch.settings(f"residual_end_{kernel}", defaults, elements=rows * columns * channels)
    pooled = _pooled(size, pool, padding)
    sizes = {"H": size[0], "W": size[1], "C": channels, "ROWS": pooled[0], "COLUMNS": pooled[1]}
    grid = (tasks * count * launch.divide(rows * columns * channels, settings["BLOCK"]),)
    return grid, {**sizes, "SLOPE": slope, "POOL": pool, "PADDING": padding, **settings}


def _pooled(size: tuple[int, int], pool: bool, padding: int) -> tuple[int, int]:
    height, width = size
    return ((height + 2 * padding) // 2, (width + 2 * padding) // 2) if pool else size


def _forward_of(x: Tensor, shortcut: Tensor, slope: float, pool: bool, padding: int) -> tuple[Tensor, Tensor]:
    """(out, codes), see csrc/residual_end.h."""
    height, width = x.shape[3:]
    pooled = _pooled((height, width), pool, padding)
    out = empty_images(x, x.shape[2], *pooled)
    codes = empty_images(x, x.shape[2], *pooled, torch.uint8)
    grid, options = _launched("forward", out, (height, width), slope, pool, padding)
    _forward[grid](channels_last(x), channels_last(shortcut), out, codes, **options, **launch.FUSED)
    return out, codes


def _backward_of(q: Tensor, codes: Tensor, height: int, width: int, slope: float, pool: bool, padding: int) -> Tensor:
    """The gradient of x, and of shortcut."""
    gradient = empty_images(q, q.shape[2], height, width)
    grid, options = _launched("backward", gradient, (height, width), slope, pool, padding)
    _backward[grid](channels_last(q), channels_last(codes), gradient, **options, **launch.FUSED)
    return gradient


def _double_backward_of(cotangent: Tensor, codes: Tensor, slope: float, pool: bool, padding: int) -> Tensor:
    """The gradient of q."""
    height, width = cotangent.shape[3:]
    out = empty_images(cotangent, *codes.shape[2:])
    grid, options = _launched("double_backward", out, (height, width), slope, pool, padding)
    _double_backward[grid](channels_last(cotangent), channels_last(codes), out, **options, **launch.FUSED)
    return out


_CHAIN = Chain(forward=_forward_of, backward=_backward_of, double_backward=_double_backward_of)


# --- what is measured ---


def _candidates(defaults: launch.Settings, shape: launch.Shape) -> list[launch.Settings]:
    return [{"BLOCK": block, "num_warps": warps} for block in (512, 1024, 2048, 4096) for warps in (4, 8)]


_EXAMPLES: Sequence[Mapping[str, int]] = [
    {"images": images, "channels": channels, "size": size}
    for channels, size in ((64, 84), (128, 42), (256, 21), (512, 10))  # ResNet-12's blocks
    for images in (5, 75)
]


def _images(images: int, channels: int, size: int) -> Tensor:
    return torch.randn(1, images, size, size, channels, device="cuda").permute(0, 1, 4, 2, 3)


@launch.tunable("residual_end_forward", candidates=_candidates, examples=_EXAMPLES)
def _forward_example(**sizes: int) -> Callable[[], Any]:
    x, shortcut = _images(**sizes), _images(**sizes)
    return lambda: _forward_of(x, shortcut, 0.1, True, 0)


@launch.tunable("residual_end_backward", candidates=_candidates, examples=_EXAMPLES)
def _backward_example(**sizes: int) -> Callable[[], Any]:
    x = _images(**sizes)
    q, codes = _forward_of(x, x, 0.1, True, 0)
    return lambda: _backward_of(q, codes, sizes["size"], sizes["size"], 0.1, True, 0)


@launch.tunable("residual_end_double_backward", candidates=_candidates, examples=_EXAMPLES)
def _double_backward_example(**sizes: int) -> Callable[[], Any]:
    x = _images(**sizes)
    codes = _forward_of(x, x, 0.1, True, 0)[1]
    return lambda: _double_backward_of(x, codes, 0.1, True, 0)
