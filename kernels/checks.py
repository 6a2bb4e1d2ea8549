"""Checks at the door of the operators: every message has the argument's name, what was expected and what came."""

from __future__ import annotations

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
        shown = ", ".join(" or ".join(map(str, want)) if isinstance(want, tuple) else str(want) for want in expected)
        raise ValueError(f"{name} must be [{shown}]{why and f' ({why})'}, got {list(tensor.shape)}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the dtype and device of ``other``."""
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {other.dtype} on {other.device} like {other_name}, got {tensor.dtype} on {tensor.device}"
        )
