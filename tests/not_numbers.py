"""Whether a NaN of any bits is still there behind products of fewer digits, whichever factor it is in.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: what :func:`lost` finds in Triton, by precision.
"""

from __future__ import annotations

import importlib
import json

import interpreter_rounding
import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.kernels.conv_block.chain import Chain
from cxgrad_fast.kernels.patch_statistics.reference import patch_statistics

PRECISIONS = ("float32", "tf32", "bfloat16")
# NVIDIA's NaN, that of CPUs, both negative, and those with their last or their 14th bit alone
BITS = (0x7FFFFFFF, 0x7FC00000, -1, -0x400000, 0x7F800001, 0x7F802000)

SHAPE = (1, 2, 8, 6, 6)  # of the images
OUTPUTS = 16
PIXEL = (0, 1, 3, 2, 2)


def lost(chain: Chain, bits: int) -> list[str]:
    """The results of a block and of a first layer that are numbers where a factor is none."""
    found = _block(chain, bits) | _first_layer(chain, bits)
    return [name for name, (result, wanted) in found.items() if not (result.isnan() | ~wanted).all()]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _spoiled(tensor: Tensor, place: tuple[int, ...], bits: int) -> Tensor:
    """``tensor`` with a NaN of these bits at a place."""
    tensor = tensor.clone()
    tensor.view(torch.int32)[place] = bits
    assert tensor.isnan().sum() == 1
    return tensor


def _block(chain: Chain, bits: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Results, and where they must be NaN: of the convolution, its transpose and its gradient in the filters."""
    x, weight = _draw(*SHAPE, seed=0), _draw(1, OUTPUTS, SHAPE[2], 3, 3, seed=1)
    dy = _draw(1, SHAPE[1], OUTPUTS, *SHAPE[3:], seed=2)
    affine = [torch.ones(1, OUTPUTS), torch.zeros(1, OUTPUTS), torch.full((1,), 1e-3)]
    options = (0.1, False, None, None)
    out, *saved = chain.forward(x, weight, *affine, *options)
    q = torch.zeros_like(out)

    def backward(y_gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dx, dweight, *_ = chain.backward(q, y_gradient, x, weight, *affine, *saved, *options, True, True)
        return dx, dweight

    bad_x, bad_weight = _spoiled(x, PIXEL, bits), _spoiled(weight, (0, 5, 3, 0, 2), bits)
    bad_dy = _spoiled(dy, (0, 1, 5, 2, 3), bits)
    around = F.conv2d(bad_x.isnan()[0].any(1, keepdim=True).float(), torch.ones(1, 1, 3, 3), padding=1)[None] > 0
    behind = F.conv2d(bad_dy.isnan()[0].any(1, keepdim=True).float(), torch.ones(1, 1, 3, 3), padding=1)[None] > 0
    inside = torch.zeros(SHAPE[3:], dtype=torch.bool)
    inside[1:-1, 1:-1] = True  # at the border a filter's value may meet no pixel
    filters, channels = (torch.zeros(count, dtype=torch.bool) for count in (OUTPUTS, SHAPE[2]))
    filters[5], channels[3] = True, True
    dx, dweight = backward(bad_dy, x, weight)
    y = chain.forward(bad_x, weight, *affine, *options)[1]
    results = {
        "y of x": (y, around.expand_as(y)),
        "y of weight": (chain.forward(x, bad_weight, *affine, *options)[1], filters[:, None, None] & inside),
        "dx of dy": (dx, behind.expand_as(dx)),
        "dweight of dy": (dweight, filters[:, None, None, None].expand_as(dweight)),
        "dx of weight": (backward(dy, x, bad_weight)[0], channels[:, None, None] & inside),
        "dweight of x": (backward(dy, bad_x, weight)[1], channels[:, None, None].expand_as(dweight)),
    }
    assert not any(result.isnan().all() for result, _ in results.values())
    return results


def _first_layer(chain: Chain, bits: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The same of a first layer: its pass, the sums of its weight gradient, its second derivative's pass."""
    x, weight = _draw(1, 2, 3, 6, 6, seed=0), _draw(1, OUTPUTS, 3, 3, 3, seed=1)
    affine = [torch.ones(1, OUTPUTS), torch.zeros(1, OUTPUTS), torch.full((1,), 1e-3)]
    options = (0.1, True, *patch_statistics(x))
    out, y, *saved = chain.forward(x, weight, *affine, *options)
    q = _draw(*out.shape, seed=2)
    bad_x, bad_q = _spoiled(x, (0, 1, 2, 2, 2), bits), _spoiled(q, (0, 1, 5, 1, 1), bits)

    def sums(q: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        given: tuple[Tensor, ...] = chain.backward(q, None, x, weight, *affine, y, *saved, *options, False, True)
        return given

    _, _, dscale, dbias, _, sparse = sums(q, x)
    on = (None, _draw(*weight.shape, seed=3), None, None, None)
    given = (y, *saved, dscale, dbias, sparse, *options, False, False)
    second = chain.double_backward(*on, q, bad_x, weight, *affine, *given)[0]
    window = torch.zeros(out.shape[1:], dtype=torch.bool)
    window[1, :, 1, 1] = True  # the pixel stands in all of its patches
    filters = torch.zeros(OUTPUTS, dtype=torch.bool)
    filters[5] = True
    rows = torch.zeros(27, dtype=torch.bool)
    rows[22] = True  # of the third channel's patch, its centre
    found = sums(q, bad_x)[5]
    touched = rows[:, None] & (saved[1][0, 1, :, 1, 1] % 4 == 0)  # where the arg-max is the pixel
    return {
        "out of x": (chain.forward(bad_x, weight, *affine, *options)[0], window),
        "sums of q": (sums(bad_q, x)[5], filters.expand(27, -1)),
        "sums of x": (found, touched),
        "second of x": (second, window),
    }


def main() -> None:
    torch.set_num_threads(1)
    interpreter_rounding.install()
    chain = importlib.import_module("cxgrad_fast.kernels.conv_block.triton").chain
    found = {precision: {str(bits): lost(chain(precision), bits) for bits in BITS} for precision in PRECISIONS}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
