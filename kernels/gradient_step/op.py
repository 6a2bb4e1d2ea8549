"""The inner update: one step of gradient descent for all adapted tensors of all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_like, check_shape, check_weights
from cxgrad_fast.kernels.gradient_step import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.gradient_step,
    "cpp": cpp.step,
    "triton": backends.lazy("cxgrad_fast.kernels.gradient_step.triton", "gradient_step"),
}


def gradient_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rates: float | Tensor,
    *,
    factors: Tensor | None = None,
    divisors: Tensor | None = None,
) -> list[Tensor]:
    """``factor * w - rate / divisor * g`` of every tensor of every task (paper, Eq. 2; CxGrad's: docs/math.md).

    Args:
        weights: ``[T, ...]`` each, at least one.
        gradients: one a weight, in its shape.
        rates: one number for all, a constant; or ``[T or 1, K]``, one a task and weight, differentiable.
        factors: ``[T, L]`` of the first L weights; the others, or all where it is None, have the factor 1.
        divisors: ``[T, L]`` likewise.

    Returns:
        The moved weights, ``[T, ...]`` each. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit (name, expected, got).
    """
    tasks = len(weights[0]) if weights and weights[0].ndim else 0
    check_weights(weights, tasks)
    for name, tensors in (("weights", weights), ("gradients", gradients)):
        if len(tensors) != len(weights):
            raise ValueError(f"{name} must hold {len(weights)} tensors (one a weight), got {len(tensors)}")
        for index, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            check_shape(f"{name}[{index}]", tensor, [tasks, *weight.shape[1:]], "T from weights[0]")
            check_like(f"{name}[{index}]", tensor, "weights[0]", weights[0])
    for name, numbers in (("factors", factors), ("divisors", divisors)):
        if numbers is not None:
            check_shape(name, numbers, [tasks, "L"], "T from weights[0]")
            check_like(name, numbers, "weights[0]", weights[0])
            if not 0 < numbers.shape[1] <= len(weights):
                raise ValueError(f"{name} must be of 1 to {len(weights)} weights, got {list(numbers.shape)}")
    rate, by_weight = (0.0, rates) if isinstance(rates, Tensor) else (rates, None)
    if by_weight is not None:
        check_shape("rates", by_weight, [(tasks, 1), len(weights)], "T from weights[0] or 1, one a weight")
        check_like("rates", by_weight, "weights[0]", weights[0])
    choice = backends.choose(_IMPLEMENTATIONS, weights[0])
    return _IMPLEMENTATIONS[choice](weights, gradients, rate, by_weight, factors, divisors)
