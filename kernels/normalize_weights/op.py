"""Unit-norm weights of all layers and tasks: the exact form of implicit gradient scaling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_weights
from cxgrad_fast.kernels.normalize_weights import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.normalize_weights,
    "cpp": cpp.normalize_weights,
    "triton": backends.lazy("cxgrad_fast.kernels.normalize_weights.triton", "normalize_weights"),
}


def normalize_weights(weights: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Every layer's weight over its Frobenius norm, one norm a task and layer.

    A convolution with ``gamma * unit`` followed by a norm of epsilon ``e`` is the convolution with ``unit`` followed by
    the norm of epsilon ``e / gamma**2`` (MATH.md 3), whose gradient in gamma does not cancel.

    Args:
        weights: one tensor a layer, ``[T or 1, ...]``, at least one. Nothing is finite of one whose norm is zero in
            float64: float32 weights of zeros, float64 ones below about 1e-154.

    Returns:
        The unit weights, each in its own shape, and the norms ``[T, L]``. Differentiable in the weights.

    Raises:
        ValueError: no weights, a weight without values, or shapes, dtypes or devices that do not fit (name, expected,
            got).
    """
    check_weights(weights, reference.tasks_of(weights))
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, weights[0])](weights)
