"""The scaling factors of all layers and tasks, and the epsilons of the norms behind the scaled layers."""

from __future__ import annotations

import math

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_floating, check_like, check_shape
from cxgrad_fast.kernels.scaling_factors import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.scaling_factors,
    "cpp": cpp.factors,
}


def scaling_factors(
    context: Tensor, w0: Tensor, b0: Tensor, w2: Tensor, b2: Tensor, *, norm_eps: float, least: float
) -> tuple[Tensor, Tensor]:
    """``gammas = softplus(relu(context w0' + b0) w2' + b2)`` and ``eps = norm_eps / gammas**2`` (docs/math.md).

    The network is ``g_phi`` of the paper (Eq. 8), whose parameters all tasks share. A factor below ``least`` is raised
    to it, and its gradient passed on as it is.

    Args:
        context: ``[T, D]``. T may be 0, no other size.
        w0: ``[H, D]``.
        b0: ``[H]``.
        w2: ``[L, H]``.
        b2: ``[L]``.
        norm_eps: finite and not negative.
        least: finite and not negative; 0 raises nothing. With 1e-11 in float32 and 1e-90 in float64, ``eps`` and its
            derivatives do not overflow.

    Returns:
        The factors and the epsilons, ``[T, L]`` each. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit (name, expected, got).
    """
    check_shape("context", context, ["T", "D"])
    check_floating("context", context)
    check_shape("w0", w0, ["H", context.shape[1]], "D from context")
    check_shape("b0", b0, [w0.shape[0]], "H from w0")
    check_shape("w2", w2, ["L", w0.shape[0]], "H from w0")
    check_shape("b2", b2, [w2.shape[0]], "L from w2")
    for name, tensor in (("w0", w0), ("b0", b0), ("w2", w2), ("b2", b2)):
        check_like(name, tensor, "context", context)
        if not tensor.numel():
            raise ValueError(f"{name} must hold at least one value, got {list(tensor.shape)}")
    for name, number in (("norm_eps", norm_eps), ("least", least)):
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {number}")
    function = _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, context)]
    return function(context, w0, b0, w2, b2, norm_eps=norm_eps, least=least)
