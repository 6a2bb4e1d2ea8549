"""What ``python -m cxgrad_fast.kernels.tune`` measures of conv_block: each kernel at its production shapes.

Kernels that leave partial sums are measured with the merge behind them, or a plain sum: fewer blocks merge faster, and
only whole sums can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cxgrad_fast.kernels import launch
from cxgrad_fast.kernels.conv_block import backward, convolution, double_backward, first_layer, forward, sums
from cxgrad_fast.kernels.patch_statistics.triton import patch_statistics


class _Size(NamedTuple):
    """Of a block."""

    tasks: int
    images: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 3
    pool: bool = True

    def example(self, **more: Any) -> dict[str, Any]:
        """As an example's arguments."""
        return {**self._asdict(), **more}


_SETS = ((4, 5), (2, 25), (2, 75))  # support sets of 1 and of 5 shots, a query set
_CONV4 = [_Size(*some, filters, filters, size) for filters in (48, 64) for size in (42, 21, 10) for some in _SETS]
_CONV4 += [_Size(2, images, 32, 32, size) for size in (14, 7) for images in (5, 25, 75)]  # 28 x 28
_RESNET12 = [
    _Size(1, images, inputs, outputs, size, kernel, False)
    for outputs, size, before in ((64, 84, 3), (128, 42, 64), (256, 21, 128), (512, 10, 256))
    for inputs, kernel in ((before, 3), (outputs, 3), (before, 1))
    for images in (5, 75)
]
_BLOCKS = [*_CONV4, *_RESNET12]
# passes over positions: not for every number of input channels
_PASSES = [*_CONV4, *(size for size in _RESNET12 if size.kernel == 3 and size.inputs == size.outputs)]
_FIRST = [_Size(*some, 3, filters, 84) for filters in (48, 64) for some in _SETS]
_FIRST += [_Size(2, images, 3, 32, 28) for images in (5, 25, 75)]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


class _Block:
    """A block's tensors, as its passes take them."""

    def __init__(self, size: _Size) -> None:
        def images(channels: int, side: int) -> Tensor:
            return _normal(size.tasks, size.images, side, side, channels).permute(0, 1, 4, 2, 3)

        self.size, self.pool, self.slope = size, size.pool, 0.01 if size.pool else 1.0
        self.x, self.x2 = images(size.inputs, size.size), images(size.inputs, size.size)
        self.y, self.u = images(size.outputs, size.size), images(size.outputs, size.size)
        filters = (size.tasks, size.outputs, size.inputs, size.kernel, size.kernel)
        self.weight = _normal(*filters) / (size.inputs * size.kernel**2) ** 0.5
        self.affine = _normal(size.tasks, size.outputs), _normal(size.tasks, size.outputs)
        self.eps = torch.full((size.tasks,), 1e-5, device="cuda")
        self.moments = torch.ones(size.tasks, 2, size.outputs, device="cuda", dtype=torch.float64)
        self.table = forward.channel_table(self.moments, *self.affine, self.eps)
        out, self.selected, self.corners = forward.activated(self.y, self.table, self.slope, self.pool)
        self.q = torch.randn_like(out)

    @property
    def context(self) -> sums.Context:
        """For the sums of a second derivative."""
        return sums.Context(self.y, self.table, self.q, self.corners, self.slope, self.pool)

    def pack(self, transposed: bool = False) -> Tensor:
        """The filters as the product reads them."""
        return convolution.pack(self.weight, transposed, precision="float32")


# --- products ---


def _convolve_candidates(defaults: launch.Settings, shape: launch.Shape) -> Iterator[launch.Settings]:
    """Blocks of 64 to 256 positions, with the registers that they leave each other; and the sum in parts."""
    if shape["products"] == "ieee":
        return
    blocks = ((64, 4, 168), (128, 4, 255), (128, 8, 128), (256, 8, 255), (256, 16, 128))
    for block_n in (defaults["BLOCK_N"], 128) if int(shape["outputs"]) >= 128 else (defaults["BLOCK_N"],):
        for block_m, warps, registers in blocks:
            for stages in (3, 4) if block_m < 256 else (3,):
                options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
                yield {"BLOCK_M": block_m, "BLOCK_N": block_n, **options}
    if launch.divide(int(shape["count"]), defaults["BLOCK_M"]) <= 64:
        yield from ({"SPLITS": splits} for splits in (1, 2, 4, 8) if splits != defaults["SPLITS"])


def _weight_gradient_candidates(defaults: launch.Settings, shape: launch.Shape) -> Iterator[launch.Settings]:
    if shape["products"] == "ieee":
        return
    for block_m, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
        for block_p in (defaults["BLOCK_P"] // 2, defaults["BLOCK_P"]):
            for stages in (2, 3, 4):
                yield {"BLOCK_M": block_m, "BLOCK_P": block_p, "num_warps": warps, "num_stages": stages}


@launch.tunable(
    "conv_block_convolve",
    candidates=_convolve_candidates,
    examples=[size.example(reductions=kind) for kind in ("moments", "", "second") for size in _BLOCKS],
)
def _convolve(reductions: str, **size: Any) -> Callable[[], Any]:
    """The forward pass's, the gradient of the input, and u of two pairs."""
    block = _Block(_Size(**size))
    if not reductions:
        packed = block.pack(True)
        return lambda: convolution.convolve(block.y, packed, block.size.kernel, precision="float32")[0]
    packed = block.pack()
    how: dict[str, Any] = {"precision": "float32", "reductions": reductions}
    if reductions == "second":
        how |= {"second": (block.x2, packed), "context": block.context}

    def call() -> tuple[Tensor, ...]:
        out, partials = convolution.convolve(block.x, packed, block.size.kernel, **how)
        assert partials is not None
        return out, _whole(block, out, partials, reductions)

    return call


def _whole(block: _Block, y: Tensor, partials: sums.Partials, reductions: str) -> Tensor:
    if reductions == "second":
        return partials.values.sum(1)
    return forward.merged_moments(y, partials, *block.affine, block.eps)[0]


@launch.tunable(
    "conv_block_weight_gradient",
    candidates=_weight_gradient_candidates,
    examples=[size.example() for size in _BLOCKS],
)
def _weight_gradient(**size: Any) -> Callable[[], Any]:
    block = _Block(_Size(**size))
    return lambda: convolution.weight_gradient(block.x, block.y, block.size.kernel, precision="float32")


# --- passes ---


def _pass_candidates(defaults: launch.Settings, shape: launch.Shape) -> Iterator[launch.Settings]:
    for elements in (1024, 2048, 4096, 8192):
        for warps in (4, 8):
            yield {"BLOCK_P": min(256, elements // defaults["BLOCK_C"]), "num_warps": warps}


def _pass(kernel: str) -> Callable[[Callable[[_Block], Callable[[], Any]]], Any]:
    """Declare a pass over a block's positions, by the call for a block."""

    def declare(call_for: Callable[[_Block], Callable[[], Any]]) -> Any:
        examples = [size.example() for size in _PASSES]
        declared = launch.tunable(kernel, candidates=_pass_candidates, examples=examples)
        return declared(lambda **size: call_for(_Block(_Size(**size))))

    return declare


@_pass("conv_block_activate")
def _activate(block: _Block) -> Callable[[], Any]:
    return lambda: forward.activated(block.y, block.table, block.slope, block.pool)


def _backward(block: _Block) -> tuple[Any, ...]:
    leaves = (block.x, block.weight, *block.affine, block.eps)
    saved = (block.y, block.selected, block.corners, block.moments)
    return (block.q, None, *leaves, *saved, block.slope, block.pool, False, False)


@_pass("conv_block_reduce")
def _reduce(block: _Block) -> Callable[[], Any]:
    arguments = _backward(block)
    return lambda: backward.backward(*arguments, precision="float32")[2:5]


@_pass("conv_block_gradient")
def _gradient(block: _Block) -> Callable[[], Any]:
    table = _normal(block.size.tasks, backward.TABLE_ROWS.value, block.size.outputs)
    more = (block.q, block.y, block.corners, block.u, table, block.slope, block.pool)
    return lambda: backward.gradient_of_y(*more)


@_pass("conv_block_second")
def _second(block: _Block) -> Callable[[], Any]:
    table = _normal(block.size.tasks, double_backward.TABLE_ROWS.value, block.size.outputs)
    if block.pool:  # the smaller windows' gradients are written where one is largest: all of them
        block.corners.copy_(block.corners % 4)
    return lambda: double_backward.gradients(
        block.u, block.q, block.y, block.corners, table, block.slope, block.pool, True
    )


@_pass("conv_block_sums_moments")
def _moments(block: _Block) -> Callable[[], Any]:
    return lambda: _whole(block, block.u, sums.sums_of(block.u, "moments"), "moments")


@_pass("conv_block_sums_second")
def _sums_second(block: _Block) -> Callable[[], Any]:
    return lambda: sums.sums_of(block.u, "second", block.context).values.sum(1)


# --- the first layer ---


class _FirstLayer:
    """Its tensors."""

    def __init__(self, size: _Size) -> None:
        x = _normal(size.tasks, size.images, size.inputs, size.size, size.size)
        weight = _normal(size.tasks, size.outputs, size.inputs, 3, 3) / 27**0.5
        affine = (_normal(size.tasks, size.outputs), _normal(size.tasks, size.outputs))
        self.patches = patch_statistics(x)
        self.leaves = (x, weight, *affine, torch.full((size.tasks,), 1e-5, device="cuda"))

    def forward(self) -> tuple[Any, ...]:
        """(out, y, selected, corners, moments)"""
        return first_layer.forward(*self.leaves, 0.01, *self.patches, precision="float32")

    def backward(self, q: Tensor, saved: tuple[Any, ...]) -> tuple[Any, ...]:
        """All gradients."""
        arguments: tuple[Any, ...] = (q, *self.leaves, *saved, 0.01, *self.patches, True)
        return first_layer.backward(*arguments, precision="float32")


def _first_candidates(defaults: launch.Settings, shape: launch.Shape) -> Iterable[launch.Settings]:
    if shape["products"] == "ieee":
        return ()
    return ({"BLOCK_P": block, "num_warps": warps} for block in (32, 64, 128) for warps in (4, 8))


def _of_first_layer(kernel: str) -> Callable[[Callable[[_FirstLayer], Callable[[], Any]]], Any]:
    def declare(call_for: Callable[[_FirstLayer], Callable[[], Any]]) -> Any:
        examples: list[Mapping[str, Any]] = [size.example() for size in _FIRST]
        declared = launch.tunable(kernel, candidates=_first_candidates, examples=examples)
        return declared(lambda **size: call_for(_FirstLayer(_Size(**size))))

    return declare


@_of_first_layer("first_layer_forward")
def _first_forward(layer: _FirstLayer) -> Callable[[], Any]:
    return lambda: layer.forward()[0]


@_of_first_layer("first_layer_reduce")
def _first_reduce(layer: _FirstLayer) -> Callable[[], Any]:
    out, _, *saved = layer.forward()
    q = torch.randn_like(out)
    return lambda: layer.backward(q, tuple(saved))[1:]


@_of_first_layer("first_layer_second")
def _first_second(layer: _FirstLayer) -> Callable[[], Any]:
    out, _, *saved = layer.forward()
    q = torch.randn_like(out)
    _, dweight, dscale, dbias, deps, sparse = layer.backward(q, tuple(saved))
    sums_of_q = (dscale, dbias, sparse)
    given: tuple[Any, ...] = (
        dweight,
        dscale,
        dbias,
        deps,
        q,
        *layer.leaves,
        *saved,
        *sums_of_q,
        0.01,
        *layer.patches,
        True,
    )
    return lambda: first_layer.double_backward(*given, precision="float32")[0]
