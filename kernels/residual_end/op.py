"""The end of a residual block: addition, activation, pooling."""

from __future__ import annotations

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_like, check_shape
from cxgrad_fast.kernels.residual_end import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.residual_end,
    "cpp": cpp.end,
    "triton": backends.lazy("cxgrad_fast.kernels.residual_end.triton", "residual_end"),
}


def residual_end(x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int = 0) -> Tensor:
    """``x + shortcut`` -> LeakyReLU -> 2x2 max-pool.

    Args:
        x: ``[T, S, C, H, W]``.
        shortcut: the same shape.
        slope: of LeakyReLU, not negative; 0 is ReLU.
        pool: whether to pool (window and stride 2).
        padding: of the pool, 0 or 1.

    Returns:
        ``[T, S, C, H', W']`` with ``H' = (H + 2 * padding) // 2``, or H without pooling.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a negative slope.
    """
    check_shape("x", x, ["T", "S", "C", "H", "W"])
    check_shape("shortcut", shortcut, list(x.shape), "the shape of x")
    check_like("shortcut", shortcut, "x", x)
    if slope < 0 or padding not in (0, 1):
        raise ValueError(f"slope must not be negative and padding must be 0 or 1, got {slope} and {padding}")
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, x)](x, shortcut, slope=slope, pool=pool, padding=padding)
