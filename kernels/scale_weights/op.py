"""Implicit gradient scaling (IGS) of all layers and tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_like, check_shape, check_weights
from cxgrad_fast.kernels.scale_weights import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.scale_weights,
    "cpp": cpp.scale_weights,
    "triton": backends.lazy("cxgrad_fast.kernels.scale_weights.triton", "scale_weights"),
}


def scale_weights(weights: Sequence[Tensor], gammas: Tensor) -> list[Tensor]:
    """IGS: every layer's weight normalised over the whole tensor and scaled, ``gamma * w / |w|`` (paper, Eq. 6).

    Args:
        weights: one tensor a layer, ``[T or 1, ...]``, at least one. Nothing is finite of one whose norm is zero in
            float64: float32 weights of zeros, float64 ones below about 1e-154.
        gammas: ``[T, L]``, one factor a task and layer.

    Returns:
        One tensor a layer, ``[T, ...]``. Differentiable in the weights and the factors.

    Raises:
        ValueError: no weights, a weight without values, or shapes, dtypes or devices that do not fit (name, expected,
            got).
    """
    check_shape("gammas", gammas, ["T", len(weights)], "one factor a weight")
    check_weights(weights, len(gammas))
    check_like("gammas", gammas, "weights[0]", weights[0])
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, gammas)](weights, gammas)
