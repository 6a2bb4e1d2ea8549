"""The head and the loss of all tasks: a linear layer and the cross-entropy of its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.checks import check_floating, check_like, check_shape
from cxgrad_fast.kernels.linear_cross_entropy import cpp, reference

_IMPLEMENTATIONS = {
    "reference": reference.linear_cross_entropy,
    "cpp": cpp.head,
}


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``z = x W^T + b`` and each task's mean of ``logsumexp(z) - z[label]`` over its images.

    Args:
        x: ``[T, S, ...]``: all axes behind S are the D features. T may be 0, no other size.
        weight: ``[T, N, D]``; it may be expanded over the tasks.
        bias: ``[T, N]``, likewise.
        labels: ``[T, S]`` of any integer dtype, from 0 to N - 1. On a CUDA device they are not checked, which would
            wait for it: the framework's assertion fails there, or the task's loss and its gradients are NaN.

    Returns:
        The losses ``[T]`` and the logits ``[T, S, N]``. Both are differentiable in x, weight and bias.

    Raises:
        ValueError: shapes, dtypes, devices or labels that do not fit (name, expected, got).
    """
    _check(x, weight, bias, labels)
    return _IMPLEMENTATIONS[backends.choose(_IMPLEMENTATIONS, x)](x, weight, bias, labels)


def _check(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> None:
    if x.ndim < 3 or not all(x.shape[1:]):
        raise ValueError(f"x must be [T, S, ...], of which T alone may be 0, got {list(x.shape)}")
    check_floating("x", x)
    tasks, images = x.shape[:2]
    check_shape("weight", weight, [tasks, "N", math.prod(x.shape[2:])], "T and D from x")
    check_like("weight", weight, "x", x)
    ways = weight.shape[1]
    if not ways:
        raise ValueError(f"weight must have at least one output, got {list(weight.shape)}")
    check_shape("bias", bias, [tasks, ways], "T from x, N from weight")
    check_like("bias", bias, "x", x)
    check_shape("labels", labels, [tasks, images], "T and S from x")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers, got {labels.dtype}")
    if labels.device != x.device:
        raise ValueError(f"labels must be on {x.device} like x, got {labels.device}")
