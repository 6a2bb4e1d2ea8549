"""The operators' cases: one table that tests and benches run through, each with the reason why it stands in it.

Small cases are compared with float64 everywhere, ``large`` ones are the production shapes that are timed. What is done
with a case is in :mod:`cxgrad_fast.kernels.case_calls`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.kernels.patch_statistics import reference as patches

OPERATORS = (
    "conv_block",
    "scale_weights",
    "normalize_weights",
    "patch_statistics",
    "residual_end",
    "scaling_factors",
    "linear_cross_entropy",
    "gradient_step",
)


@dataclass(frozen=True)
class Case:
    """One call of one operator.

    Attributes:
        operator: its public name.
        name: unique in the table.
        reason: why it stands in it.
        large: a production shape, timed; otherwise small.
        tasks, images, channels, out, height, width, kernel: T, S, Cin, Cout, H, W, k.
        slope, pool, padding, norm, groups: the operator's own options.
        first_layer: with patch statistics, images that require no gradient.
        eps: of the norm: about this, one a task and differentiable.
        number_eps: one plain number instead.
        shared_affine: scale and bias are ``[1, Cout]``; a linear layer's weight and bias are expanded over the tasks.
        given: normalise with given statistics.
        layout: of x in memory: contiguous, channels_last, image_major (``[S, T, ...]`` turned), strided (every second
            column of a wider tensor).
        content: normal; ties (small whole numbers: windows tie in every precision); flat (the right half of an image
            is constant); smooth (smooth images under high-pass filters: a variance a thousandth of the images'); dead
            (one filter is zero: no variance); zero_context; spread_factors (from 0.05 to 25).
        context, hidden, layers, least: of the scaler: D, H, L, and the least factor.
        rates: rows of the rates of a gradient step: 0 for a number, 1 for all tasks, 2 for one a task.
        factors, divisors: columns of them, 0 for none.
        weights: shapes behind the task axis, of the operators on weights; the first tensor is shared by all tasks where
            ``shared_affine``.
    """

    operator: str
    name: str
    reason: str
    large: bool = False
    tasks: int = 2
    images: int = 3
    channels: int = 3
    out: int = 4
    height: int = 8
    width: int = 8
    kernel: int = 3
    slope: float | None = 0.01
    pool: bool = True
    padding: int = 0
    norm: str = "batch"
    groups: int = 1
    first_layer: bool = False
    eps: float = 1e-3
    number_eps: bool = False
    shared_affine: bool = False
    given: bool = False
    layout: str = "contiguous"
    content: str = "normal"
    context: int = 5
    hidden: int = 7
    layers: int = 3
    least: float = 0.0
    rates: int = 0
    factors: int = 0
    divisors: int = 0
    weights: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Inputs:
    """Arguments of a case's call: tensors to differentiate in, by name, and the rest."""

    tensors: dict[str, Tensor]
    constants: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another precision; what is float64 whatever the call's precision stays."""
        tensors = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.tensors.items()}
        constants = dict(self.constants)
        for name, value in constants.items():
            if name not in ("patch_statistics", "labels") and isinstance(value, Tensor):
                constants[name] = value.to(dtype)
            elif name == "statistics" and value is not None:
                constants[name] = tuple(part.to(dtype) for part in value)
        return Inputs(tensors, constants)


def inputs(case: Case, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """The case's tensors, drawn in float32 so that every precision from there on gets the same values."""
    draw = _Draw(dtype, torch.device(device), torch.Generator().manual_seed(seed))
    if case.operator in ("scale_weights", "normalize_weights"):
        tensors = {
            f"weights.{index}": draw(1 if case.shared_affine and index == 0 else case.tasks, *shape)
            for index, shape in enumerate(case.weights)
        }
        if case.operator == "scale_weights":
            tensors["gammas"] = draw(case.tasks, len(case.weights)).mul_(0.3).exp_()
        return Inputs(_leaves(tensors), {})
    if case.operator == "scaling_factors":
        return _scaler_inputs(case, draw)
    if case.operator == "gradient_step":
        return _gradient_step_inputs(case, draw)
    x = _laid_out(case, _images(case, draw))
    if case.operator == "patch_statistics":
        return Inputs({}, {"x": x})
    if case.operator == "residual_end":
        options = {"slope": case.slope, "pool": case.pool, "padding": case.padding}
        return Inputs(_leaves({"x": x, "shortcut": _laid_out(case, _images(case, draw))}), options)
    if case.operator == "linear_cross_entropy":
        return _linear_cross_entropy_inputs(case, x, draw)
    return _conv_block_inputs(case, x, draw)


class _Draw:
    """Normal numbers in a precision on a device, from one stream."""

    def __init__(self, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
        self.dtype, self.device, self.generator = dtype, device, generator

    def __call__(self, *shape: int) -> Tensor:
        return self.place(torch.randn(shape, generator=self.generator))

    def whole(self, *shape: int) -> Tensor:
        """-1, 0 or 1."""
        return self.place(torch.randint(-1, 2, shape, generator=self.generator).float())

    def place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


def _images(case: Case, draw: _Draw) -> Tensor:
    shape = (case.tasks, case.images, case.channels, case.height, case.width)
    if case.content == "ties":
        return draw.whole(*shape)
    if case.content == "smooth":
        rows, columns = torch.arange(case.height) / case.height, torch.arange(case.width) / case.width
        ramp = torch.sin(3 * rows)[:, None] + torch.cos(2 * columns)
        return draw.place(1 + ramp + 1e-3 * torch.randn(shape, generator=draw.generator))
    x = draw(*shape)
    if case.content == "flat":
        x[..., case.width // 2 :] = 0.7
    return x


def _laid_out(case: Case, x: Tensor) -> Tensor:
    """The same values in the memory layout of the case."""
    if case.layout == "channels_last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if case.layout == "image_major":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if case.layout == "strided":
        wide = x.new_full((*x.shape[:-1], 2 * case.width), float("nan"))
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def _conv_block_inputs(case: Case, x: Tensor, draw: _Draw) -> Inputs:
    shape = (case.tasks, case.out, case.channels, case.kernel, case.kernel)
    weight = draw.whole(*shape) if case.content == "ties" else draw(*shape) / (shape[2] * shape[3] ** 2) ** 0.5
    if case.content == "smooth":
        weight = weight - weight.mean((3, 4), keepdim=True)
    if case.content == "dead":
        weight[:, 0] = 0
    affine = 1 if case.shared_affine else case.tasks
    tensors = {"x": x, "weight": weight, "scale": draw(affine, case.out) + 0.5, "bias": draw(affine, case.out)}
    constants: dict[str, Any] = {"slope": case.slope, "pool": case.pool, "norm": case.norm, "groups": case.groups}
    if case.number_eps:
        constants["eps"] = case.eps
    else:
        tensors["eps"] = draw(case.tasks).exp_() * case.eps
    if case.given:
        constants["statistics"] = (draw(case.tasks, case.out), draw(case.tasks, case.out).square_() + 0.1)
    if case.first_layer:
        constants["x"] = tensors.pop("x")
        constants["patch_statistics"] = patches.patch_statistics(x)
    return Inputs(_leaves(tensors), constants)


def _scaler_inputs(case: Case, draw: _Draw) -> Inputs:
    tensors = {
        "context": draw(case.tasks, case.context),
        "w0": draw(case.hidden, case.context) / case.context**0.5,
        "b0": draw(case.hidden),
        "w2": draw(case.layers, case.hidden) / case.hidden**0.5,
        "b2": draw(case.layers),
    }
    if case.content == "zero_context":
        tensors["context"].zero_()
    if case.content == "spread_factors":
        tensors["b2"][0], tensors["b2"][1] = -3, 25
    return Inputs(_leaves(tensors), {"norm_eps": case.eps, "least": case.least})


def _gradient_step_inputs(case: Case, draw: _Draw) -> Inputs:
    tensors = {
        f"{kind}.{index}": draw(1 if shared and index == 0 else case.tasks, *shape)
        for kind, shared in (("weights", case.shared_affine), ("gradients", False))
        for index, shape in enumerate(case.weights)
    }
    columns = {"rates": len(case.weights), "factors": case.factors, "divisors": case.divisors}
    rows = {"rates": 1 if case.rates == 1 else case.tasks, "factors": case.tasks, "divisors": case.tasks}
    there = {"rates": case.rates, "factors": case.factors, "divisors": case.divisors}
    tensors |= {name: draw(rows[name], columns[name]).mul_(0.3).exp_() for name, is_there in there.items() if is_there}
    return Inputs(_leaves(tensors), {} if case.rates else {"rates": 0.1})


def _linear_cross_entropy_inputs(case: Case, x: Tensor, draw: _Draw) -> Inputs:
    """All of x's features are the layer's inputs, ``out`` are the classes."""
    own, features = 1 if case.shared_affine else case.tasks, case.channels * case.height * case.width
    tensors = {"x": x, "weight": draw(own, case.out, features) / features**0.5, "bias": draw(own, case.out)}
    labels = torch.randint(case.out, (case.tasks, case.images), generator=draw.generator)
    return Inputs(_leaves(tensors), {"labels": labels.to(x.device)})


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


CONV4 = ((48, 3, 3, 3), (48, 48, 3, 3), (48, 48, 3, 3), (48, 48, 3, 3))
RESNET12 = tuple(
    (64 << block, (3, 64, 128, 256)[block] if conv == 0 else 64 << block, 3, 3)
    for block in range(4)
    for conv in range(3)
)


def _conv_block_cases() -> Iterator[Case]:
    def small(name: str, reason: str, **options: Any) -> Case:
        return Case("conv_block", name, reason, **options)

    yield small("plain", "the usual block, for comparison with the rest")
    yield small("one_task", "the task axis must not be squeezed", tasks=1)
    yield small("one_image", "statistics of a single image", images=1)
    yield small("one_channel", "grey images, one filter: no vector to load", channels=1, out=1)
    yield small("48_channels", "not a power of two", channels=48, out=48, height=5, width=5)
    yield small("64_channels", "a power of two, more than one tile", channels=64, out=64, height=5, width=5)
    yield small("odd_size", "21x9 pools to 10x4: the rest only counts in the statistics", height=21, width=9)
    yield small("smallest", "2x2: one window, and every patch hangs over the border", height=2, width=2, images=4)
    yield small("one_pixel", "the centre tap alone; statistics over images", height=1, width=1, pool=False)
    yield small("no_pool", "the blocks of ResNet-12", pool=False)
    yield small("no_activation", "its shortcuts and third convolutions", pool=False, slope=None)
    yield small("no_activation_pool", "pool straight behind the norm", slope=None)
    yield small("relu", "slope 0: half of the gradient is exactly zero", slope=0.0)
    yield small("slope_one", "LeakyReLU of slope 1 is no activation", slope=1.0)
    yield small("pointwise", "the 1x1 shortcut", kernel=1, pool=False, slope=None)
    yield small("pointwise_pool", "1x1 with every stage behind it", kernel=1, height=7)
    yield small("channels_last", "images as decoders and the reference lay them out", layout="channels_last")
    yield small("image_major", "what a chain of reference blocks hands on", layout="image_major")
    yield small("strided", "a slice of a wider tensor, NaN between its columns", layout="strided")
    yield small("shared_affine", "norms are meta-learned: one for all tasks", shared_affine=True)
    yield small("number_eps", "one constant epsilon, the query pass", number_eps=True)
    yield small("production_eps", "dL/deps where epsilon is 1e-5", eps=1e-5)
    yield small("group_norm", "statistics of an image's channel groups", norm="group", groups=2)
    yield small("layer_norm", "one group", norm="group", groups=1, pool=False)
    yield small("given_statistics", "evaluation with statistics of the support set", given=True)
    yield small("ties", "windows tie: the first position in row-major order gets the gradient", content="ties")
    yield small("dead_filter", "a filter of zeros: no variance, rsqrt(eps), every window ties", content="dead")
    yield small("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0)
    first = {"first_layer": True}
    yield small("first_layer", "statistics from the patches, sparse weight gradient", **first)
    yield small("first_layer_odd", "quarter products with a row and column left over", **first, height=7, width=9)
    yield small("first_layer_grey", "9 patch entries instead of 27", **first, channels=1, images=1, tasks=1)
    yield small("first_layer_48", "production filters", **first, out=48, height=12, width=10)
    yield small("first_layer_relu", "slope 0: the stored output does not tell z", **first, slope=0.0)
    yield small("first_layer_linear", "no activation before the pool", **first, slope=None)
    yield small("first_layer_flat", "flat backgrounds: windows of equal patches tie", **first, content="flat", width=16)
    yield small("first_layer_smooth", "float32 covariances lose this variance", **first, content="smooth", eps=1e-5)
    yield small("first_layer_strided", "images that are a slice", **first, layout="strided")
    yield from _conv4_layers("glyphs-32/5w1s", "preset glyphs-5w1s", 32, 28, tasks=2, images=5)
    yield from _conv4_layers("conv4-48/5w1s", "support set, released-mini-5w1s", 48, 84, tasks=4, images=5)
    yield from _conv4_layers("conv4-48/5w5s", "support set, released-mini-5w5s", 48, 84, tasks=2, images=25)
    yield from _conv4_layers("conv4-48/query", "query set, released-mini-5w5s", 48, 84, tasks=2, images=75)
    yield from _conv4_layers("conv4-64/5w5s", "the other customary width", 64, 84, tasks=2, images=25)
    yield from _resnet12_layers()


def _conv4_layers(name: str, reason: str, filters: int, size: int, tasks: int, images: int) -> Iterator[Case]:
    for layer in range(4):
        yield Case(
            "conv_block",
            f"{name}/layer{layer + 1}",
            f"layer {layer + 1} of Conv-4: {reason}",
            large=True,
            tasks=tasks,
            images=images,
            channels=filters if layer else 3,
            out=filters,
            height=size >> layer,
            width=size >> layer,
            first_layer=layer == 0,
            shared_affine=True,
            eps=1e-5,
        )


def _resnet12_layers() -> Iterator[Case]:
    base = Case("conv_block", "", "", large=True, images=5, pool=False, shared_affine=True, eps=1e-5)
    for block, size in enumerate((84, 42, 21, 10)):
        filters, before = 64 << block, 32 << block if block else 3
        name, where = f"resnet12-64/5w1s/block{block + 1}", f"block {block + 1} of ResNet-12"
        block_base = replace(base, out=filters, height=size, width=size)
        yield replace(block_base, name=f"{name}/first", reason=f"{where}, its first convolution", channels=before)
        yield replace(
            block_base, name=f"{name}/third", reason=f"{where}, before the addition", channels=filters, slope=None
        )
        yield replace(
            block_base,
            name=f"{name}/shortcut",
            reason=f"{where}, point-wise",
            channels=before,
            kernel=1,
            slope=None,
            number_eps=True,
        )


def _weight_cases(operator: str) -> Iterator[Case]:
    tiny = ((4, 3, 3, 3), (5, 4, 3, 3))
    yield Case(operator, "two_layers", "different sizes side by side", weights=tiny)
    yield Case(operator, "one_task_one_layer", "neither axis may be squeezed", tasks=1, weights=((1, 1, 3, 3),))
    yield Case(operator, "shared", "the first step: one weight for all tasks", shared_affine=True, weights=tiny)
    yield Case(operator, "odd_ranks", "any shape behind the task axis", tasks=3, weights=((7,), (2, 3), (48, 1, 1, 1)))
    yield Case(operator, "zero_tasks", "an empty shard of a distributed meta-batch", tasks=0, weights=tiny)
    glyphs = tuple((32, 3 if layer == 0 else 32, 3, 3) for layer in range(4))
    yield Case(operator, "glyphs-32/5w1s", "preset glyphs-5w1s", large=True, weights=glyphs)
    yield Case(operator, "conv4-48/5w1s", "Conv-4, four tasks", large=True, tasks=4, weights=CONV4)
    yield Case(operator, "resnet12-64/5w5s", "ResNet-12, twelve layers", large=True, tasks=2, weights=RESNET12)


def _gradient_step_cases() -> Iterator[Case]:
    three, cxgrad = ((4, 3, 3, 3), (5, 4), (7,)), {"factors": 2, "divisors": 2}

    def case(name: str, reason: str, **options: Any) -> Case:
        return Case("gradient_step", name, reason, **{"weights": three} | options)

    yield case("plain", "one rate for all")
    yield case("scaled", "CxGrad's: the first tensors have factors and divisors", **cxgrad)
    yield case("factors", "weight decay: factors without divisors", factors=3, rates=2)
    yield case("divisors", "of fewer tensors than there are, one rate each for all tasks", divisors=1, rates=1)
    yield case(
        "one_task_one_layer", "neither axis may be squeezed", tasks=1, weights=((1, 1, 3, 3),), factors=1, divisors=1
    )
    yield case("shared", "the first step: one weight for all tasks, without a copy", shared_affine=True, **cxgrad)
    yield case("long_rows", "more than one block of a row", weights=((5000,), (3, 1400)), rates=2, **cxgrad)
    yield case("17_layers", "more than one launch takes", weights=((3,),) * 17, factors=17, divisors=16)
    yield case("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0, **cxgrad)
    glyphs = (*((32, 3 if layer == 0 else 32, 3, 3) for layer in range(4)), (5, 32), (5,))
    yield case("glyphs-32/5w1s", "preset glyphs-5w1s", large=True, weights=glyphs, factors=4, divisors=4)
    conv4 = (*CONV4, (5, 1200), (5,))
    yield case("conv4-48/5w1s", "Conv-4, four tasks", large=True, tasks=4, weights=conv4, factors=4, divisors=4)


def _patch_statistics_cases() -> Iterator[Case]:
    def case(name: str, reason: str, **options: Any) -> Case:
        return Case("patch_statistics", name, reason, **options)

    yield case("plain", "the usual images")
    yield case("odd_size", "borders on all sides count as zeros", height=7, width=9)
    yield case("one_image_grey", "9 patch entries, one image", tasks=1, images=1, channels=1)
    yield case("one_pixel", "a patch that is nearly all border", height=1, width=1)
    yield case("many_images", "more than are summed at once", images=19)
    yield case("smooth", "a covariance far smaller than the squared mean", content="smooth")
    yield case("channels_last", "images as decoders lay them out", layout="channels_last")
    yield case("strided", "a slice of a wider tensor, NaN between its columns", layout="strided")
    yield case("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0)
    large = {"large": True, "height": 84, "width": 84}
    yield case("glyphs/5w1s", "preset glyphs-5w1s", large=True, images=5, height=28, width=28)
    yield case("84/5w1s", "released-mini-5w1s", **large, tasks=4, images=5)
    yield case("84/5w5s", "released-mini-5w5s", **large, images=25)


def _residual_end_cases() -> Iterator[Case]:
    def case(name: str, reason: str, **options: Any) -> Case:
        return Case("residual_end", name, reason, **options)

    yield case("plain", "add, activate, pool")
    yield case("odd_size", "a row and a column fall away", height=7, width=9)
    yield case("padded", "the released program's pool: border windows are smaller", height=7, width=9, padding=1)
    yield case("no_pool", "the last block of the released program", pool=False)
    yield case("relu", "slope 0", slope=0.0)
    yield case("one_task_one_channel", "no axis may be squeezed", tasks=1, images=1, channels=1)
    yield case("ties", "sums tie in a window: the first position gets the gradient", content="ties", slope=0.0)
    yield case("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0)
    yield case("image_major", "what conv_block hands on", layout="image_major")
    yield case("strided", "a slice of a wider tensor, NaN between its columns", layout="strided")
    small = {"images": 2, "height": 4, "width": 6}
    yield case("channels_last", "what conv_block in C++ hands on", layout="channels_last", **small)
    yield case("padded_even", "windows hang over all four borders", padding=1, **small)
    yield case("padded_row", "windows of a single position in a corner", height=1, width=5, padding=1)
    yield case("padded_ties", "padding never wins a tie; at 0 the gradient is the slope's", content="ties", padding=1)
    yield case("no_pool_odd", "a rest behind the last vector", pool=False, images=1, height=5, width=7)
    yield case("no_pool_ties", "sums of exactly 0 under ReLU", pool=False, content="ties", slope=0.0)
    yield case("17_channels", "one more than a vector", channels=17, tasks=1, images=1, height=2, width=3)
    yield case("steep", "a slope above 1: still monotone, so that pooling first is the same", slope=1.5, **small)
    for block, size in enumerate((84, 42, 21, 10)):
        yield case(
            f"resnet12-64/5w1s/block{block + 1}",
            f"block {block + 1} of ResNet-12",
            large=True,
            images=5,
            channels=64 << block,
            height=size,
            width=size,
        )


def _scaler_cases() -> Iterator[Case]:
    def case(name: str, reason: str, **options: Any) -> Case:
        return Case("scaling_factors", name, reason, **options)

    yield case("plain", "different sizes, two tasks")
    yield case("all_ones", "no axis may be squeezed", tasks=1, context=1, hidden=1, layers=1)
    yield case("zero_context", "every step starts there", content="zero_context")
    yield case("spread_factors", "softplus where it is exponential, and where it is linear", content="spread_factors")
    yield case("17_tasks", "more than a block of tasks, vectors with a rest", tasks=17, context=19, hidden=21, layers=9)
    yield case("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0)
    production = {"large": True, "context": 100, "hidden": 100, "eps": 1e-5, "least": 1e-11}
    yield case("glyphs-32/5w1s", "preset glyphs-5w1s", **production, layers=4)
    yield case("conv4-48/5w1s", "Conv-4, four tasks", **production, tasks=4, layers=4)
    yield case("resnet12-64/5w5s", "ResNet-12, twelve layers", **production, layers=12)


def _linear_cross_entropy_cases() -> Iterator[Case]:
    def case(name: str, reason: str, **options: Any) -> Case:
        return Case("linear_cross_entropy", name, reason, **{"height": 3, "width": 3} | options)

    five = {"images": 5, "out": 5}
    yield case("plain", "images of several channels, as conv_block hands them on")
    yield case("5w1s", "a support set: one image a class", **five, channels=8, height=1, width=1)
    yield case("5w5s", "more images than are one block", images=25, out=5, channels=8, height=1, width=1)
    yield case("one_image", "a mean over one", images=1)
    yield case("one_task", "the task axis must not be squeezed", tasks=1)
    yield case("2_ways", "fewer classes than a register block has", out=2)
    yield case("one_way", "a single class: no loss, and no gradient of it", out=1, height=1)
    yield case("20_ways", "more classes than a register block has", out=20, height=1)
    yield case("many_features", "more than are summed in one block", channels=1, height=3, width=363, images=2, out=2)
    yield case("expanded", "one weight for all tasks, without a copy", shared_affine=True)
    yield case("channels_last", "what conv_block hands on", layout="channels_last")
    yield case("image_major", "what a chain of reference blocks hands on", layout="image_major")
    yield case("strided", "a slice of a wider tensor, NaN between its columns", layout="strided")
    yield case("zero_tasks", "an empty shard of a distributed meta-batch", tasks=0)
    large = {"large": True, "out": 5, "shared_affine": True}
    glyphs = {"channels": 32, "height": 1, "width": 1}
    yield case("glyphs-32/5w1s", "preset glyphs-5w1s", **large, images=5, **glyphs)
    conv4 = {"channels": 48, "height": 5, "width": 5, "layout": "channels_last"}
    yield case("conv4-48/5w1s", "support set, released-mini-5w1s", **large, tasks=4, images=5, **conv4)
    yield case("conv4-48/query", "query set, released-mini-5w5s", **large, images=75, **conv4)


CASES: tuple[Case, ...] = (
    *_conv_block_cases(),
    *_weight_cases("scale_weights"),
    *_weight_cases("normalize_weights"),
    *_patch_statistics_cases(),
    *_residual_end_cases(),
    *_scaler_cases(),
    *_linear_cross_entropy_cases(),
    *_gradient_step_cases(),
)
