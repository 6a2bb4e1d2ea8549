"""scaling_factors in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator
from cxgrad_fast.kernels.scaling_factors.chain import Chain


def _fake(
    context: Tensor, w0: Tensor, b0: Tensor, w2: Tensor, b2: Tensor, norm_eps: float, least: float
) -> tuple[Tensor, Tensor]:
    shape = (context.shape[0], w2.shape[0])
    return context.new_empty(shape), context.new_empty(shape)


def _needed(tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape if need else 0) for tensor, need in zip(tensors, needed, strict=True))


def _fake_backward(
    v: Tensor | None,
    e: Tensor | None,
    context: Tensor,
    w0: Tensor,
    b0: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_eps: float,
    least: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    return _needed((context, w0, b0, w2, b2), needed)


def _fake_double_backward(
    on_context: Tensor | None,
    on_w0: Tensor | None,
    on_b0: Tensor | None,
    on_w2: Tensor | None,
    on_b2: Tensor | None,
    v: Tensor | None,
    e: Tensor | None,
    context: Tensor,
    w0: Tensor,
    b0: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_eps: float,
    least: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    scaler = (context, w0, b0, w2, b2)
    return _needed((*_fake(*scaler, norm_eps, least), *scaler), needed)


@operator(fake=_fake)
def scaling_factors(
    context: Tensor, w0: Tensor, b0: Tensor, w2: Tensor, b2: Tensor, norm_eps: float, least: float
) -> tuple[Tensor, Tensor]:
    """(gammas, eps), see csrc/scaling_factors.h."""
    return _chain.apply(context, w0, b0, w2, b2, norm_eps, least)


@operator(fake=_fake_backward)
def scaling_factors_backward(
    v: Tensor | None,
    e: Tensor | None,
    context: Tensor,
    w0: Tensor,
    b0: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_eps: float,
    least: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Cotangents ``v`` of gammas and ``e`` of eps -> gradients of (context, w0, b0, w2, b2)."""
    return _chain.apply_backward(v, e, context, w0, b0, w2, b2, norm_eps, least, needed)


@operator(fake=_fake_double_backward)
def scaling_factors_double_backward(
    on_context: Tensor | None,
    on_w0: Tensor | None,
    on_b0: Tensor | None,
    on_w2: Tensor | None,
    on_b2: Tensor | None,
    v: Tensor | None,
    e: Tensor | None,
    context: Tensor,
    w0: Tensor,
    b0: Tensor,
    w2: Tensor,
    b2: Tensor,
    norm_eps: float,
    least: float,
    needed: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Cotangents of those five gradients -> gradients of (v, e, context, w0, b0, w2, b2)."""
    on = (on_context, on_w0, on_b0, on_w2, on_b2)
    return _chain.apply_double_backward(*on, v, e, context, w0, b0, w2, b2, norm_eps, least, needed)


_chain = Chain(
    forward=launcher("scaling_factors"),
    backward=launcher("scaling_factors_backward"),
    double_backward=launcher("scaling_factors_double_backward"),
    call=scaling_factors,
    call_backward=scaling_factors_backward,
    call_double_backward=scaling_factors_double_backward,
)
factors = _chain.factors
