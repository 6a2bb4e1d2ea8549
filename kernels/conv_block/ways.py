"""The convolutions of the general block, each in several ways: our own kernels, and what the framework has.

- ``triton``: the implicit matrix product of convolution.py, which makes the sums of its output on the way.
- ``grouped``: one convolution of the framework whose groups are the tasks.
- ``tasks``: one call a task, on streams side by side.
- ``unfold``: patches stored, then one batched product: 9 times the images' memory.

All take and give images [T, S, C, H, W] that lie channels last, and are deterministic; the framework's are followed by
a pass for the sums. What precision says holds there too, whatever the process has set for TF32. Which way takes a shape
is :mod:`cxgrad_fast.kernels.conv_block.choice`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cxgrad_fast.kernels.conv_block import choice, sums
from cxgrad_fast.kernels.conv_block import convolution as ours
from cxgrad_fast.kernels.conv_block.convolution import channels_last, empty_images, products
from cxgrad_fast.kernels.conv_block.sums import Context, Partials

Pair = tuple[Tensor, Tensor]  # images and the filters that go over them

_STREAMS = 8
_MOST_PATCHES = 1 << 30  # bytes of patches that a measurement may store; a pinned way may store more


# --- the block's products ---


def convolution(x: Tensor, weight: Tensor, *, precision: str) -> tuple[Tensor, Partials]:
    """``weight`` [T, Cout, Cin, k, k] over images ``x`` [T, S, Cin, H, W]: [T, S, Cout, H, W], and its moments."""
    y, partials = _product("convolution", [(x, weight)], False, precision, "moments")
    assert partials is not None
    return y, partials


def second(pairs: Sequence[Pair], context: Context, *, precision: str) -> tuple[Tensor, Partials]:
    """u, the sum of the convolutions of one or two pairs, and its sums with what the context holds."""
    u, partials = _product("second", pairs, False, precision, "second", context)
    assert partials is not None
    return u, partials


def transpose(dy: Tensor, weight: Tensor, *, precision: str) -> Tensor:
    """The gradient [T, S, Cin, H, W] of a convolution's input, from that of its output."""
    return _product("transpose", [(dy, weight)], True, precision)[0]


def weight_gradient(x: Tensor, dy: Tensor, kernel: int, *, precision: str) -> Tensor:
    """The gradient [T, Cout, Cin, k, k] of a convolution's weight, from its input and the gradient of its output."""
    shape = _shape(x, dy.shape[2], kernel, 1, precision)
    calls: dict[str, Callable[[], Tensor]] = {
        "triton": partial(ours.weight_gradient, x, dy, kernel, precision=precision),
        **{name: partial(_framework_weight_gradient, name, x, dy, kernel, precision) for name in _FRAMEWORK},
    }
    return calls[choice.choose("weight_gradient", shape, x.device, lambda: _affordable(calls, shape, x))]()


def _product(
    kind: str,
    pairs: Sequence[Pair],
    transposed: bool,
    precision: str,
    reductions: str = "",
    context: Context | None = None,
) -> tuple[Tensor, Partials | None]:
    x, weight = pairs[0]
    shape = _shape(x, weight.shape[2 if transposed else 1], weight.shape[3], len(pairs), precision)
    calls = {name: partial(way, pairs, transposed, precision, reductions, context) for name, way in _BY_NAME.items()}

    def alone() -> Mapping[str, choice.Call]:
        return _affordable({name: partial(_first, call) for name, call in calls.items()}, shape, x)

    return calls[choice.choose(kind, shape, x.device, alone)]()


def _first(call: Callable[[], tuple[Tensor, Partials | None]]) -> Tensor:
    return call()[0]


def _shape(x: Tensor, outputs: int, kernel: int, sources: int, precision: str) -> dict[str, int | str]:
    tasks, images, inputs, height, width = x.shape
    sizes = {"tasks": tasks, "images": images, "inputs": inputs, "outputs": outputs, "height": height, "width": width}
    return {**sizes, "kernel": kernel, "sources": sources, "products": products(x.dtype, precision)}


def _affordable(
    calls: Mapping[str, Callable[[], Tensor]], shape: Mapping[str, Any], x: Tensor
) -> dict[str, Callable[[], Tensor]]:
    patches = x.numel() * x.element_size() * shape["sources"] * shape["kernel"] ** 2
    return {name: call for name, call in calls.items() if name != "unfold" or patches <= _MOST_PATCHES}


# --- ours ---


def _triton(
    pairs: Sequence[Pair], transposed: bool, precision: str, reductions: str, context: Context | None
) -> tuple[Tensor, Partials | None]:
    packed = [(images, ours.pack(weight, transposed, precision=precision)) for images, weight in pairs]
    more = packed[1] if len(packed) == 2 else None
    return ours.convolve(
        *packed[0], pairs[0][1].shape[3], second=more, reductions=reductions, context=context, precision=precision
    )


# --- the framework's ---


@dataclass(frozen=True)
class _Way:
    """A framework's way.

    Attributes:
        convolve: (images, filters [T, C', C, k, k]) -> images.
        weight_gradient: (images, gradient of the output, k) -> [T, C', C, k, k].
    """

    convolve: Callable[[Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, int], Tensor]


def _framework(
    name: str, pairs: Sequence[Pair], transposed: bool, precision: str, reductions: str, context: Context | None
) -> tuple[Tensor, Partials | None]:
    images, filters = pairs[0]
    if len(pairs) == 2:  # one sum over the channels of both
        images = channels_last(torch.cat([pair[0] for pair in pairs], 2))
        filters = torch.cat([pair[1] for pair in pairs], 2)
    if transposed:
        filters = filters.transpose(1, 2).flip(3, 4)
    how = products(images.dtype, precision)
    with torch.no_grad(), exactly(how):
        out = _FRAMEWORK[name].convolve(_operand(images, how), _operand(filters, how))
    return out, sums.sums_of(out, reductions, context) if reductions else None


def _framework_weight_gradient(name: str, x: Tensor, dy: Tensor, kernel: int, precision: str) -> Tensor:
    how = products(x.dtype, precision)
    with torch.no_grad(), exactly(how):
        return _FRAMEWORK[name].weight_gradient(_operand(x, how), _operand(dy, how), kernel).contiguous()


def _operand(values: Tensor, how: str) -> Tensor:
    """Rounded to what is multiplied.

    float32 values of bfloat16's digits are multiplied exactly by TF32 products, and summed and stored in float32, as
    our own kernels do; the framework's bfloat16 convolutions would round their results.
    """
    return values.bfloat16().float() if how == "bfloat16" and values.dtype == torch.float32 else values


_CUDNN = {"enabled": True, "benchmark": False, "deterministic": True}


@contextmanager
def exactly(how: str) -> Iterator[None]:
    """The framework's products in this block: deterministic, and in TF32 where "tf32" or "bfloat16" allow it alone.

    ``torch.backends.cudnn.flags`` does not do: TF32 that is allowed for all backends stays so in it, and it cannot then
    put back what it found.
    """
    rounded = "tf32" if how in ("tf32", "bfloat16") else "ieee"
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    found: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        found.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        put(torch.backends, "fp32_precision", "none")  # from the outermost on: what is read behind it is not inherited
        put(cudnn, "fp32_precision", "none")
        put(cudnn.conv, "fp32_precision", rounded)
        put(matmul, "fp32_precision", rounded)
        put(matmul, "allow_bf16_reduced_precision_reduction", False)
        for name, value in _CUDNN.items():
            put(cudnn, name, value)
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


def _laid_out(images: Tensor) -> Tensor:
    """[S, C, H, W] as the framework's kernels want it: with tensor cores channels last, without them planes."""
    cudnn: Any = torch.backends.cudnn
    tensor_cores = images.dtype == torch.bfloat16 or cudnn.conv.fp32_precision == "tf32"
    return images.contiguous(memory_format=torch.channels_last if tensor_cores else torch.contiguous_format)


def _gradient_of_weight(x: Tensor, dy: Tensor, kernel: int, groups: int) -> Tensor:
    """[groups C', C, k, k] of [S, groups C, H, W] and [S, groups C', H, W]."""
    weight = x.new_empty((dy.shape[1], x.shape[1] // groups, kernel, kernel))
    options = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], groups, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *options)[1]


def _side_by_side(images: Tensor) -> Tensor:
    """[T, S, C, H, W] as [S, T C, H, W]."""
    tasks, count, channels, height, width = images.shape
    return _laid_out(images.transpose(0, 1).reshape(count, tasks * channels, height, width))


def _grouped(images: Tensor, filters: Tensor) -> Tensor:
    tasks, outputs, _, kernel, _ = filters.shape
    out = F.conv2d(_side_by_side(images), filters.flatten(0, 1), padding=kernel // 2, groups=tasks)
    return channels_last(out.unflatten(1, (tasks, outputs)).transpose(0, 1))


def _grouped_weight_gradient(x: Tensor, dy: Tensor, kernel: int) -> Tensor:
    found = _gradient_of_weight(_side_by_side(x), _side_by_side(dy), kernel, len(x))
    return found.unflatten(0, (len(x), dy.shape[2]))


def _by_task(tasks: int, call: Callable[[int], None], device: torch.device) -> None:
    """``call`` for every task, on CUDA on several streams which the current one waits for."""
    if device.type != "cuda":
        for task in range(tasks):
            call(task)
        return
    current = torch.cuda.current_stream(device)
    streams = _streams(device, min(tasks, _STREAMS))
    for stream in streams:
        stream.wait_stream(current)
    for task in range(tasks):
        with torch.cuda.stream(streams[task % len(streams)]):
            call(task)
    for stream in streams:
        current.wait_stream(stream)


_made: dict[torch.device, list[torch.cuda.Stream]] = {}


def _streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    made = _made.setdefault(device, [])
    made += [torch.cuda.Stream(device) for _ in range(count - len(made))]
    return made[:count]


def _tasks(images: Tensor, filters: Tensor) -> Tensor:
    tasks, outputs, _, kernel, _ = filters.shape
    out = empty_images(images, outputs, *images.shape[3:])

    def one(task: int) -> None:
        out[task].copy_(F.conv2d(_laid_out(images[task]), filters[task], padding=kernel // 2))

    _by_task(tasks, one, images.device)
    return out


def _tasks_weight_gradient(x: Tensor, dy: Tensor, kernel: int) -> Tensor:
    out = x.new_empty((len(x), dy.shape[2], x.shape[2], kernel, kernel))

    def one(task: int) -> None:
        out[task].copy_(_gradient_of_weight(_laid_out(x[task]), _laid_out(dy[task]), kernel, 1))

    _by_task(len(x), one, x.device)
    return out


def _patches(images: Tensor, kernel: int) -> Tensor:
    """[T, S H W, k k C], the channels of a tap side by side as in memory."""
    tasks, _, channels, _, _ = images.shape
    rows = images.permute(0, 1, 3, 4, 2)
    if kernel > 1:
        around = F.pad(rows, (0, 0, *[kernel // 2] * 4))
        rows = around.unfold(2, kernel, 1).unfold(3, kernel, 1).permute(0, 1, 2, 3, 5, 6, 4)
    return rows.reshape(tasks, -1, kernel * kernel * channels)


def _unfold(images: Tensor, filters: Tensor) -> Tensor:
    tasks, count, _, height, width = images.shape
    columns = filters.permute(0, 3, 4, 2, 1).flatten(1, 3)
    out = torch.bmm(_patches(images, filters.shape[3]), columns)
    return out.view(tasks, count, height, width, -1).permute(0, 1, 4, 2, 3)


def _unfold_weight_gradient(x: Tensor, dy: Tensor, kernel: int) -> Tensor:
    found = torch.bmm(_patches(x, kernel).transpose(1, 2), _patches(dy, 1))  # [T, k k C, C']
    return found.unflatten(1, (kernel, kernel, x.shape[2])).permute(0, 4, 3, 1, 2)


_FRAMEWORK = {
    "grouped": _Way(_grouped, _grouped_weight_gradient),
    "tasks": _Way(_tasks, _tasks_weight_gradient),
    "unfold": _Way(_unfold, _unfold_weight_gradient),
}
_BY_NAME: dict[str, Callable[..., tuple[Tensor, Partials | None]]] = {
    "triton": _triton,
    **{name: partial(_framework, name) for name in _FRAMEWORK},
}
