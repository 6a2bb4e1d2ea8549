"""What tests and benches do with a case: its call, all its derivatives, its distance from where rounding decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.kernels import (
    conv_block,
    gradient_step,
    linear_cross_entropy,
    normalize_weights,
    patch_statistics,
    residual_end,
    scale_weights,
    scaling_factors,
)
from cxgrad_fast.kernels.cases import Case, Inputs


def call(case: Case, given: Inputs) -> tuple[Tensor, ...]:
    """The case's operator on its inputs: its outputs, all of them differentiable but patch statistics."""
    tensors, constants = given.tensors, given.constants
    arguments: dict[str, Any] = {**tensors, **constants}
    weights = [tensor for name, tensor in tensors.items() if name.startswith("weights.")]
    if case.operator == "scale_weights":
        return tuple(scale_weights(weights, tensors["gammas"]))
    if case.operator == "normalize_weights":
        units, norms = normalize_weights(weights)
        return *units, norms
    if case.operator == "patch_statistics":
        return tuple(patch_statistics(**arguments))
    if case.operator == "residual_end":
        return (residual_end(**arguments),)
    if case.operator == "scaling_factors":
        return tuple(scaling_factors(**arguments))
    if case.operator == "gradient_step":
        if case.shared_affine:
            weights[0] = weights[0].expand(case.tasks, *weights[0].shape[1:])
        gradients = [tensor for name, tensor in tensors.items() if name.startswith("gradients.")]
        numbers = {name: arguments[name] for name in ("rates", "factors", "divisors") if name in arguments}
        return tuple(gradient_step(weights, gradients, **numbers))
    if case.operator == "linear_cross_entropy":
        if case.shared_affine:
            shared = {name: tensors[name] for name in ("weight", "bias")}
            arguments |= {name: tensor.expand(case.tasks, *tensor.shape[1:]) for name, tensor in shared.items()}
        return linear_cross_entropy(**arguments)
    return (conv_block(**arguments),)


def derivatives(case: Case, given: Inputs, seed: int = 1) -> dict[str, Tensor]:
    """Outputs, first gradients under a random cotangent, and second ones under random cotangents of those.

    Names: ``output.0``; ``d.x``; ``dd.x``, and ``dd.cotangent.0`` for the gradient in the first one's cotangent.
    """
    outputs = call(case, given)
    results = {f"output.{index}": output.detach() for index, output in enumerate(outputs)}
    names, leaves = list(given.tensors), list(given.tensors.values())
    if not leaves:
        return results
    generator = torch.Generator().manual_seed(seed)
    cotangents = [cotangent.requires_grad_() for cotangent in like(outputs, generator)]
    first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
    results |= {f"d.{name}": gradient.detach() for name, gradient in zip(names, first, strict=True)}
    wanted = [*leaves, *cotangents]
    names += [f"cotangent.{index}" for index in range(len(cotangents))]
    second = torch.autograd.grad(first, wanted, like(first, generator), allow_unused=True, materialize_grads=True)
    return results | {f"dd.{name}": gradient for name, gradient in zip(names, second, strict=True)}


def like(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Random tensors with the shapes, precision and device of others."""
    return [torch.randn(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) for tensor in tensors]


def margin(case: Case, given: Inputs) -> float:
    """Distance, in float64, of the case from where rounding decides: |z| at the kink, the two largest of a window.

    The scaler's is that of its hidden layer from relu's kink.

    Below about 1e-4 two correct float32 results may differ by whole gradient entries.
    """
    if case.operator not in ("conv_block", "residual_end", "scaling_factors") or not case.tasks:
        return float("inf")
    exact = given.to(torch.float64)
    if case.operator == "scaling_factors":
        return float(F.linear(*(exact.tensors[name].detach() for name in ("context", "w0", "b0"))).abs().min())
    options: dict[str, Any] = {"slope": None if case.operator == "conv_block" else 1.0, "pool": False}
    constants = {name: value for name, value in exact.constants.items() if name not in ("patch_statistics", "padding")}
    with torch.no_grad():
        (z,) = call(case, Inputs(exact.tensors, constants | options))
    distances = [] if case.slope is None else [z.abs().min().item()]
    if case.pool:
        flat = F.pad(z.flatten(0, 2), [case.padding] * 4, value=float("-inf"))
        windows = flat.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
        top = windows.topk(2, dim=3).values
        distances.append((top[..., 0] - top[..., 1]).min().item())
    return min(distances, default=float("inf"))
