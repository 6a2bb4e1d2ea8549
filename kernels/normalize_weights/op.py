"""Unit-norm weights of all layers and tasks: the exact form of implicit gradient scaling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_like, check_shape
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
        weights: one tensor a layer, ``[T or 1, ...]``, at least one.

    Returns:
        The unit weights, each in its own shape, and the norms ``[T, L]``. Differentiable in the weights.

    Raises:
        ValueError: no weights, or shapes, dtypes or devices that do not fit (name, expected, got).
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor, got none")
    tasks = next((len(weight) for weight in weights if len(weight) != 1), 1)
    for layer, weight in enumerate(weights):
        check_shape(f"weights[{layer}]", weight, [(tasks, 1), *weight.shape[1:]], "T tasks, or 1")
        check_like(f"weights[{layer}]", weight, "weights[0]", weights[0])
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, weights[0])](weights)
