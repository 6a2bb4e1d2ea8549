"""gradient_step in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.gradient_step.chain import Chain
from cxgrad_fast.kernels.registration import launcher, operator


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _fake(weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return _like(weights)


def _fake_backward(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], rate: float, *rest: Any
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    *tables, _, needs = rest
    of_rates, of_factors, of_divisors = (
        weights[0].new_empty(0) if table is None or not need else _like([table])[0]
        for table, need in zip(tables, needs[2:], strict=True)
    )
    factors: Tensor | None = tables[1]
    scaled = _like(weights[: factors.shape[1]]) if needs[0] and factors is not None else []
    return scaled, _like(gradients) if needs[1] else [], of_rates, of_factors, of_divisors


@operator(fake=_fake)
def gradient_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    rates: Tensor | None,
    factors: Tensor | None,
    divisors: Tensor | None,
) -> list[Tensor]:
    """The moved weights; see :func:`cxgrad_fast.kernels.gradient_step`."""
    return _chain.apply(weights, gradients, rate, rates, factors, divisors)


@operator(fake=_fake_backward)
def gradient_step_backward(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rate: float,
    rates: Tensor | None,
    factors: Tensor | None,
    divisors: Tensor | None,
    v: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
    """Cotangents ``v`` of the moved weights -> gradients of weights with a factor, gradients, rates, factors, divisors.

    What ``needs`` does not ask for is an empty list or vector.
    """
    return _chain.apply_backward(weights, gradients, rate, rates, factors, divisors, v, needs)


_chain = Chain(
    forward=launcher("gradient_step"),
    backward=launcher("gradient_step_backward"),
    call=gradient_step,
    call_backward=gradient_step_backward,
)
step = _chain.step
