"""Stores of bfloat16 under Triton's interpreter as a device does them: to nearest, ties to even.

The interpreter of triton 3.6.0 cuts the last 16 bits off, which doubles the error of whatever is stored.
"""

from __future__ import annotations

import numpy as np


def install() -> None:
    """For the rest of the process, which runs under ``TRITON_INTERPRET=1``."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):  # as the interpreter calls it
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000  # else the carry makes it infinite, or zero
        return np.where(not_a_number, bits >> 16 | 0x40, rounded).astype(np.uint16).reshape(values.shape)

    interpreter._convert_float = rounding
