"""bfloat16 on AMX's tile registers, as JSON, for tests/test_tiles.py: in a process of its own, for its SIGILL handler.

Takes the emulator's file as its argument, or nothing where the processor has the instructions.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from helpers import config_of, gradients, lengthen_weights, random_episodes, relative_error
from not_numbers import BITS, lost
from torch import Tensor

from cxgrad_fast import Learner
from cxgrad_fast.kernels import case_calls, conv_block, registration, use_precision
from cxgrad_fast.kernels.cases import Case, inputs
from cxgrad_fast.kernels.conv_block import cpp

# whole tiles and less, one image and groups, rows of one pixel
CASES = {
    name: Case("conv_block", name, "products on tiles", False, *sizes, slope=None, pool=False)
    for name, sizes in {  # tasks, images, channels, out, height, width, kernel
        "one_tile": (1, 1, 32, 16, 4, 4, 1),
        "one_channel": (1, 2, 1, 1, 5, 4, 3),
        "odd": (2, 5, 7, 19, 6, 5, 3),
        "more_rows_than_two_tiles": (1, 1, 16, 16, 7, 9, 3),
        "48_channels": (1, 2, 48, 48, 10, 10, 3),
        "group_of_images": (1, 30, 8, 33, 3, 3, 3),
        "one_pixel": (1, 2, 24, 20, 1, 1, 3),
        "one_row": (1, 2, 5, 20, 1, 23, 3),
        "one_column": (1, 2, 5, 20, 23, 1, 3),
        "pointwise": (2, 3, 20, 40, 5, 7, 1),
    }.items()
}
BLOCKS = [
    replace(CASES["odd"], pool=True),
    CASES["48_channels"],
    CASES["pointwise"],
    replace(CASES["group_of_images"], pool=True),
]


class Tiles:
    """Tile instructions where they are to be had, and how many products were made."""

    def __init__(self, emulator: str | None) -> None:
        registration.load()
        self._emulator = None if emulator is None else ctypes.CDLL(emulator)
        if self._emulator is not None:
            self._emulator.install()
            self._emulator.take_products.restype = ctypes.c_int64

    def use(self, there: bool) -> None:
        torch.ops.cxgrad_fast.assume_tiles(there)

    def products(self) -> int | None:
        return None if self._emulator is None else self._emulator.take_products()


def leave_nan_behind() -> None:
    """In all scratch memory, so that what is read without having been written shows."""
    x = torch.full((1, 2, 64, 12, 12), float("nan"), requires_grad=True)
    weight = torch.full((1, 48, 64, 3, 3), float("nan"), requires_grad=True)
    with use_precision("bfloat16"):
        out = conv_block(x, weight, torch.ones(1, 48), torch.ones(1, 48), 1e-3, slope=None, pool=False)
    torch.autograd.grad(out.sum(), (x, weight))


def convolutions(tiles: Tiles) -> dict[str, Any]:
    """Errors of tile and software products against float64 products of rounded factors, and the tile products made."""
    found = {}
    for name, case in CASES.items():
        x, w = (inputs(case, torch.float32).tensors[key].detach() for key in ("x", "weight"))
        factors = zip(x.bfloat16().double(), w.bfloat16().double(), strict=True)
        exact = torch.stack([F.conv2d(image, weight, padding=case.kernel // 2) for image, weight in factors])
        errors = {}
        for there in (False, True):
            tiles.use(there)
            leave_nan_behind()
            tiles.products()
            y = torch.ops.cxgrad_fast.conv_block_convolution(x, w, "bfloat16")
            errors["tiles" if there else "software"] = relative_error(y, exact)
        found[name] = errors | {"products": tiles.products()}
    return found


def derivatives(case: Case, dtype: torch.dtype, precision: str) -> dict[str, Tensor]:
    """Of the block, on the same values in every type and precision."""
    with use_precision(precision):
        return case_calls.derivatives(case, inputs(case, dtype))


def blocks(tiles: Tiles) -> dict[str, Any]:
    """Errors of every derivative by tiles: against software rounding, and against float64."""
    found = {}
    for case in BLOCKS:
        results = []
        for there, dtype, precision in (
            (True, torch.float32, "bfloat16"),
            (False, torch.float32, "bfloat16"),
            (False, torch.float64, "float32"),
        ):
            tiles.use(there)
            leave_nan_behind()
            results.append(derivatives(case, dtype, precision))
        own, software, exact = results
        used = [key for key, tensor in exact.items() if tensor.norm() > 0]
        found[case.name] = {
            "software": {key: relative_error(own[key], software[key]) for key in used},
            "float64": {key: relative_error(own[key], exact[key]) for key in used},
        }
    return found


def different_bits(tiles: Tiles) -> list[str]:
    """Results whose bits change on other numbers of threads, or in float64, which no precision touches."""
    tiles.use(True)
    changed = []
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(derivatives(BLOCKS[-1], torch.float32, "bfloat16"))
    torch.set_num_threads(1)
    changed += [key for key, value in results[0].items() if any(not value.equal(other[key]) for other in results[1:])]
    one, other = (derivatives(BLOCKS[0], torch.float64, precision) for precision in ("float32", "bfloat16"))
    return changed + [f"float64 {key}" for key, value in one.items() if not value.equal(other[key])]


def lost_not_numbers(tiles: Tiles) -> list[str]:
    """The results that are numbers where a factor is a NaN, and its bits."""
    tiles.use(True)
    tiles.products()
    found = [f"{name}, {bits:#x}" for bits in BITS for name in lost(cpp._chain("bfloat16"), bits)]
    assert tiles.products() != 0
    return found


def training(tiles: Tiles) -> dict[str, Any]:
    """Losses of meta-steps by tiles, with --compile and without; error of the first meta-gradient."""
    settings = {"inner__steps": 1, "model__image_size": 16, "task__queries": 1, "task__ways": 3}
    losses, meta_gradients = {}, {}
    for name, there, compiled, precision in (
        ("tiles", True, False, "bfloat16"),
        ("compiled", True, True, "bfloat16"),
        ("software", False, False, "bfloat16"),
        ("float64", False, False, "float64"),
    ):
        tiles.use(there)
        config = config_of(**settings, run__precision=precision, run__compile=compiled)
        learner = Learner(config)
        lengthen_weights(learner)
        episodes = [random_episodes(config, 2, seed=seed) for seed in range(3)]
        first = gradients(learner.meta_loss(episodes[0]).loss, learner.meta_parameters)
        meta_gradients[name] = torch.cat([gradient.flatten().double() for gradient in first.values()])
        steps = [learner.meta_step(batch) for batch in episodes]
        losses[name] = [value for out in steps for value in (out.loss.item(), *out.support_losses.flatten().tolist())]
    errors = {name: relative_error(meta_gradients["tiles"], meta_gradients[name]) for name in ("software", "float64")}
    return {"losses": losses, "errors": errors}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, fresh memory is NaN
    tiles = Tiles(sys.argv[1] if len(sys.argv) > 1 else None)
    checks = {
        "convolutions": convolutions,
        "blocks": blocks,
        "bits": different_bits,
        "lost": lost_not_numbers,
        "training": training,
    }
    print(json.dumps({name: check(tiles) for name, check in checks.items()}))
