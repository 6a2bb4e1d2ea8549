"""What this machine can do, measured: matrix products in each precision and copies."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# by run.precision
DTYPES = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LONG_ENOUGH = 0.05  # seconds of one product
WIDEST = 8192


@dataclass(frozen=True)
class Peaks:
    """What the device does in a second.

    Attributes:
        flops: of a matrix product.
        bandwidth: bytes read plus bytes written by a copy.
    """

    flops: float
    bandwidth: float


def peaks_for(precision: str, device: torch.device | str) -> Peaks:
    """The peaks that ``run.precision`` may use.

    On CUDA float32-accurate products may be three TF32 products (MATH.md 3), so that float32's peak is the better of
    the device's own and a third of TF32's.
    """
    own = measured_peaks(device, DTYPES[precision], tf32=precision == "tf32")
    if precision == "float32" and torch.device(device).type == "cuda":
        return replace(own, flops=max(own.flops, measured_peaks(device, torch.float32, tf32=True).flops / 3))
    return own


def measured_peaks(device: torch.device | str, dtype: torch.dtype, tf32: bool = False) -> Peaks:
    """Measured once a process: best of five products (the size that takes 50 ms, or 8192), best of five copies.

    Args:
        device: where.
        dtype: of the operands, random.
        tf32: whether float32 products may round their operands to TF32 (CUDA only).
    """
    return _measured_peaks(str(device), dtype, tf32 and torch.device(device).type == "cuda")


@functools.cache
def _measured_peaks(device: str, dtype: torch.dtype, tf32: bool) -> Peaks:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        flops = _product_rate(torch.device(device), dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return Peaks(flops, _copy_rate(torch.device(device)))


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    size, seconds = 256, 0.0
    while seconds < LONG_ENOUGH and size < WIDEST:
        size *= 2
        product = _product(size, device, dtype)
        seconds = _best(product, device, 1)
    return 2 * size**3 / _best(product, device, 5)


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


@functools.cache
def _copy_rate(device: torch.device) -> float:
    source = torch.empty(1 << (30 if device.type == "cuda" else 28), dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device, 5)


def _best(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])
