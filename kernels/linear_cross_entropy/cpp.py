"""linear_cross_entropy in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

import torch
from torch import Tensor

from cxgrad_fast.kernels.linear_cross_entropy.chain import Chain
from cxgrad_fast.kernels.registration import launcher, operator


def _like_x(x: Tensor) -> Tensor:
    """Images channels last, anything else row-major."""
    if x.ndim != 5:
        return x.new_empty(x.shape)
    tasks, images, channels, height, width = x.shape
    return x.new_empty((tasks, images, height, width, channels)).permute(0, 1, 4, 2, 3)


def _fake(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:2], weight.shape[1])
    return x.new_empty(len(x)), x.new_empty(shape), x.new_empty(shape, dtype=torch.float64)


def _fake_backward(
    losses_gradient: Tensor | None,
    logits_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _like_x(x) if need_x else x.new_empty(0)
    return dx, x.new_empty(weight.shape if need_weight else (0,)), x.new_empty(bias.shape)


def _fake_double_backward(
    on_x: Tensor | None,
    on_weight: Tensor | None,
    on_bias: Tensor | None,
    losses_gradient: Tensor | None,
    logits_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (losses_gradient, logits_gradient, x, weight, bias, labels, probabilities, need_x, need_weight)
    losses = x.new_empty((0,) if losses_gradient is None else (len(x),))
    return *_fake_backward(*arguments), losses, x.new_empty((0,) if logits_gradient is None else probabilities.shape)


@operator(fake=_fake)
def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, logits, probabilities), see csrc/linear_cross_entropy.h."""
    return _chain.apply(x, weight, bias, labels)


@operator(fake=_fake_backward)
def linear_cross_entropy_backward(
    losses_gradient: Tensor | None,
    logits_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """Gradients of losses and logits -> those of x, weight and bias."""
    return _chain.apply_backward(
        losses_gradient, logits_gradient, x, weight, bias, labels, probabilities, need_x, need_weight
    )


@operator(fake=_fake_double_backward)
def linear_cross_entropy_double_backward(
    on_x: Tensor | None,
    on_weight: Tensor | None,
    on_bias: Tensor | None,
    losses_gradient: Tensor | None,
    logits_gradient: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    probabilities: Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, ...]:
    """Cotangents of those gradients -> gradients of x, weight, bias, losses_gradient and logits_gradient."""
    given = (losses_gradient, logits_gradient, x, weight, bias, labels, probabilities, need_x, need_weight)
    return _chain.apply_double_backward(on_x, on_weight, on_bias, *given)


_chain = Chain(
    forward=launcher("linear_cross_entropy"),
    backward=launcher("linear_cross_entropy_backward"),
    double_backward=launcher("linear_cross_entropy_double_backward"),
    call=linear_cross_entropy,
    call_backward=linear_cross_entropy_backward,
    call_double_backward=linear_cross_entropy_double_backward,
)
head = _chain.head
