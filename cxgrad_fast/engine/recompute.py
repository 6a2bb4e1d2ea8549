"""Inner steps that are computed again in the backward pass instead of being remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor

# (inputs, whether to keep a graph) -> outputs
Step = Callable[[Sequence[Tensor], bool], Sequence[Tensor]]


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        # backend and precision are context variables; autograd's thread for a CUDA device has none of them
        ctx.variables = copy_context()
        ctx.save_for_backward(*inputs)
        with torch.enable_grad():
            outputs = step([tensor.detach() for tensor in inputs], False)
        return tuple(tensor.detach() for tensor in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.variables.copy().run(ctx.step, inputs, True)  # a copy may run while another does
        attached = [(out, cot) for out, cot in zip(outputs, cotangents, strict=True) if out.requires_grad]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = iter(
            torch.autograd.grad([out for out, _ in attached], wanted, [cot for _, cot in attached], allow_unused=True)
        )
        return None, *(next(gradients) if need else None for need in needed)


def recomputed(step: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``step(inputs)``, holding only its inputs until its gradient is asked for.

    Costs one more run of the step, on the backend and in the precision of the first run, whatever thread asks for the
    gradient. The outputs are differentiable once, which is all a meta-gradient needs: the inner gradients are inside
    the step.
    """
    return _Recomputed.apply(step, *inputs)
