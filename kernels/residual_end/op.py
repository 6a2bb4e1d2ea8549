"""The end of a residual block: addition, activation, pooling."""

from __future__ import annotations

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_images, check_like, check_shape, check_slope
from cxgrad_fast.kernels.residual_end import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.residual_end,
    "cpp": cpp.end,
    "triton": backends.lazy("cxgrad_fast.kernels.residual_end.triton", "residual_end"),
}


def residual_end(x: Tensor, shortcut: Tensor, *, slope: float, pool: bool, padding: int = 0) -> Tensor:
    """``x + shortcut`` -> LeakyReLU -> 2x2 max-pool.

    Args:
        x: ``[T, S, C, H, W]``. T may be 0, no other size.
        shortcut: the same shape.
        slope: of LeakyReLU, finite and not negative; 0 is ReLU.
        pool: whether to pool (window and stride 2); something must be left.
        padding: of the pool, 0 or 1.

    Returns:
        ``[T, S, C, H', W']`` with ``H' = (H + 2 * padding) // 2``, or H without pooling.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit (name, expected, got).
    """
    if padding not in (0, 1):
        raise ValueError(f"padding must be 0 or 1, got {padding}")
    check_images("x", x, pool=pool, padding=padding)
    check_shape("shortcut", shortcut, list(x.shape), "the shape of x")
    check_like("shortcut", shortcut, "x", x)
    check_slope(slope)
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, x)](x, shortcut, slope=slope, pool=pool, padding=padding)
