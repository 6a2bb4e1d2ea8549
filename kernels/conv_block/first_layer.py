"""The first layer from its patch statistics (MATH.md 2): one pass over the images, nothing of their size is stored.

Mean and variance are known before the convolution, so that it is normalised, activated and pooled in registers. The
images' patches are gathered by the load once for each corner of the pooling windows, [windows, 9 Cin] with the sum
filled up to a power of two (27 to 32), in any strides; a product's sum has the same order at every corner, so that
equal patches tie to the bit. The derivatives take products at the arg-max alone, as four masked products of whole
windows.

What has no position is a closed form in float64, a small kernel before or behind the pass: two launches for the block,
its first and its second derivative each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block.convolution import (
    _bfloat16,
    _rounded_to_tf32,
    _tf32,
    channels_last,
    empty_images,
    products,
)
from cxgrad_fast.kernels.conv_block.forward import load_moments, store_table, table_type
from cxgrad_fast.kernels.conv_block.sums import load_table, pass_places

_ROWS = tl.constexpr(4)  # of a table, whichever pass it is for

_PARTS = 256  # of a task's windows, summed each by itself: what fills a large device with one task
_SHORTEST = 256  # windows of a part
_MOST_IMAGES = 256  # in a block of windows


# --- patches and filters ---


@triton.jit
def _windows(
    x,
    start,
    count,
    task,
    task_stride,
    image_stride,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Where the upper left patches [BLOCK_P, KP] of the windows from ``start`` on lie, and what they lie beyond.

    That is 1 for an upper patch beyond the upper border, 2 for a lower one beyond the lower, 4 and 8 the same for left
    and right. Past the end of a patch its last entry stands again, to be multiplied by zeros; past the last window,
    that window.
    """
    columns: tl.constexpr = W // 2
    size: tl.constexpr = H // 2 * columns
    position = tl.minimum(start + tl.arange(0, BLOCK_P), count - 1)
    image, window = position // size, position % size
    i, j = window // columns, window % columns
    k = tl.minimum(tl.arange(0, KP), 9 * CIN - 1)
    row, column = k // 3 % 3 - 1, k % 3 - 1
    h, w = 2 * i[:, None] + row[None, :], 2 * j[:, None] + column[None, :]
    beyond = tl.where(h < 0, 1, 0) + tl.where(h >= H - 1, 2, 0) + tl.where(w < 0, 4, 0) + tl.where(w >= W - 1, 8, 0)
    # from the first window's image on 32 bits are enough
    first = x + task * task_stride + (start // size).to(tl.int64) * image_stride
    offset = (image - start // size) * image_stride + 2 * i * ROW_STRIDE + 2 * j * COLUMN_STRIDE
    offset_k = k // 9 * CHANNEL_STRIDE + row * ROW_STRIDE + column * COLUMN_STRIDE
    return first, offset[:, None] + offset_k[None, :], beyond


@triton.jit
def _patches(first, offset, beyond, corner, ROW_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr):
    """[P, KP]: the patches about one corner, in row-major order, of the windows: what :func:`_windows` gives."""
    down, right = corner // 2, corner % 2
    there = (beyond & ((1 << down) | (4 << right))) == 0
    return tl.load(first + (down * ROW_STRIDE + right * COLUMN_STRIDE) + offset, mask=there, other=0.0)


@triton.jit
def _rows(values, task, channel, CIN: tl.constexpr, COUT: tl.constexpr, KP: tl.constexpr):
    """Filters [N, KP] of [T, COUT, 9 CIN]."""
    k = tl.arange(0, KP)
    at = values + task * (COUT * 9 * CIN) + channel[:, None] * (9 * CIN) + k[None, :]
    return tl.load(at, mask=(channel < COUT)[:, None] & (k < 9 * CIN)[None, :], other=0.0)


# --- closed forms ---


@triton.jit
def _mean(patch_mean, task, CIN: tl.constexpr, KP: tl.constexpr):
    """[KP] of [T, 9 CIN]."""
    k = tl.arange(0, KP)
    return tl.load(patch_mean + task * (9 * CIN) + k, mask=k < 9 * CIN, other=0.0)


@triton.jit
def _turned(rows, patch_covariance, task, CIN: tl.constexpr, KP: tl.constexpr):
    """Covariance times filters [N, KP]: [N, KP] float64."""
    length: tl.constexpr = 9 * CIN
    k, other = tl.arange(0, KP)[:, None], tl.arange(0, KP)[None, :]
    at = patch_covariance + task * (length * length) + k * length + other
    covariance = tl.load(at, mask=(k < length) & (other < length), other=0.0)
    if rows.shape[0] >= 16:
        return tl.dot(rows.to(tl.float64), covariance, input_precision="ieee", out_dtype=tl.float64)
    return tl.sum(rows.to(tl.float64)[:, :, None] * covariance[None, :, :], 1)


@triton.jit
def _optional(values, task, channel, C: tl.constexpr):
    """One row [N] of [T, C] in float64, or zeros."""
    row = tl.zeros(channel.shape, tl.float64)
    if values is not None:
        row = tl.load(values + task * C + channel, mask=channel < C, other=0.0).to(tl.float64)
    return row


@triton.jit
def _store(to, values, mask=None):
    """Values of float64, rounded to what they are stored in."""
    kind: tl.constexpr = to.dtype.element_ty
    if kind == tl.bfloat16:  # the interpreter has no other way there
        values = values.to(tl.float32)
    tl.store(to, values.to(kind), mask=mask)


@triton.jit
def _moments(
    weight,
    patch_mean,
    patch_covariance,
    scale,
    bias,
    eps,
    moments,
    table,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """moments [T, 2, COUT]: w . mean and w' covariance w; and the forward pass's table, mean to bias."""
    task = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = _rows(weight, task, channel, CIN, COUT, KP).to(tl.float64)
    mean = tl.sum(rows * _mean(patch_mean, task, CIN, KP)[None, :], 1)
    variance = tl.sum(rows * _turned(rows, patch_covariance, task, CIN, KP), 1)
    to = moments + task * (2 * COUT) + channel
    tl.store(to, mean, mask=channel < COUT)
    tl.store(to + COUT, variance, mask=channel < COUT)
    store_table(table, mean, variance, scale, bias, eps, task, channel, COUT, _ROWS)


# --- the block ---


@triton.jit
def _split(values, PRODUCTS: tl.constexpr):
    """An operand of :func:`_product`, in as many parts as it takes: the second is the first where it takes one."""
    rest = values
    if PRODUCTS == "tf32x3":
        rest = values - _tf32(values)
        values = _tf32(values)
    elif PRODUCTS == "tf32":
        values = _rounded_to_tf32(values)
        rest = values
    elif PRODUCTS == "bfloat16":
        values = _bfloat16(values)
        rest = values
    return values, rest


@triton.jit
def _product(a, a_rest, b, b_rest, PRODUCTS: tl.constexpr):
    """[M, N] of blocks [M, K] and [K, N], each in the parts that :func:`_split` gives."""
    if PRODUCTS == "tf32x3":
        total = tl.dot(a_rest, b, input_precision="tf32")
        total = tl.dot(a, b_rest, total, input_precision="tf32")
        return tl.dot(a, b, total, input_precision="tf32")
    if PRODUCTS == "tf32":
        return tl.dot(a, b, input_precision="tf32")
    if PRODUCTS == "bfloat16":
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float64)


@triton.jit(do_not_specialize=["count"])
def _forward(
    x,
    weight,
    table,
    out,
    selected,
    corners,
    count,
    task_stride,
    image_stride,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    SLOPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out, selected and corners [T, count, COUT] of the windows of each task's images.

    The largest of a window is found before the normalisation, as the largest or, under a negative scale, the smallest
    value of the convolution: filters change their sign with the scale, which rounds nothing.
    """
    accumulate: tl.constexpr = tl.float64 if PRODUCTS == "ieee" else tl.float32
    task = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = position < count
    scale = load_table(table, task, channel, 2, COUT, _ROWS)
    sign = tl.where(scale < 0, -1.0, 1.0).to(accumulate)
    filters = tl.trans(_rows(weight, task, channel, CIN, COUT, KP)).to(accumulate) * sign
    filters, rest = _split(filters, PRODUCTS)
    windows = _windows(
        x,
        tl.program_id(0) * BLOCK_P,
        count,
        task,
        task_stride,
        image_stride,
        CHANNEL_STRIDE,
        ROW_STRIDE,
        COLUMN_STRIDE,
        H,
        W,
        CIN,
        KP,
        BLOCK_P,
    )
    none_larger = tl.where(scale != 0, 0.0, float("inf")).to(accumulate)  # a scale of zero: all tie
    best = tl.zeros((BLOCK_P, BLOCK_C), accumulate)
    code = tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    for corner in tl.static_range(4):  # row-major order decides ties
        patches = _patches(*windows, corner, ROW_STRIDE, COLUMN_STRIDE).to(accumulate)
        value = _product(*_split(patches, PRODUCTS), filters, rest, PRODUCTS)
        if corner == 0:
            best = value
        else:
            larger = value > best + none_larger
            best = tl.where(larger, value, best)
            code = tl.where(larger, 2 * (corner % 2) + corner // 2, code)

    inverse = load_table(table, task, channel, 1, COUT, _ROWS)
    unit = best * (sign * inverse) - load_table(table, task, channel, 0, COUT, _ROWS) * inverse
    z = unit * scale + load_table(table, task, channel, 3, COUT, _ROWS)
    at = ((task * count + position) * COUT)[:, None] + channel[None, :]
    exists = inside[:, None] & (channel < COUT)[None, :]
    tl.store(selected + at, unit.to(selected.dtype.element_ty), mask=exists)
    tl.store(corners + at, tl.where(z > 0, code, code + 4).to(tl.uint8), mask=exists)
    if SLOPE != 1.0:
        z = tl.where(z > 0, z, z * SLOPE)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=exists)


def _filters(weight: Tensor) -> Tensor:
    """``weight`` for closed forms: float64 tensor cores cannot be fed with bfloat16 (Triton 3.6)."""
    return (weight.float() if weight.dtype == torch.bfloat16 else weight).contiguous()


def _padded(inputs: int) -> int:
    """Length of a patch, filled up to what a block can have."""
    return max(16, triton.next_power_of_2(9 * inputs))


def _channels(outputs: int, most: int = 64) -> int:
    """48 channels are one block of 64: Hopper's products take as long for 32 and 16 columns together."""
    return min(most, max(16, triton.next_power_of_2(outputs)))


def _within_reach(x: Tensor) -> Tensor:
    """``x``, or a copy where the images of one block of windows lie more than 2^31 values apart."""
    sizes, strides = x.shape[2:], x.stride()[2:]
    reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + _MOST_IMAGES * x.stride(1)
    return x if reach < 2**31 else x.contiguous()


def _strides(x: Tensor) -> dict[str, int]:
    """Of an image, as constants: its four corners' addresses then differ by what an instruction adds for nothing."""
    return {name: x.stride(axis) for axis, name in enumerate(("CHANNEL_STRIDE", "ROW_STRIDE", "COLUMN_STRIDE"), 2)}


def _settings(kernel: str, how: str, count: int, inputs: int, outputs: int, reduce: bool = False) -> dict[str, int]:
    """Blocks of a pass over ``count`` windows a task, whatever the number of tasks: their bits do not depend on it.

    64 windows are what Hopper's products take at a time, in a reduction 64 channels; elsewhere half as many fit the
    registers. A second derivative of 16 channels has room for 64; for 32 Triton 3.6 takes too few registers on sm_80.
    """
    defaults = {"BLOCK_P": 64, "BLOCK_C": _channels(outputs), "num_warps": 4}
    if how == "ieee":
        defaults |= {"BLOCK_P": 16, "BLOCK_C": _channels(outputs, 32)}
    elif (launch.architecture() == "sm_80" and (kernel, defaults["BLOCK_C"]) != ("first_layer_second", 16)) or (
        reduce and defaults["BLOCK_C"] < 64
    ):
        defaults["BLOCK_P"] = 32
    return launch.settings(kernel, defaults, products=how, count=count, inputs=inputs, outputs=outputs)


def forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    slope: float,
    patch_mean: Tensor,
    patch_covariance: Tensor,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(out, y, selected, corners, moments) as in csrc/conv_block.h; y is empty."""
    x = _within_reach(x)
    tasks, images, inputs, height, width = x.shape
    outputs, padded = weight.shape[1], _padded(inputs)
    weight = weight.contiguous()
    moments = x.new_empty((tasks, 2, outputs), dtype=torch.float64)
    table = x.new_empty((tasks, _ROWS.value, outputs), dtype=table_type(x.dtype))
    sizes = {"CIN": inputs, "COUT": outputs, "KP": padded}
    patches, affine = (patch_mean.contiguous(), patch_covariance.contiguous()), (scale, bias, eps)
    _moments[(launch.divide(outputs, 16), tasks)](
        _filters(weight), *patches, *affine, moments, table, **sizes, BLOCK_C=16, num_warps=4, **launch.FUSED
    )
    size = height // 2, width // 2
    out, selected = (empty_images(x, outputs, *size) for _ in range(2))
    corners = empty_images(x, outputs, *size, torch.uint8)
    count = images * size[0] * size[1]
    how = products(x.dtype, precision)
    settings = _settings("first_layer_forward", how, count, inputs, outputs)
    grid = (launch.divide(count, settings["BLOCK_P"]), launch.divide(outputs, settings["BLOCK_C"]), tasks)
    layer = {**_strides(x), "H": height, "W": width, "SLOPE": slope, "PRODUCTS": how, **sizes}
    _forward[grid](
        x, weight, table, out, selected, corners, count, *x.stride()[:2], **layer, **settings, **launch.FUSED
    )
    return out, x.new_empty(0), selected, corners, moments


# --- its first derivative ---


@triton.jit(do_not_specialize=["count", "span"])
def _reduce(
    q,
    x,
    selected,
    corners,
    sums,
    sparse,
    count,
    span,
    task_stride,
    image_stride,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    SLOPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums [T, parts, 2, COUT] of dz and dz unit, and sparse [T, parts, COUT, KP] of dz patch; a part: span windows."""
    accumulate: tl.constexpr = tl.float64 if PRODUCTS == "ieee" else tl.float32
    task, part = tl.program_id(2).to(tl.int64), tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    db = tl.zeros((BLOCK_C,), tl.float64)
    dg = tl.zeros((BLOCK_C,), tl.float64)
    total = tl.zeros((BLOCK_C, KP), accumulate)
    for start in tl.range(0, span, BLOCK_P, num_stages=1):
        position = part * span + start + tl.arange(0, BLOCK_P)
        inside = position < count
        at = ((task * count + position) * COUT)[:, None] + channel[None, :]
        exists = inside[:, None] & (channel < COUT)[None, :]
        dz = tl.load(q + at, mask=exists, other=0.0).to(accumulate)
        # 4 bytes a thread: 16 would have a thread hold 16 channels, and the sums cross its warp for each of them
        code = tl.load(corners + tl.max_contiguous(at, (1, 4)), mask=exists, other=0).to(tl.int32)
        if SLOPE != 1.0:
            dz = tl.where(code >= 4, dz * SLOPE, dz)
        unit = tl.load(selected + at, mask=exists, other=0.0).to(accumulate)
        db += tl.sum(dz, 0).to(tl.float64)
        dg += tl.sum(dz * unit, 0).to(tl.float64)
        if sparse is not None:
            windows = _windows(
                x,
                part * span + start,
                count,
                task,
                task_stride,
                image_stride,
                CHANNEL_STRIDE,
                ROW_STRIDE,
                COLUMN_STRIDE,
                H,
                W,
                CIN,
                KP,
                BLOCK_P,
            )
            dz, rest = _split(tl.trans(dz), PRODUCTS)
            order = tl.trans(2 * (code % 2) + code // 2 % 2)  # row-major
            for corner in tl.range(4, num_stages=1):
                patches = _patches(*windows, corner, ROW_STRIDE, COLUMN_STRIDE).to(accumulate)
                here = order == (0 if PRODUCTS == "ieee" else corner)
                zero = tl.zeros_like(dz)
                masked, masked_rest = tl.where(here, dz, zero), tl.where(here, rest, zero)
                total += _product(masked, masked_rest, *_split(patches, PRODUCTS), PRODUCTS)
                if PRODUCTS == "ieee":
                    # Triton 3.6 cannot feed float64 tensor cores with what was made of bytes, and sees it unless a
                    # loop carries it
                    dz -= masked
                    order -= 1

    row = task * tl.num_programs(0) + part
    tl.store(sums + row * (2 * COUT) + channel, db, mask=channel < COUT)
    tl.store(sums + row * (2 * COUT) + COUT + channel, dg, mask=channel < COUT)
    if sparse is not None:
        at = row * (COUT * KP) + channel[:, None] * KP + tl.arange(0, KP)[None, :]
        tl.store(sparse + at, total, mask=(channel < COUT)[:, None])


@triton.jit
def _inverse(moments, eps, task, channel, C: tl.constexpr):
    """(v + e)^(-1/2) [N] in float64."""
    _, variance = load_moments(moments, task, channel, C)
    return 1.0 / tl.sqrt(variance + tl.load(eps + task).to(tl.float64))


@triton.jit
def _merged(sums, task, parts, quantity, channel, C: tl.constexpr, BLOCK_B: tl.constexpr):
    """[N] in float64: one of the two quantities of sums [T, parts, 2, C], over the parts in their order."""
    total = tl.zeros(channel.shape, tl.float64)
    for start in range(0, parts, BLOCK_B):
        part = start + tl.arange(0, BLOCK_B)
        at = sums + ((task * parts + part) * 2 + quantity)[:, None] * C + channel[None, :]
        total += tl.sum(tl.load(at, mask=(part < parts)[:, None] & (channel < C)[None, :], other=0.0), 0)
    return total


@triton.jit
def _finish_affine(
    sums,
    scale,
    eps,
    moments,
    dscale,
    dbias,
    deps,
    task,
    parts,
    COUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dscale and dbias [T, COUT], deps [T] = -1/2 sum r^2 g dg."""
    total = tl.zeros((BLOCK_C,), tl.float64)
    for start in tl.static_range(0, COUT, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        db = _merged(sums, task, parts, 0, channel, COUT, BLOCK_B)
        dg = _merged(sums, task, parts, 1, channel, COUT, BLOCK_B)
        _store(dbias + task * COUT + channel, db, mask=channel < COUT)
        _store(dscale + task * COUT + channel, dg, mask=channel < COUT)
        inverse = _inverse(moments, eps, task, channel, COUT)
        total += inverse * inverse * _optional(scale, task, channel, COUT) * dg
    _store(deps + task, -0.5 * tl.sum(total, 0))


@triton.jit
def _finish_weight(
    sums,
    sparse_parts,
    weight,
    scale,
    eps,
    moments,
    patch_mean,
    patch_covariance,
    dweight,
    sparse,
    task,
    channel,
    parts,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of channels [BLOCK_N]: D, sparse [T, 9 CIN, COUT], and dweight = k (D - db mean - dg r (covariance w))."""
    exists = channel < COUT
    k = tl.arange(0, KP)
    total = tl.zeros((BLOCK_N, KP), tl.float64)
    for start in range(0, parts, BLOCK_B):
        part = (start + tl.arange(0, BLOCK_B))[:, None, None]
        at = sparse_parts + ((task * parts + part) * COUT + channel[None, :, None]) * KP + k[None, None, :]
        total += tl.sum(tl.load(at, mask=(part < parts) & exists[None, :, None], other=0.0).to(tl.float64), 0)
    inside = exists[:, None] & (k < 9 * CIN)[None, :]
    tl.store(sparse + (task * (9 * CIN) + k[None, :]) * COUT + channel[:, None], total, mask=inside)
    db = _merged(sums, task, parts, 0, channel, COUT, BLOCK_B)
    dg = _merged(sums, task, parts, 1, channel, COUT, BLOCK_B)
    inverse = _inverse(moments, eps, task, channel, COUT)
    turned = _turned(_rows(weight, task, channel, CIN, COUT, KP), patch_covariance, task, CIN, KP)
    value = total - db[:, None] * _mean(patch_mean, task, CIN, KP)[None, :] - (dg * inverse)[:, None] * turned
    value *= (_optional(scale, task, channel, COUT) * inverse)[:, None]
    to = dweight + (task * COUT + channel)[:, None] * (9 * CIN) + k[None, :]
    _store(to, value, mask=inside)


@triton.jit(do_not_specialize=["parts"])
def _finish(
    sums,
    sparse_parts,
    weight,
    scale,
    eps,
    moments,
    patch_mean,
    patch_covariance,
    dscale,
    dbias,
    deps,
    dweight,
    sparse,
    parts,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """From the parts' sums: a task's first program all that is a number a channel, the others the weight's gradient."""
    task = tl.program_id(1).to(tl.int64)
    if tl.program_id(0) == 0:
        _finish_affine(sums, scale, eps, moments, dscale, dbias, deps, task, parts, COUT, BLOCK_B, BLOCK_C)
    elif sparse is not None:
        _finish_weight(
            sums,
            sparse_parts,
            weight,
            scale,
            eps,
            moments,
            patch_mean,
            patch_covariance,
            dweight,
            sparse,
            task,
            (tl.program_id(0) - 1) * BLOCK_N + tl.arange(0, BLOCK_N),
            parts,
            CIN,
            COUT,
            KP,
            BLOCK_B,
            BLOCK_N,
        )


def backward(
    q: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    eps: Tensor,
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    slope: float,
    patch_mean: Tensor,
    patch_covariance: Tensor,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dscale, dbias, deps, sparse) as in csrc/conv_block.h; dx is empty."""
    x = _within_reach(x)
    tasks, images, inputs, height, width = x.shape
    outputs, padded = weight.shape[1], _padded(inputs)
    count = images * (height // 2) * (width // 2)
    how, kind = products(x.dtype, precision), table_type(x.dtype)
    settings = _settings("first_layer_reduce", how, count, inputs, outputs, reduce=True)
    block = settings["BLOCK_P"]
    span = launch.divide(max(_SHORTEST, launch.divide(count, _PARTS)), block) * block
    parts = launch.divide(count, span)
    sums = x.new_empty((tasks, parts, 2, outputs), dtype=torch.float64)
    sizes = {"CIN": inputs, "COUT": outputs, "KP": padded}
    dweight, sparse = x.new_empty(0), x.new_empty(0, dtype=torch.float64)
    sparse_parts: Tensor | None = None
    if need_weight:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        sparse = x.new_empty((tasks, 9 * inputs, outputs), dtype=torch.float64)
        sparse_parts = x.new_empty((tasks, parts, outputs, padded), dtype=kind)
    saved = (channels_last(selected), channels_last(corners))
    grid = (parts, launch.divide(outputs, settings["BLOCK_C"]), tasks)
    layer = {**_strides(x), "H": height, "W": width, "SLOPE": slope, "PRODUCTS": how, **sizes}
    _reduce[grid](
        channels_last(q),
        x,
        *saved,
        sums,
        sparse_parts,
        count,
        span,
        *x.stride()[:2],
        **layer,
        **settings,
        **launch.FUSED,
    )
    dscale, dbias, deps = x.new_empty((tasks, outputs)), x.new_empty((tasks, outputs)), x.new_empty(tasks)
    _finish[(1 + (launch.divide(outputs, 4) if need_weight else 0), tasks)](
        sums,
        sparse_parts,
        _filters(weight),
        scale,
        eps,
        moments,
        patch_mean.contiguous(),
        patch_covariance.contiguous(),
        dscale,
        dbias,
        deps,
        dweight if need_weight else None,
        sparse if need_weight else None,
        parts,
        **sizes,
        BLOCK_B=32,
        BLOCK_C=_channels(outputs),
        BLOCK_N=4,
        num_warps=8,
        **launch.FUSED,
    )
    return x.new_empty(0), dweight, dscale, dbias, deps, sparse


# --- its second derivative ---


@triton.jit
def _coefficients(
    on_weight,
    on_scale,
    on_bias,
    on_eps,
    weight,
    scale,
    eps,
    moments,
    dscale,
    dbias,
    sparse,
    patch_mean,
    patch_covariance,
    weight_gradient,
    scale_gradient,
    eps_gradient,
    table,
    positions,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradients for weight, scale [T, COUT] and epsilon [T], and the pass's table; names as in MATH.md 1 and 2.

    In the table: Su/n, k, what unit is multiplied by, what is added.
    """
    task = tl.program_id(0).to(tl.int64)
    n = positions.to(tl.float64)
    share = 1.0 / n
    e = tl.zeros((1,), tl.float64)
    if on_eps is not None:
        e += tl.load(on_eps + task).to(tl.float64)
    k = tl.arange(0, KP)
    mu = _mean(patch_mean, task, CIN, KP)[None, :]
    total = tl.zeros((BLOCK_C,), tl.float64)
    for start in tl.range(0, COUT, BLOCK_C, num_stages=1):
        channel = start + tl.arange(0, BLOCK_C)
        exists = channel < COUT
        inside = exists[:, None] & (k < 9 * CIN)[None, :]
        r = _inverse(moments, eps, task, channel, COUT)
        g = _optional(scale, task, channel, COUT)
        db, dg = _optional(dbias, task, channel, COUT), _optional(dscale, task, channel, COUT)
        turned = tl.zeros((BLOCK_C, KP), tl.float64)
        of_sparse = turned
        if on_weight is not None or weight_gradient is not None:
            turned = _turned(_rows(weight, task, channel, CIN, COUT, KP), patch_covariance, task, CIN, KP)
            at = sparse + (task * (9 * CIN) + k[None, :]) * COUT + channel[:, None]
            of_sparse = tl.load(at, mask=inside, other=0.0)
        su = tl.zeros((BLOCK_C,), tl.float64)
        su_unit, su_dz = su, su
        if on_weight is not None:
            direction = _rows(on_weight, task, channel, CIN, COUT, KP).to(tl.float64)
            su = n * tl.sum(direction * mu, 1)
            su_unit = n * r * tl.sum(direction * turned, 1)
            su_dz = tl.sum(direction * of_sparse, 1)

        gain = g * r
        ge = _optional(on_scale, task, channel, COUT) - 0.5 * e * r * r * g
        sum_q = su_dz - (su * db + su_unit * dg) * share
        a = -gain * dg * share
        d = ge - gain * su_unit * share
        s0 = a * su + d * db
        sum_r = a * su_unit + d * dg + gain * sum_q - e * r * r * g * dg
        total += r * r * sum_r
        of_scale = r * sum_q - 0.5 * e * r * r * dg
        _store(scale_gradient + task * COUT + channel, of_scale, mask=exists)
        if weight_gradient is not None:
            value = d[:, None] * of_sparse - s0[:, None] * mu - (sum_r * r)[:, None] * turned
            if on_weight is not None:
                shifted = _turned(direction, patch_covariance, task, CIN, KP) + (su * share)[:, None] * mu
                value += (a * n)[:, None] * shifted
            to = weight_gradient + (task * COUT + channel)[:, None] * (9 * CIN) + k[None, :]
            _store(to, r[:, None] * value, mask=inside)

        to = table + task * (_ROWS * COUT) + channel
        _store(to, su * share, mask=exists)
        _store(to + COUT, gain, mask=exists)
        _store(to + 2 * COUT, d, mask=exists)
        _store(to + 3 * COUT, _optional(on_bias, task, channel, COUT), mask=exists)
    _store(eps_gradient + task, -0.5 * tl.sum(total, 0))


@triton.jit(do_not_specialize=["count"])
def _second(
    x,
    on_weight,
    selected,
    corners,
    table,
    q_gradient,
    count,
    task_stride,
    image_stride,
    CHANNEL_STRIDE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KP: tl.constexpr,
    SLOPE: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """q_gradient [T, count, COUT] = leaky' (k (u - Su/n) + d unit + B), u = conv(x, W) at the arg-max.

    With d = Ge - k Su^/n, which is the rest of MATH.md's formula.
    """
    accumulate: tl.constexpr = tl.float64 if PRODUCTS == "ieee" else tl.float32
    task, _, channel, exists, at = pass_places(count, COUT, BLOCK_P, BLOCK_C)
    code = tl.load(corners + at, mask=exists, other=0)
    unit = tl.load(selected + at, mask=exists, other=0.0).to(accumulate)
    value = unit * load_table(table, task, channel, 2, COUT, _ROWS) + load_table(table, task, channel, 3, COUT, _ROWS)
    if on_weight is not None:
        filters, rest = _split(tl.trans(_rows(on_weight, task, channel, CIN, COUT, KP)).to(accumulate), PRODUCTS)
        windows = _windows(
            x,
            tl.program_id(0) * BLOCK_P,
            count,
            task,
            task_stride,
            image_stride,
            CHANNEL_STRIDE,
            ROW_STRIDE,
            COLUMN_STRIDE,
            H,
            W,
            CIN,
            KP,
            BLOCK_P,
        )
        u = tl.zeros((BLOCK_P, BLOCK_C), accumulate)
        for corner in tl.range(4, num_stages=1):  # unrolled, several corners' patches take all registers
            patches = _patches(*windows, corner, ROW_STRIDE, COLUMN_STRIDE).to(accumulate)
            of_corner = _product(*_split(patches, PRODUCTS), filters, rest, PRODUCTS)
            u = tl.where(code % 4 == 2 * (corner % 2) + corner // 2, of_corner, u)
        gain = load_table(table, task, channel, 1, COUT, _ROWS)
        value += gain * (u - load_table(table, task, channel, 0, COUT, _ROWS))
    if SLOPE != 1.0:
        value = tl.where(code >= 4, value * SLOPE, value)
    tl.store(q_gradient + at, value.to(q_gradient.dtype.element_ty), mask=exists)


def double_backward(
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
    selected: Tensor,
    corners: Tensor,
    moments: Tensor,
    dscale: Tensor,
    dbias: Tensor,
    sparse: Tensor,
    slope: float,
    patch_mean: Tensor,
    patch_covariance: Tensor,
    need_weight: bool,
    *,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of (q, x, weight, scale, eps, y) as in csrc/conv_block.h; those of x and y are empty."""
    x = _within_reach(x)
    tasks, images, inputs, height, width = x.shape
    outputs, padded = weight.shape[1], _padded(inputs)
    patches = (patch_mean.contiguous(), patch_covariance.contiguous())
    if sparse.dim() != 3 and (need_weight or on_weight is not None):  # a first derivative in epsilon alone had no D
        saved = (selected, corners, moments)
        sparse = backward(q, x, weight, scale, bias, eps, *saved, slope, *patches, True, precision=precision)[5]
    given = (on_weight, on_scale, on_bias, on_eps)
    on_weight, on_scale, on_bias, on_eps = (None if tensor is None else tensor.contiguous() for tensor in given)
    weight_gradient = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    scale_gradient, eps_gradient = x.new_empty((tasks, outputs)), x.new_empty(tasks)
    table = x.new_empty((tasks, _ROWS.value, outputs), dtype=table_type(x.dtype))
    sizes = {"CIN": inputs, "COUT": outputs, "KP": padded}
    _coefficients[(tasks,)](
        None if on_weight is None else _filters(on_weight),
        on_scale,
        on_bias,
        on_eps,
        _filters(weight),
        scale,
        eps,
        moments,
        dscale.contiguous(),
        dbias.contiguous(),
        sparse,
        *patches,
        weight_gradient,
        scale_gradient,
        eps_gradient,
        table,
        images * height * width,
        **sizes,
        BLOCK_C=16,
        num_warps=8,
        **launch.FUSED,
    )
    q_gradient = empty_images(q, *q.shape[2:])
    count = images * (height // 2) * (width // 2)
    how = products(x.dtype, precision)
    settings = _settings("first_layer_second", how, count, inputs, outputs)
    chosen = (channels_last(selected), channels_last(corners))
    grid = (launch.divide(count, settings["BLOCK_P"]), launch.divide(outputs, settings["BLOCK_C"]), tasks)
    layer = {**_strides(x), "H": height, "W": width, "SLOPE": slope, "PRODUCTS": how, **sizes}
    _second[grid](x, on_weight, *chosen, table, q_gradient, count, *x.stride()[:2], **layer, **settings, **launch.FUSED)
    if weight_gradient is None:
        weight_gradient = x.new_empty(0)
    return q_gradient, x.new_empty(0), weight_gradient, scale_gradient, eps_gradient, x.new_empty(0)
