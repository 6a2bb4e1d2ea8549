"""Convolutions of every task's images with its own filters, as matrix products on tensor cores.

A task's images are one matrix of positions by channels, [S H W, C], which is how they lie in memory. Its patches,
[S H W, k k C], are never stored: a block of them is gathered by the load, zero beyond the border. The filters lie as
[C', k k C] (:func:`pack`), contiguous along the sum, as Hopper's tensor cores want 32-bit operands.

float32 products are three TF32 ones of values split in two, a = A + a', of which only a'b' is left out (2^-24 of the
product). The filters are split once, when they are packed. Triton's own ``tf32x3`` splits them in every block, stores
both parts again in shared memory and tests every sum for NaN: 541 instead of 295 instructions for the same products.
The tensor cores' sums are rounded towards zero, so those of one block of the sum (32 products) are added to the rest
outside, rounded to nearest.

Few positions and many channels (ResNet-12's last block) are too few programs of too many steps each: the sum is cut in
parts, which a second launch adds in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block.sums import Context, Partials, partial_sums, sums_of, sums_with_u

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_PADDING = 64  # filters end on a multiple of this, whatever the block size along the sum
_FEW = 8192  # positions of a task
_PROGRAMS = 128  # of a task: half of what a large device runs at once
SHORT = tl.constexpr(12)  # steps of a sum
_LONG = 64  # steps of a sum that is worth cutting, and then a quarter of it is the shortest part


def channels_last(images: Tensor) -> Tensor:
    """``images`` [T, S, C, H, W] with memory [T, S, H, W, C]: themselves where they lie so, else a copy."""
    return images.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def empty_images(like: Tensor, channels: int, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Images [T, S, channels, height, width] for the tasks of ``like``, channels last in memory."""
    return like.new_empty((*like.shape[:2], height, width, channels), dtype=dtype).permute(0, 1, 4, 2, 3)


def products(dtype: torch.dtype, precision: str) -> str:
    """How tensors of a type are multiplied: "ieee", "tf32x3", "tf32" or "bfloat16"."""
    if dtype == torch.bfloat16 or (dtype == torch.float32 and precision == "bfloat16"):
        return "bfloat16"
    return launch.input_precision(precision, dtype)


# --- numbers ---


@triton.jit
def widened(values):
    """Loaded values in float64."""
    if values.dtype == tl.bfloat16:  # in two steps, for the interpreter
        values = values.to(tl.float32)
    return values.to(tl.float64)


@triton.jit
def store_narrowed(pointers, values, mask):
    """Store float64 values in the type of the tensor that they go to."""
    if pointers.dtype.element_ty == tl.bfloat16:
        values = values.to(tl.float32)
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


# --- products ---


@triton.jit
def _tf32(values):
    """The nearest number of 11 significant bits, which a TF32 operand holds exactly; a NaN may become a number."""
    return ((values.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_to_tf32(values):
    """The same for operands without a rest, which would be NaN: what is not finite becomes NaN.

    0x7FFFFFFF, the NaN that NVIDIA's arithmetic makes, would become -0.0. A comparison with the value itself does as
    well, and takes so many registers on sm_80 that a weight gradient has two programs instead of three.
    """
    return tl.fma(values, 0.0, _tf32(values))


@triton.jit
def _bfloat16(values):
    if INTERPRETED:  # which cuts the last bits off, and multiplies bit patterns
        values = values.to(tl.float32)
        bits = values.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(values == values, rounded, values)
    return values.to(tl.bfloat16)


@triton.jit
def add_product(total, a, b, b_rest, PRODUCTS: tl.constexpr):
    """``total + a b`` of blocks [M, K] and [K, N]; with TF32 products b comes rounded, and the rest of it."""
    if PRODUCTS == "tf32x3":
        a_part = _tf32(a)
        # any count but 0 (it has a meaning for float8 alone) keeps the compiler from adding to the total in the product
        part = tl.dot(a - a_part, b, input_precision="tf32", max_num_imprecise_acc=1)
        part = tl.dot(a_part, b_rest, part, input_precision="tf32")
        total += tl.dot(a_part, b, part, input_precision="tf32")
    elif PRODUCTS == "tf32":
        total = tl.dot(_rounded_to_tf32(a), b, total, input_precision="tf32")
    elif PRODUCTS == "bfloat16":
        total = tl.dot(_bfloat16(a), _bfloat16(b), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=tl.float64)
    return total


# --- filters ---


@triton.jit
def _pack(
    weight,
    packed,
    task_stride,
    row_stride,
    column_stride,
    height_stride,
    width_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    KERNEL: tl.constexpr,
    FLIP: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights of a task -> [parts, ROWS, PADDED]: a row has its taps in turn, COLUMNS channels each, then zeros."""
    task = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // PADDED, at % PADDED
    tap, channel = column // COLUMNS, column % COLUMNS
    if FLIP:
        tap = KERNEL * KERNEL - 1 - tap
    inside = (row < ROWS) & (column < KERNEL * KERNEL * COLUMNS)
    offset = row * row_stride + channel * column_stride + tap // KERNEL * height_stride + tap % KERNEL * width_stride
    values = tl.load(weight + task * task_stride + offset, mask=inside, other=0.0)
    parts: tl.constexpr = 2 if PRODUCTS == "tf32x3" else 1
    to = packed + task * (parts * ROWS * PADDED) + at
    if PRODUCTS == "tf32x3":
        tl.store(to + ROWS * PADDED, values - _tf32(values), mask=row < ROWS)
        values = _tf32(values)
    elif PRODUCTS == "tf32":
        values = _rounded_to_tf32(values)
    elif PRODUCTS == "bfloat16":
        values = _bfloat16(values)
    tl.store(to, values.to(packed.dtype.element_ty), mask=row < ROWS)


def pack(weight: Tensor, transposed: bool, *, precision: str) -> Tensor:
    """``weight`` [T, Cout, Cin, k, k] as the filters [T, parts, Cout, k k Cin (padded)] that :func:`convolve` reads.

    ``transposed``: of the convolution's transpose, which takes a gradient of its output to one of its input: channels
    change places and taps their order. There are two parts, to be added, where products are "tf32x3".
    """
    tasks, out, inputs, kernel, _ = weight.shape
    rows, columns = (inputs, out) if transposed else (out, inputs)
    padded = launch.divide(kernel * kernel * columns, _PADDING) * _PADDING
    how = products(weight.dtype, precision)
    dtype = torch.bfloat16 if how == "bfloat16" else weight.dtype
    packed = weight.new_empty((tasks, 2 if how == "tf32x3" else 1, rows, padded), dtype=dtype)
    task_stride, out_stride, in_stride, *tap_strides = weight.stride()
    strides = (in_stride, out_stride) if transposed else (out_stride, in_stride)
    block = 1024
    _pack[(launch.divide(rows * padded, block), tasks)](
        weight,
        packed,
        task_stride,
        *strides,
        *tap_strides,
        ROWS=rows,
        COLUMNS=columns,
        PADDED=padded,
        KERNEL=kernel,
        FLIP=transposed,
        PRODUCTS=how,
        BLOCK=block,
        num_warps=4,
        **launch.FUSED,
    )
    return packed


# --- launch settings ---


def _block_of_channels(channels: int) -> int:
    """48 channels are one block of 64: Hopper's products take as long for 32 and 16 columns together."""
    return min(64, max(16, triton.next_power_of_2(channels)))


def _convolve_settings(
    how: str, count: int, inputs: int, outputs: int, kernel: int, reductions: str, pool: bool
) -> dict[str, int]:
    """Blocks for images of ``count`` positions a task, whatever the number of tasks: their bits do not depend on it.

    128 positions by 64 channels on 8 warps of 128 registers: two such blocks run on a multiprocessor and hide each
    other's waiting. Small images take blocks of half the size, for there to be enough of them, and three of those. So
    does what needs more registers: on sm_80 channels that are loaded one by one, and half as many positions again with
    the sums of a second derivative; elsewhere those sums without pooling, or of such channels.
    ``SPLITS`` parts of the sum are programs of their own.
    """
    settings = {"BLOCK_M": 128, "BLOCK_N": _block_of_channels(outputs), "num_warps": 8, "num_stages": 3}
    settings["BLOCK_K"] = {"ieee": 16, "bfloat16": 64}.get(how, 32)
    one_by_one, second, older = inputs % 8 != 0, reductions == "second", launch.architecture() == "sm_80"
    if how == "ieee":
        settings |= {"BLOCK_M": 64, "BLOCK_N": min(32, settings["BLOCK_N"]), "num_warps": 4}
    elif one_by_one and older:
        settings |= {"BLOCK_M": 32 if second else 64, "num_warps": 4}
    elif count < _FEW or (second and not older and (one_by_one or not pool)):
        settings |= {"BLOCK_M": 64, "num_warps": 4}
    if how != "ieee":
        settings["maxnreg"] = 128 if settings["num_warps"] == 8 else 168
    programs = launch.divide(count, settings["BLOCK_M"]) * launch.divide(outputs, settings["BLOCK_N"])
    steps = launch.divide(kernel * kernel * inputs, settings["BLOCK_K"])
    settings["SPLITS"] = 1
    if how != "ieee" and steps >= _LONG and programs < _PROGRAMS:
        settings["SPLITS"] = min(launch.divide(2 * _PROGRAMS, programs), steps * 4 // _LONG)
    shape: dict[str, int | str] = {
        "products": how,
        "count": count,
        "inputs": inputs,
        "outputs": outputs,
        "taps": kernel * kernel,
        "sums": reductions or "none",
    }
    return launch.settings("conv_block_convolve", settings, **shape)


def _weight_gradient_settings(how: str, count: int, inputs: int, outputs: int, kernel: int) -> dict[str, int]:
    """As for the convolution, with taps and input channels in the place of positions."""
    settings = {"BLOCK_M": 128, "BLOCK_N": _block_of_channels(outputs), "num_warps": 8, "num_stages": 3}
    settings["BLOCK_P"] = {"ieee": 16, "bfloat16": 64}.get(how, 32)
    if how == "ieee":
        settings |= {"BLOCK_M": 64, "BLOCK_N": min(32, settings["BLOCK_N"]), "num_warps": 4}
    elif kernel * kernel * inputs <= 64:
        settings |= {"BLOCK_M": 64, "num_warps": 4}
    shape: dict[str, int | str] = {
        "products": how,
        "count": count,
        "inputs": inputs,
        "outputs": outputs,
        "taps": kernel * kernel,
    }
    return launch.settings("conv_block_weight_gradient", settings, **shape)


def _span(count: int, blocks: int, step: int) -> int:
    """Positions that one program of the weight gradient sums: a task's make about 128 programs, of 256 or more."""
    parts = min(32, launch.divide(_PROGRAMS, blocks))
    return launch.divide(min(count, max(256, launch.divide(count, parts))), step) * step


# --- the convolution ---


@triton.jit(do_not_specialize=["count", "span"])
def _convolve(
    x,
    packed,
    x2,
    packed2,
    out,
    partials,
    y,
    table,
    q,
    corners,
    count,
    span,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDED: tl.constexpr,
    SOURCES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    REDUCTIONS: tl.constexpr,
    SLOPE: tl.constexpr,
    POOL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [T, count, COUT] = patches of x [T, S, H, W, CIN] times packed, plus those of x2 times packed2.

    One sum over ``SOURCES`` times the taps and channels, flattened so that no part of a block is idle where the
    channels are no power of two. ``partials`` [T, blocks, quantities, COUT] are sums of this block of positions:
    mean and squared deviations of ``out`` ("moments"), or sums of u, u (y - mean) and u dz for u = ``out``
    ("second", MATH.md 1). Blocks of one task run side by side, those of the same positions first: they share x.
    With more than one of ``SPLITS`` a program makes ``span`` steps of the sum; out is [T, SPLITS, count, COUT], and
    there are no partials.
    """
    accumulate: tl.constexpr = tl.float64 if PRODUCTS == "ieee" else tl.float32
    taps: tl.constexpr = KERNEL * KERNEL * CIN
    steps: tl.constexpr = (taps + BLOCK_K - 1) // BLOCK_K
    parts: tl.constexpr = 2 if PRODUCTS == "tf32x3" else 1
    blocks_n: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    task = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) // blocks_n
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    h, w = position // W % H, position % W
    inside = position < count
    row = (task * count + position) * CIN
    filters = task * (parts * COUT * PADDED) + channel * PADDED

    total = tl.zeros((BLOCK_M, BLOCK_N), accumulate)
    begin, end = 0, SOURCES * steps
    if SPLITS > 1:
        begin = tl.program_id(2) * span
        end = tl.minimum(begin + span, end)
    elif steps < SHORT:  # the compiler unrolls a short loop whose end it knows, which takes registers
        end = span
    for step in range(begin, end):
        k = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        first = step < steps
        images = tl.where(first, x, x2) if SOURCES == 2 else x
        weights = tl.where(first, packed, packed2) if SOURCES == 2 else packed
        tap, c = k // CIN, k % CIN
        down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
        i, j = h[:, None] + down[None, :], w[:, None] + right[None, :]
        there = inside[:, None] & (k < taps)[None, :] & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        a = tl.load(images + row[:, None] + ((down * W + right) * CIN + c)[None, :], mask=there, other=0.0)
        columns = weights + filters[None, :] + k[:, None]
        b = tl.load(columns, mask=(channel < COUT)[None, :], other=0.0)
        b_rest = b
        if parts == 2:
            b_rest = tl.load(columns + COUT * PADDED, mask=(channel < COUT)[None, :], other=0.0)
        total = add_product(total, a, b, b_rest, PRODUCTS)

    inside = inside[:, None] & (channel < COUT)[None, :]
    values = total.to(out.dtype.element_ty)
    place = task
    if SPLITS > 1:
        place = task * SPLITS + tl.program_id(2)
    tl.store(out + ((place * count + position) * COUT)[:, None] + channel[None, :], values, mask=inside)

    quantities: tl.constexpr = 2 if REDUCTIONS == "moments" else 3
    to = partials + (task * tl.cdiv(count, BLOCK_M) + block) * (quantities * COUT) + channel
    total = values.to(accumulate)  # as it is stored: what is normalised; zero outside
    if REDUCTIONS == "moments":
        mean = tl.sum(total, 0) / tl.minimum(count - block * BLOCK_M, BLOCK_M).to(accumulate)
        apart = tl.where(inside, total - mean[None, :], 0.0)
        tl.store(to, mean, mask=channel < COUT)
        tl.store(to + COUT, tl.sum(apart * apart, 0), mask=channel < COUT)
    if REDUCTIONS == "second":  # in halves, for fewer registers
        half: tl.constexpr = BLOCK_N // 2
        first, last = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, half)), (0, 2, 1)))
        channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, half)
        to = partials + (task * tl.cdiv(count, BLOCK_M) + block) * (quantities * COUT)
        sums_with_u(first, to, y, table, q, corners, position, task, channel, count, H, W, COUT, SLOPE, POOL)
        tl.debug_barrier()  # or the compiler loads all of it first; what follows is made again for the same reason
        position = block * BLOCK_M + tl.arange(0, BLOCK_M)
        channel = tl.program_id(0) % blocks_n * BLOCK_N + half + tl.arange(0, half)
        sums_with_u(last, to, y, table, q, corners, position, task, channel, count, H, W, COUT, SLOPE, POOL)


@triton.jit
def _add_parts(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, size] = the sum of parts [T, SPLITS, size], in their order."""
    task = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        total += tl.load(parts + (task * SPLITS + part) * size + at, mask=at < size, other=0.0)
    tl.store(out + task * size + at, total.to(out.dtype.element_ty), mask=at < size)


def convolve(
    x: Tensor,
    packed: Tensor,
    kernel: int,
    *,
    precision: str,
    second: tuple[Tensor, Tensor] | None = None,
    reductions: str = "",
    context: Context | None = None,
) -> tuple[Tensor, Partials | None]:
    """Images [T, S, C', H, W] of ``x`` [T, S, C, H, W] and its packed filters, and partial sums of them.

    Args:
        x: images, channels last in memory.
        packed: their filters, from :func:`pack` with the same precision.
        kernel: 1 or 3.
        precision: of products of float32: "float32", "tf32" or "bfloat16".
        second: more images and filters, whose convolution is added.
        reductions: "moments" for two partial sums of each block of positions, its mean and squared deviations; "second"
            for three, of u, u unit and u dz.
        context: what the sums "second" read.
    """
    tasks, images, inputs, height, width = x.shape
    outputs, padded = packed.shape[2:]
    count = images * height * width
    how = products(x.dtype, precision)
    out = empty_images(x, outputs, height, width)
    seen = context or Context(out, out, out, out, 1.0, False)
    settings = _convolve_settings(how, count, inputs, outputs, kernel, reductions, seen.pool)
    splits = settings["SPLITS"]
    blocks = launch.divide(count, settings["BLOCK_M"])
    to, partials = out, None
    if splits > 1:
        to = x.new_empty((tasks, splits, count, outputs), dtype=torch.float32)
    elif reductions:
        partials = partial_sums(out, blocks, reductions)
    x2, packed2 = second or (x, packed)
    sources = 1 if second is None else 2
    _convolve[(blocks * launch.divide(outputs, settings["BLOCK_N"]), tasks, splits)](
        x,
        packed,
        x2,
        packed2,
        to,
        out if partials is None else partials,
        seen.y,
        seen.table,
        seen.q,
        seen.corners,
        count,
        launch.divide(sources * launch.divide(kernel * kernel * inputs, settings["BLOCK_K"]), splits),
        H=height,
        W=width,
        CIN=inputs,
        COUT=outputs,
        KERNEL=kernel,
        PADDED=padded,
        SOURCES=sources,
        PRODUCTS=how,
        REDUCTIONS=reductions if splits == 1 else "",
        SLOPE=seen.slope,
        POOL=seen.pool,
        **settings,
        **launch.FUSED,
    )
    if splits > 1:
        size, block = count * outputs, 1024
        _add_parts[(launch.divide(size, block), tasks)](
            to, out, size, SPLITS=splits, BLOCK=block, num_warps=4, **launch.FUSED
        )
        return out, sums_of(out, reductions, context) if reductions else None
    return out, None if partials is None else Partials(partials, settings["BLOCK_M"])


# --- the gradient in the filters ---


@triton.jit(do_not_specialize=["count", "span"])
def _weight_gradient(
    x,
    dy,
    partials,
    count,
    span,
    H: tl.constexpr,
    W: tl.constexpr,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KERNEL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """partials [T, spans, k k CIN, COUT] = patches of x, transposed, times dy [T, count, COUT], of `span` positions."""
    accumulate: tl.constexpr = tl.float64 if PRODUCTS == "ieee" else tl.float32
    taps: tl.constexpr = KERNEL * KERNEL * CIN
    blocks_n: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    task, part = tl.program_id(2).to(tl.int64), tl.program_id(1)
    k = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, c = k // CIN, k % CIN
    down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
    shift = (down * W + right) * CIN + c

    total = tl.zeros((BLOCK_M, BLOCK_N), accumulate)
    for start in range(0, span, BLOCK_P):
        position = part * span + start + tl.arange(0, BLOCK_P)
        inside = position < count
        i, j = (position // W % H)[None, :] + down[:, None], (position % W)[None, :] + right[:, None]
        there = inside[None, :] & (k < taps)[:, None] & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        row = task * count + position
        a = tl.load(x + (row * CIN)[None, :] + shift[:, None], mask=there, other=0.0)
        at = (row * COUT)[:, None] + channel[None, :]
        b = tl.load(dy + at, mask=inside[:, None] & (channel < COUT)[None, :], other=0.0)
        b_rest = b
        if PRODUCTS == "tf32x3":
            b_rest = b - _tf32(b)
            b = _tf32(b)
        elif PRODUCTS == "tf32":
            b = _rounded_to_tf32(b)
        total = add_product(total, a, b, b_rest, PRODUCTS)

    to = partials + (task * tl.num_programs(1) + part) * (taps * COUT)
    at = k[:, None] * COUT + channel[None, :]
    tl.store(to + at, total, mask=(k < taps)[:, None] & (channel < COUT)[None, :])


@triton.jit
def _merge_weight_gradient(
    partials, out, spans, CIN: tl.constexpr, COUT: tl.constexpr, AREA: tl.constexpr, BLOCK: tl.constexpr
):
    """out [T, COUT, CIN, k, k] = the sum of partials [T, spans, k k CIN, COUT], in their order and in float64."""
    size: tl.constexpr = AREA * CIN * COUT
    task = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for span in range(spans):
        total += tl.load(partials + (task * spans + span) * size + at, mask=at < size, other=0.0).to(tl.float64)
    tap, c, channel = at // COUT // CIN, at // COUT % CIN, at % COUT
    to = out + task * size + (channel * CIN + c) * AREA + tap
    store_narrowed(to, total, at < size)


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, *, precision: str) -> Tensor:
    """[T, Cout, Cin, k, k] for images ``x`` [T, S, Cin, H, W] and a gradient ``dy`` [T, S, Cout, H, W], channels last.

    The positions are cut in spans of one length whatever the number of tasks, each summed by itself.
    """
    tasks, images, inputs, height, width = x.shape
    outputs, count, taps = dy.shape[2], images * height * width, kernel * kernel * inputs
    how = products(x.dtype, precision)
    settings = _weight_gradient_settings(how, count, inputs, outputs, kernel)
    blocks = launch.divide(taps, settings["BLOCK_M"]) * launch.divide(outputs, settings["BLOCK_N"])
    span = _span(count, blocks, settings["BLOCK_P"])
    spans = launch.divide(count, span)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partials = x.new_empty((tasks, spans, taps, outputs), dtype=sums)
    _weight_gradient[(blocks, spans, tasks)](
        x,
        dy,
        partials,
        count,
        span,
        H=height,
        W=width,
        CIN=inputs,
        COUT=outputs,
        KERNEL=kernel,
        PRODUCTS=how,
        **settings,
        **launch.FUSED,
    )
    out = x.new_empty((tasks, outputs, inputs, kernel, kernel))
    block = 512
    _merge_weight_gradient[(launch.divide(taps * outputs, block), tasks)](
        partials, out, spans, CIN=inputs, COUT=outputs, AREA=kernel * kernel, BLOCK=block, num_warps=4, **launch.FUSED
    )
    return out
