"""residual_end in C++: its kernels, and the operators that tracing sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.registration import launcher, operator
from cxgrad_fast.kernels.residual_end.chain import Chain


def _images(like: Tensor, height: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Images of ``like``'s tasks and channels, channels last."""
    return like.new_empty((*like.shape[:2], height, width, like.shape[2]), dtype=dtype).permute(0, 1, 4, 2, 3)


def _pooled(images: Tensor, pool: bool, padding: int) -> tuple[int, int]:
    height, width = images.shape[3:]
    return ((height + 2 * padding) // 2, (width + 2 * padding) // 2) if pool else (height, width)


def _fake(x: Tensor, shortcut: Tensor, slope: float, pool: bool, padding: int) -> tuple[Tensor, Tensor]:
    size = _pooled(x, pool, padding)
    return _images(x, *size), _images(x, *size, torch.uint8)


def _fake_backward(q: Tensor, codes: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return _images(q, height, width)


def _fake_double_backward(cotangent: Tensor, codes: Tensor, slope: float, pool: bool, padding: int) -> Tensor:
    return _images(cotangent, *_pooled(cotangent, pool, padding))


@operator(fake=_fake)
def residual_end(x: Tensor, shortcut: Tensor, slope: float, pool: bool, padding: int) -> tuple[Tensor, Tensor]:
    """(out, codes), see csrc/residual_end.h."""
    return _chain.apply(x, shortcut, slope, pool, padding)


@operator(fake=_fake_backward)
def residual_end_backward(
    q: Tensor, codes: Tensor, height: int, width: int, slope: float, pool: bool, padding: int
) -> Tensor:
    """Cotangent ``q`` of out -> the gradient of x, and of shortcut."""
    return _chain.apply_backward(q, codes, height, width, slope, pool, padding)


@operator(fake=_fake_double_backward)
def residual_end_double_backward(cotangent: Tensor, codes: Tensor, slope: float, pool: bool, padding: int) -> Tensor:
    """Cotangent of that gradient -> the gradient of ``q``."""
    return _chain.apply_double_backward(cotangent, codes, slope, pool, padding)


_chain = Chain(
    forward=launcher("residual_end"),
    backward=launcher("residual_end_backward"),
    double_backward=launcher("residual_end_double_backward"),
    call=residual_end,
    call_backward=residual_end_backward,
    call_double_backward=residual_end_double_backward,
)
end = _chain.end
