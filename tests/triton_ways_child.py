"""What tests/test_ways.py asks of the ways to convolve, on CUDA or in the interpreter (TRITON_INTERPRET=1).

As a program it prints one JSON object: for each of ``CHECKS`` what it found, by way.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDER = "cxgrad_fast.kernels.conv_block"
ways = importlib.import_module(f"{FOLDER}.ways")
choice = importlib.import_module(f"{FOLDER}.choice")
sums = importlib.import_module(f"{FOLDER}.sums")
channels_last = importlib.import_module(f"{FOLDER}.convolution").channels_last

SLOPE = 0.1


@dataclass(frozen=True)
class Shape:
    """Of a convolution, and of the block behind it."""

    name: str
    tasks: int = 2
    images: int = 3
    inputs: int = 5
    outputs: int = 7
    height: int = 5
    width: int = 4
    kernel: int = 3
    pool: bool = True


SHAPES = (
    Shape("odd"),
    Shape("pointwise", kernel=1, pool=False),
    Shape("one_of_each", tasks=1, images=1, inputs=1, outputs=1, height=2, width=3),
    Shape("wide", tasks=1, images=2, inputs=3, outputs=66, height=3, width=3, pool=False),
    Shape("many_tasks", tasks=9, images=1, inputs=2, outputs=3, height=1, width=2, pool=False),
)
LARGER = Shape("48 channels", images=4, inputs=48, outputs=48, height=7, width=6)


class Tensors:
    """A shape's images and filters, two pairs, and what lies behind the convolution."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        tasks, channels, sizes = shape.tasks, shape.outputs, (shape.height, shape.width)
        self.shape = shape
        self.x, self.x2 = (channels_last(normal(tasks, shape.images, shape.inputs, *sizes)) for _ in range(2))
        filters = (tasks, channels, shape.inputs, shape.kernel, shape.kernel)
        self.weight, self.weight2 = (normal(*filters) for _ in range(2))
        self.y, self.dy = (channels_last(normal(tasks, shape.images, channels, *sizes)) for _ in range(2))
        pooled = [size // 2 for size in sizes] if shape.pool else sizes
        q = channels_last(normal(tasks, shape.images, channels, *pooled))
        corners = channels_last(torch.randint(0, 8, q.shape, generator=generator).to(device, torch.uint8))
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        table = normal(tasks, 4, channels).to(kind)
        self.context = sums.Context(self.y, table, q, corners, SLOPE, shape.pool)


@contextmanager
def pinned(way: str) -> Iterator[None]:
    before = os.environ.get(choice.VARIABLE)
    os.environ[choice.VARIABLE] = way
    try:
        yield
    finally:
        del os.environ[choice.VARIABLE]
        if before is not None:
            os.environ[choice.VARIABLE] = before


def results(given: Tensors, precision: str = "float32") -> dict[str, Tensor]:
    """Every product, its partial sums merged."""
    t, kernel = given, given.shape.kernel
    y, moments = ways.convolution(t.x, t.weight, precision=precision)
    u, of_u = ways.second([(t.x, t.weight), (t.x2, t.weight2)], t.context, precision=precision)
    alone, of_alone = ways.second([(t.x, t.weight)], t.context, precision=precision)
    return {
        "convolution": y,
        "moments": merged(moments, t.x.shape),
        "second": u,
        "sums": of_u.values.sum(1),
        "second of one pair": alone,
        "sums of one pair": of_alone.values.sum(1),
        "transpose": ways.transpose(t.dy, t.weight, precision=precision),
        "weight_gradient": ways.weight_gradient(t.x, t.dy, kernel, precision=precision),
    }


def merged(partials: Any, shape: torch.Size) -> Tensor:
    """Mean and sum of squared deviations [T, 2, C] of blocks that may differ in size."""
    count = shape[1] * shape[3] * shape[4]
    values = partials.values.double()
    sizes = torch.full((values.shape[1],), float(partials.block), device=values.device, dtype=torch.float64)
    sizes[-1] = count - partials.block * (len(sizes) - 1)
    mean = torch.einsum("tbc,b->tc", values[:, :, 0], sizes) / count
    apart = (values[:, :, 0] - mean[:, None]) ** 2
    return torch.stack([mean, values[:, :, 1].sum(1) + torch.einsum("tbc,b->tc", apart, sizes)], 1)


def definition(given: Tensors) -> dict[str, Tensor]:
    """The same, in float64 on the CPU, one task at a time."""
    t = given
    padding = t.shape.kernel // 2
    x, x2, weight, weight2, dy = (each.cpu().double() for each in (t.x, t.x2, t.weight, t.weight2, t.dy))

    def convolved(images: Tensor, filters: Tensor) -> Tensor:
        return torch.stack([F.conv2d(i, f, padding=padding) for i, f in zip(images, filters, strict=True)])

    images, filters = x.requires_grad_(), weight.requires_grad_()
    y = convolved(images, filters)
    dx, dweight = torch.autograd.grad(y, (images, filters), dy)
    y, alone = y.detach(), y.detach()
    u = alone + convolved(x2, weight2).detach()
    mean = y.mean((1, 3, 4))
    moments = torch.stack([mean, ((y - mean[:, None, :, None, None]) ** 2).sum((1, 3, 4))], 1)
    found = {"convolution": y, "moments": moments, "second": u, "sums": sums_with(t.context, u)}
    found |= {"second of one pair": alone, "sums of one pair": sums_with(t.context, alone)}
    return found | {"transpose": dx, "weight_gradient": dweight}


def sums_with(context: Any, u: Tensor) -> Tensor:
    """[T, 3, C]: sums of u, u unit and u dz."""
    y, q = context.y.cpu().double(), context.q.cpu().double()
    mean, inverse, scale, bias = (row[:, None, :, None, None] for row in context.table.cpu().double().unbind(1))
    unit = (y - mean) * inverse
    if context.pool:
        code = context.corners.cpu().long()
        dz = torch.zeros_like(y)
        for corner in range(4):
            row, column = corner % 2, corner // 2
            here = dz[..., row : 2 * q.shape[3] : 2, column : 2 * q.shape[4] : 2]
            here += torch.where(code % 4 == corner, torch.where(code >= 4, q * context.slope, q), 0.0)
    else:
        dz = torch.where(unit * scale + bias <= 0, q * context.slope, q)
    return torch.stack([(u * other).sum((1, 3, 4)) for other in (torch.ones_like(u), unit, dz)], 1)


def errors(
    shape: Shape, way: str, dtype: torch.dtype = torch.float64, precision: str = "float32", device: str = "cpu"
) -> dict[str, float]:
    """Relative error of every product, infinite where shape, type or layout is wrong."""
    given = Tensors(shape, dtype, device)
    with pinned(way):
        found = results(given, precision)
    compared = {}
    for name, wanted in definition(given).items():
        one = found[name]
        same = one.shape == wanted.shape and (one.dtype == dtype or name in ("moments", "sums", "sums of one pair"))
        if one.dim() == 5 and name != "weight_gradient":
            same = same and one.permute(0, 1, 3, 4, 2).is_contiguous()
        elif name == "weight_gradient":
            same = same and one.is_contiguous()
        difference = float((one.cpu().double() - wanted).norm() / wanted.norm())
        compared[name] = difference if same else float("inf")
    return compared


def split() -> dict[str, float]:
    """Errors of a sum that is cut in parts, of which the last is shorter and one is empty."""
    launch = importlib.import_module("cxgrad_fast.kernels.launch")
    found = {}
    for splits in (2, 5):
        with launch.trying("conv_block_convolve", {"SPLITS": splits, "BLOCK_K": 16}):
            shape = Shape("split", inputs=7, outputs=5)
            compared = errors(shape, "triton", torch.float32)
        found[str(splits)] = max(compared.values())
    return found


def different_bits(way: str, dtype: torch.dtype, device: str) -> list[str]:
    """Products whose bits change when they are made again."""
    given = Tensors(LARGER, dtype, device)
    with pinned(way):
        found = results(given)
        return [name for _ in range(4) for name, again in results(given).items() if not torch.equal(again, found[name])]


CHECKS: dict[str, Any] = {
    "float64": lambda: {f"{way} {shape.name}": errors(shape, way) for way in choice.WAYS for shape in SHAPES},
    "rounded": lambda: {
        f"{way} {precision}": errors(SHAPES[0], way, torch.float32, precision)
        for way in choice.WAYS
        for precision in ("float32", "bfloat16")
    },
    "bfloat16": lambda: {way: errors(SHAPES[0], way, torch.bfloat16) for way in choice.WAYS},
    "split": split,
}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, fresh memory is NaN
    print(json.dumps({name: check() for name, check in CHECKS.items()}))


if __name__ == "__main__":
    main()
