"""Arguments at the edge of what the operators take, and what every backend must answer to them.

As a program (with TRITON_INTERPRET=1) it prints one JSON object: Triton's answers, by the names of ``EDGES``.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels import (
    conv_block,
    linear_cross_entropy,
    normalize_weights,
    patch_statistics,
    residual_end,
    scale_weights,
    use_backend,
)

Operator = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Edge:
    """One call.

    Attributes:
        name: unique, begins with the operator's.
        operator: takes the tensors, returns all outputs.
        tensors: makes the arguments in float32, those to differentiate in first.
        leaves: how many of them.
        refused: what it is refused with; empty where it is computed.
        second: whether second derivatives are compared.
        absolute: error that is allowed beside a relative one.
    """

    name: str
    operator: Operator
    tensors: Callable[[], list[Tensor]]
    leaves: int
    refused: str
    second: bool = False
    absolute: float = 1e-6


def answer(edge: Edge, backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Any] | str:
    """Outputs, first and second derivatives as shapes and flat lists of numbers; or the one line of a ValueError."""
    tensors = [_placed(tensor, dtype, device) for tensor in edge.tensors()]
    leaves = [tensor.requires_grad_() for tensor in tensors[: edge.leaves]]
    try:
        with use_backend(backend):
            outputs = edge.operator(*tensors)
            found = [*outputs]
            if leaves:
                ready = [output for output in outputs if output.requires_grad]
                first = torch.autograd.grad(ready, leaves, [_cotangent(output) for output in ready], create_graph=True)
                found += first
                if edge.second:
                    sent = [_cotangent(gradient) for gradient in first]
                    found += torch.autograd.grad(first, leaves, sent, allow_unused=True, materialize_grads=True)
    except ValueError as error:
        return str(error)
    return [[list(tensor.shape), str(tensor.dtype), tensor.detach().flatten().tolist()] for tensor in found]


def _placed(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    tensor = tensor.to(dtype) if tensor.dtype == torch.float32 else tensor.clone()
    return tensor if tensor.is_meta else tensor.to(device)


def _cotangent(like: Tensor) -> Tensor:
    drawn = torch.randn(like.shape, generator=torch.Generator().manual_seed(like.numel()))
    return drawn.to(like.device, like.dtype)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the table ---

EDGES: list[Edge] = []


def _block(
    name: str,
    *,
    x: tuple[int, ...] = (2, 2, 2, 4, 4),
    out: int = 3,
    affine: int | None = None,
    eps: float | None = None,
    dtype: torch.dtype = torch.float32,
    first_layer: str = "",
    refused: str = "",
    **options: Any,
) -> None:
    tasks, channels = x[0], x[2]
    options = {"slope": 0.1, "pool": True} | options
    length = 9 * channels

    def operator(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, images = tensors if first_layer else (*tensors[1:], tensors[0])
        last = eps if eps is not None else leaves.pop()
        more = dict(options)
        if first_layer:
            mean = torch.zeros(tasks, length, dtype=torch.float64, device=images.device)
            covariance = torch.eye(length, dtype=torch.float64, device=images.device).expand(tasks, -1, -1)
            more["patch_statistics"] = (mean.requires_grad_(first_layer == "requires_grad"), covariance)
            if first_layer == "elsewhere":
                more["patch_statistics"] = (mean.to("meta"), covariance.to("meta"))
        if "statistics" in more:
            more["statistics"] = (leaves[2] * 0, leaves[2].square() + 1)
        found = conv_block(images, *leaves, last, **more)
        return (found[0], *found[1]) if isinstance(found, tuple) else (found,)

    def tensors() -> list[Tensor]:
        rows = tasks if affine is None else affine
        found = [_draw(tasks, out, channels, 3, 3), _draw(rows, out, seed=1), _draw(rows, out, seed=2)]
        found += [_draw(tasks, seed=3).square() + 0.1] if eps is None else []
        images = _draw(*x, seed=4)
        found = [*found, images] if first_layer else [images, *found]
        return [tensor.to(dtype) for tensor in found]

    leaves = 0 if refused else (4 if eps is None else 3) + (not first_layer)
    EDGES.append(Edge(f"conv_block-{name}", operator, tensors, leaves, refused, second=True))


def _edges_of_blocks() -> None:
    smaller = "x must have H and W of at least 2 to be pooled, got {}"
    for name, size in (("pixel", (1, 1)), ("row", (1, 4)), ("column", (4, 1))):
        shape = (1, 2, 2, *size)
        _block(f"pool_of_a_{name}", x=shape, refused=smaller.format(list(shape)))
        _block(f"pool_of_a_{name}_number", x=shape, eps=0.1, refused=smaller.format(list(shape)))
    _block("pool_of_a_pixel_group", x=(1, 2, 2, 1, 1), norm="group", refused=smaller.format([1, 2, 2, 1, 1]))
    _block("pool_of_a_pixel_first", x=(1, 2, 2, 1, 1), first_layer="yes", refused=smaller.format([1, 2, 2, 1, 1]))
    _block("pool_of_a_pixel_no_task", x=(0, 2, 2, 1, 1), refused=smaller.format([0, 2, 2, 1, 1]))
    nothing = "x must be [T, S, Cin, H, W], of which T alone may be 0, got {}"
    shape = (2, 0, 2, 4, 4)
    _block("no_image", x=shape, refused=nothing.format(list(shape)))
    _block("no_image_number", x=shape, eps=0.1, pool=False, refused=nothing.format(list(shape)))
    _block("no_image_group", x=shape, norm="group", refused=nothing.format(list(shape)))
    _block("no_image_given", x=shape, statistics=True, refused=nothing.format(list(shape)))
    _block("no_image_first", x=shape, first_layer="yes", refused=nothing.format(list(shape)))
    _block("no_image_no_task", x=(0, 0, 2, 4, 4), refused=nothing.format([0, 0, 2, 4, 4]))
    _block("no_channel", x=(1, 2, 0, 4, 4), refused=nothing.format([1, 2, 0, 4, 4]))
    _block("no_row", x=(1, 2, 2, 0, 4), pool=False, refused=nothing.format([1, 2, 2, 0, 4]))
    _block("no_filter", out=0, refused="weight must have at least one output channel, got [2, 0, 2, 3, 3]")
    for dtype in (torch.int64, torch.complex64, torch.bool):
        _block(f"{dtype}", dtype=dtype, eps=0.1, refused=f"x must be floating point, got {dtype}")
    for slope in (-0.1, math.nan, math.inf):
        message = f"slope must be finite and not negative (pooling comes before the activation), got {slope}"
        _block(f"slope_{slope}", slope=slope, refused=message)
    constant = "patch statistics must not require a gradient: they are constants of an image set"
    _block("patches_with_gradient", first_layer="requires_grad", refused=constant)
    _block(
        "patches_elsewhere",
        first_layer="elsewhere",
        refused="patch statistics must be on {device} like x, got meta and meta",
    )
    _block("no_task", x=(0, 2, 2, 4, 4))
    _block("no_task_statistics", x=(0, 2, 2, 4, 4), return_statistics=True)
    _block("no_task_shared_affine", x=(0, 2, 2, 4, 4), affine=1, pool=False)
    _block("no_task_number", x=(0, 2, 2, 4, 4), affine=1, eps=0.1)
    _block("no_task_first", x=(0, 2, 2, 4, 4), first_layer="yes")
    _block("no_task_group", x=(0, 2, 2, 4, 4), norm="group")
    _block("one_value", x=(1, 1, 2, 1, 1), pool=False, return_statistics=True)
    _block("one_value_number", x=(2, 1, 2, 1, 1), pool=False, eps=0.1)
    _block("one_image", x=(2, 1, 2, 2, 2), eps=0.1)


def _edges_of_images() -> None:
    nothing = "x must be [T, S, C, H, W], of which T alone may be 0, got {}"
    empty = {
        "image": (2, 0, 1, 3, 3),
        "channel": (1, 2, 0, 3, 3),
        "row": (1, 2, 1, 0, 3),
        "image_no_task": (0, 0, 1, 3, 3),
    }

    def statistics(name: str, shape: tuple[int, ...], refused: str = "", dtype: torch.dtype = torch.float32) -> None:
        EDGES.append(Edge(f"patch_statistics-{name}", patch_statistics, lambda: [_draw(*shape).to(dtype)], 0, refused))

    def end(
        name: str, shape: tuple[int, ...], refused: str = "", dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        options = {"slope": 0.1, "pool": True} | options

        def operator(*pair: Tensor) -> tuple[Tensor, ...]:
            return (residual_end(*pair, **options),)

        def tensors() -> list[Tensor]:
            return [_draw(*shape, seed=seed).to(dtype) for seed in range(2)]

        EDGES.append(Edge(f"residual_end-{name}", operator, tensors, 0 if refused else 2, refused))

    for name, shape in empty.items():
        statistics(f"no_{name}", shape, nothing.format(list(shape)))
        end(f"no_{name}", shape, nothing.format(list(shape)))
        end(f"no_{name}_padded", shape, nothing.format(list(shape)), padding=1)
        end(f"no_{name}_no_pool", shape, nothing.format(list(shape)), pool=False)
    for dtype in (torch.int64, torch.complex64):
        statistics(f"{dtype}", (1, 2, 1, 3, 3), f"x must be floating point, got {dtype}", dtype)
        end(f"{dtype}", (1, 2, 1, 3, 3), f"x must be floating point, got {dtype}", dtype)
    statistics("no_task", (0, 2, 1, 3, 3))
    statistics("pixel", (2, 1, 2, 1, 1))
    for size in ((1, 1), (1, 4), (4, 1)):
        shape = (1, 2, 2, *size)
        end(f"pool_of_{size}", shape, f"x must have H and W of at least 2 to be pooled, got {list(shape)}")
        end(f"padded_pool_of_{size}", shape, padding=1)
    end("padding_2", (1, 2, 2, 4, 4), "padding must be 0 or 1, got 2", padding=2)
    end("padding_half", (1, 2, 2, 4, 4), "padding must be 0 or 1, got 0.5", padding=0.5)
    for slope in (-0.1, math.nan, math.inf):
        message = f"slope must be finite and not negative (pooling comes before the activation), got {slope}"
        end(f"slope_{slope}", (1, 2, 2, 4, 4), message, slope=slope)
    end("no_task", (0, 2, 2, 4, 4))
    end("no_task_padded", (0, 2, 2, 1, 1), padding=1)
    end("no_task_no_pool", (0, 2, 2, 1, 1), pool=False)
    end("padding_without_pool", (1, 2, 2, 2, 2), pool=False, padding=1)


def _edges_of_weights() -> None:
    def normalize(*weights: Tensor) -> tuple[Tensor, ...]:
        units, norms = normalize_weights(weights)
        return *units, norms

    def scale(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(scale_weights(tensors[:-1], tensors[-1]))

    def both(
        name: str,
        tasks: int,
        make: Callable[[], list[Tensor]],
        refused: str = "",
        derivatives: bool = True,
        **more: Any,
    ) -> None:
        count = len(make())
        leaves = 0 if refused or not derivatives else count
        EDGES.append(Edge(f"normalize_weights-{name}", normalize, make, leaves, refused, **more))

        def with_gammas() -> list[Tensor]:
            weights = make()
            gammas = _draw(tasks, count, seed=5).square() + 0.1
            return [*weights, gammas.to(weights[0].dtype) if weights else gammas]

        EDGES.append(Edge(f"scale_weights-{name}", scale, with_gammas, leaves and leaves + 1, refused, **more))

    both("none", 2, list, "weights must hold at least one tensor, got none")
    both("none_no_task", 0, list, "weights must hold at least one tensor, got none")
    both(
        "a_number",
        1,
        lambda: [torch.tensor(1.0)],
        "weights[0] must be [1] (T or 1, then the layer's own shape), got []",
    )
    hollow = "weights[1] must hold at least one value a task, got [2, 0]"
    both("without_values", 2, lambda: [_draw(2, 3), _draw(2, 0)], hollow)
    both("without_values_no_task", 0, lambda: [_draw(0, 3), _draw(0, 0)], hollow.replace("[2, 0]", "[0, 0]"))
    for dtype in (torch.int64, torch.complex64):
        both(
            f"{dtype}",
            2,
            lambda dtype=dtype: [_draw(2, 3).to(dtype)],
            f"weights[0] must be floating point, got {dtype}",
        )
    both("no_task", 0, lambda: [_draw(0, 3), _draw(0, 2)], second=True)
    both("no_task_but_a_shared_weight", 0, lambda: [_draw(1, 3), _draw(0, 2)], second=True)
    both("one_value", 2, lambda: [_draw(2), _draw(2, 3)])
    # squares of float32 numbers underflow below 1e-23 and overflow above 1e19; relative errors alone
    for size in (1e-35, 1e-25, 1e-20, 1e20, 1e37):
        both(f"{size:.0e}", 2, lambda size=size: [_draw(2, 5) * size, _draw(2, 3)], absolute=0.0)
    for size in (1e-44, 1e-40):  # the gradients are beyond float32
        both(f"{size:.0e}", 2, lambda size=size: [_draw(2, 5) * size], derivatives=False, absolute=0.0)
    both("shared_1e-25", 3, lambda: [_draw(1, 5) * 1e-25, _draw(3, 2)], absolute=0.0)
    both("zeros", 2, lambda: [torch.zeros(2, 3), _draw(2, 3)])


def _edges_of_heads() -> None:
    def head(
        name: str, shape: tuple[int, ...], ways: int = 3, refused: str = "", dtype: torch.dtype = torch.float32
    ) -> None:
        def operator(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            labels = torch.arange(x.shape[1], device=x.device).remainder(max(ways, 1)).expand(len(x), x.shape[1])
            return linear_cross_entropy(x, weight, bias, labels)

        def tensors() -> list[Tensor]:
            features = math.prod(shape[2:])
            drawn = _draw(*shape), _draw(shape[0], ways, features, seed=1), _draw(shape[0], ways, seed=2)
            return [tensor.to(dtype) for tensor in drawn]

        leaves = 0 if refused else 3
        EDGES.append(Edge(f"linear_cross_entropy-{name}", operator, tensors, leaves, refused, second=not refused))

    nothing = "x must be [T, S, ...], of which T alone may be 0, got {}"
    for name, shape in {"image": (2, 0, 4), "feature": (2, 3, 0), "row": (2, 3, 2, 0, 4), "axis": (2, 3)}.items():
        head(f"no_{name}", shape, refused=nothing.format(list(shape)))
    head("no_class", (2, 3, 4), ways=0, refused="weight must have at least one output, got [2, 0, 4]")
    for dtype in (torch.int64, torch.complex64):
        head(f"{dtype}", (2, 3, 4), refused=f"x must be floating point, got {dtype}", dtype=dtype)
    head("no_task", (0, 3, 4))
    head("no_task_images", (0, 3, 2, 2, 2))
    head("one_number", (1, 1, 1), ways=1)
    head("many_axes", (2, 3, 2, 1, 2, 1, 3))


_edges_of_blocks()
_edges_of_heads()
_edges_of_images()
_edges_of_weights()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of overflows that are expected
    print(json.dumps({edge.name: answer(edge, "triton") for edge in EDGES}))
