"""What Triton kernels over the weights of many layers share: each program finds the layer that its row is of."""

from __future__ import annotations

import triton
import triton.language as tl

LAYERS_AT_ONCE = 16  # of one launch


@triton.jit
def choose(items, layer, LAYERS: tl.constexpr):
    """The layer's of a tuple, which only constants can index."""
    chosen = items[0]
    for other in tl.static_range(1, LAYERS):
        chosen = tl.where(layer == other, items[other], chosen)
    return chosen


@triton.jit
def layer_of(program, STARTS: tl.constexpr, LAYERS: tl.constexpr):
    layer = 0
    for other in tl.static_range(1, LAYERS):
        layer += (program >= STARTS[other]).to(tl.int32)
    return layer


@triton.jit
def load(row, at, size, PRECISION: tl.constexpr):
    return tl.load(row + at, mask=at < size, other=0.0).to(PRECISION)
