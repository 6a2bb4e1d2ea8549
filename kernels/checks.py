"""Checks at the door of the operators: every message has the argument's name, what was expected and what came.

The public functions make them before a backend is chosen, so that all backends refuse the same arguments in the same
words. What passes here every backend computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | str | tuple[int, ...]], why: str = "") -> None:
    """Raise ValueError unless ``tensor`` has the expected shape.

    Each entry is the size wanted, a tuple of sizes allowed, or a letter for any size.
    """
    fits = tensor.ndim == len(expected) and all(
        isinstance(want, str) or size in (want if isinstance(want, tuple) else (want,))
        for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        shown = ", ".join(
            " or ".join(map(str, dict.fromkeys(want))) if isinstance(want, tuple) else str(want) for want in expected
        )
        raise ValueError(f"{name} must be [{shown}]{why and f' ({why})'}, got {list(tensor.shape)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the dtype and device of ``other``."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {other.dtype} on {other.device} like {other_name}, got {tensor.dtype} on {tensor.device}"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` holds real floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_images(name: str, images: Tensor, *, channels: str = "C", pool: bool = False, padding: int = 0) -> None:
    """Raise ValueError unless ``images`` are ``[T, S, C, H, W]``, floating point, and empty in T at most.

    Args:
        name: of the argument.
        images: the argument.
        channels: what the message calls the third axis.
        pool: whether they will be pooled, 2x2 with ``padding``: something must be left.
        padding: of the pool.
    """
    check_shape(name, images, ["T", "S", channels, "H", "W"])
    check_floating(name, images)
    got = list(images.shape)
    if not all(got[1:]):
        raise ValueError(f"{name} must be [T, S, {channels}, H, W], of which T alone may be 0, got {got}")
    if pool and min(got[3:]) + 2 * padding < 2:
        raise ValueError(f"{name} must have H and W of at least 2 to be pooled, got {got}")


def check_slope(slope: float) -> None:
    """Raise ValueError unless ``slope`` can be LeakyReLU's."""
    if not 0 <= slope < math.inf:
        raise ValueError(f"slope must be finite and not negative (pooling comes before the activation), got {slope}")


def check_weights(weights: Sequence[Tensor], tasks: int) -> None:
    """Raise ValueError unless ``weights`` are floating-point tensors ``[T or 1, ...]``, one or more, each with values.

    Args:
        weights: the argument, one tensor a layer.
        tasks: T.
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor, got none")
    check_floating("weights[0]", weights[0])
    for layer, weight in enumerate(weights):
        name = f"weights[{layer}]"
        check_shape(name, weight, [(tasks, 1), *weight.shape[1:]], "T or 1, then the layer's own shape")
        check_like(name, weight, "weights[0]", weights[0])
        if not all(weight.shape[1:]):
            raise ValueError(f"{name} must hold at least one value a task, got {list(weight.shape)}")
