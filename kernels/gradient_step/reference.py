"""The definition of gradient_step in plain PyTorch (docs/math.md)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def gradient_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    rates: Tensor | None,
    factors: Tensor | None,
    divisors: Tensor | None,
) -> list[Tensor]:
    """``f * w - r / d * g``; see :func:`cxgrad_fast.kernels.gradient_step`."""
    moved = []
    for layer, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        of_gradient = rate if rates is None else _of_task(rates, layer, weight)
        if divisors is not None and layer < divisors.shape[1]:
            of_gradient = of_gradient / _of_task(divisors, layer, weight)
        is_scaled = factors is not None and layer < factors.shape[1]
        kept = _of_task(factors, layer, weight) * weight if factors is not None and is_scaled else weight
        moved.append(kept - of_gradient * gradient)
    return moved


def _of_task(numbers: Tensor, layer: int, like: Tensor) -> Tensor:
    """A layer's column of ``[T or 1, L]``, to be multiplied with ``like`` [T, ...]."""
    return numbers[:, layer].view(-1, *[1] * (like.ndim - 1))
