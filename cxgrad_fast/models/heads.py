"""Heads: what turns features into the scores of classes."""

from __future__ import annotations

from cxgrad_fast.models.network import HEAD, Parameter, constant


def linear_head(width: int, ways: int) -> dict[str, Parameter]:
    """Weight ``[N, D]`` and bias ``[N]`` of a linear layer named ``head``."""
    return {"head.weight": Parameter((ways, width), HEAD), "head.bias": Parameter((ways,), HEAD, constant(0.0))}
