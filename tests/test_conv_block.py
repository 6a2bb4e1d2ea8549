"""conv_block against the framework's own layers, one task at a time: the definition, and what stands in for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, require_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cxgrad_fast.kernels import conv_block, patch_statistics, use_backend

SHAPES = {  # T, S, Cin, Cout, H, W, k
    "one_task": (1, 2, 3, 4, 6, 6, 3),
    "odd_size": (2, 3, 2, 5, 7, 9, 3),
    "one_channel": (3, 2, 1, 1, 5, 4, 3),
    "pointwise": (2, 2, 3, 4, 6, 5, 1),
    "48_channels": (2, 2, 48, 48, 5, 5, 3),
    "one_image": (2, 1, 3, 3, 4, 4, 3),
}


@pytest.fixture(autouse=True, params=["reference", "cpp"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "cpp":
        require_cpp()
    with use_backend(request.param):
        yield


def inputs(shape: tuple[int, ...], seed: int = 0, shared_affine: bool = False) -> list[Tensor]:
    """x, weight, scale, bias, eps: float64, all requiring gradients, scales of both signs."""
    tasks, images, channels, out, height, width, size = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g).double()

    affine = 1 if shared_affine else tasks
    tensors = [
        draw(tasks, images, channels, height, width),
        draw(tasks, out, channels, size, size),
        draw(affine, out),
        draw(affine, out),
        draw(tasks).square() * 0.1 + 1e-3,
    ]
    return [tensor.requires_grad_() for tensor in tensors]


def framework(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor, slope: float | None, pool: bool, norm: Any
) -> Tensor:
    """The same from the framework's layers, activation before pooling, one task at a time."""
    outputs = []
    for task in range(len(x)):
        y = F.conv2d(x[task], weight[task], padding=weight.shape[3] // 2)
        g, b = (p[task if len(p) > 1 else 0] for p in (scale, bias))
        # an epsilon that carries a gradient: normalise (y, sqrt(eps) noise) by hand
        if norm == "batch":
            centred = y - y.mean((0, 2, 3), keepdim=True)
            variance = centred.square().mean((0, 2, 3), keepdim=True)
        else:
            groups = y.unflatten(1, (norm, -1))
            centred = (groups - groups.mean((2, 3, 4), keepdim=True)).flatten(1, 2)
            variance = centred.unflatten(1, (norm, -1)).square().mean((2, 3, 4), keepdim=True)
            variance = variance.expand(-1, -1, y.shape[1] // norm, 1, 1).flatten(1, 2)
        z = centred / (variance + eps[task]).sqrt() * g[:, None, None] + b[:, None, None]
        if slope is not None:
            z = torch.where(z > 0, z, slope * z)
        outputs.append(F.max_pool2d(z, 2) if pool else z)
    return torch.stack(outputs)


def second_order(
    output: Tensor, tensors: list[Tensor], laid_out: Callable[[Tensor], Tensor] = lambda cotangent: cotangent
) -> list[Tensor]:
    """First gradients under a random cotangent, then gradients of a random combination of those."""
    g = torch.Generator().manual_seed(9)
    cotangent = laid_out(torch.randn(output.shape, generator=g).double())
    first = torch.autograd.grad(output, tensors, cotangent, create_graph=True)
    mixed = sum((v * torch.randn(v.shape, generator=g).double()).sum() for v in first)
    second = torch.autograd.grad(mixed, tensors, allow_unused=True, materialize_grads=True)
    return [*first, *second]


@pytest.mark.parametrize("norm", ["batch", 1, "channels"])
@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.01, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_framework(shape: str, slope: float | None, pool: bool, norm: Any) -> None:
    tensors = inputs(SHAPES[shape], shared_affine=shape == "odd_size")
    groups = SHAPES[shape][3] if norm == "channels" else norm  # one channel a group is the other end
    options: dict[str, Any] = {} if norm == "batch" else {"norm": "group", "groups": groups}
    ours = conv_block(*tensors, slope=slope, pool=pool, **options)
    theirs = framework(*tensors, slope, pool, groups)
    assert relative_error(ours, theirs) < 1e-13
    for actual, expected in zip(second_order(ours, tensors), second_order(theirs, tensors), strict=True):
        assert relative_error(actual, expected) < 1e-10 or expected.norm() < 1e-10


def test_batch_norm_is_the_frameworks() -> None:
    x, weight, scale, bias, _ = inputs(SHAPES["odd_size"])
    ours = conv_block(x, weight, scale, bias, 1e-5, slope=0.01, pool=True)
    for task in range(len(x)):
        y = F.batch_norm(F.conv2d(x[task], weight[task], padding=1), None, None, scale[task], bias[task], True, 0, 1e-5)
        assert relative_error(ours[task], F.max_pool2d(F.leaky_relu(y, 0.01), 2)) < 1e-13


@pytest.mark.parametrize("slope", [0.01, 0.0])
def test_gradgradcheck(slope: float) -> None:
    """Numerical second derivatives, every input, eps among them; this seed is away from ties."""
    tensors = inputs((2, 2, 2, 2, 4, 4, 3), seed=3)
    assert torch.autograd.gradcheck(lambda *a: conv_block(*a, slope=slope, pool=True), tensors)
    assert torch.autograd.gradgradcheck(lambda *a: conv_block(*a, slope=slope, pool=True), tensors)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of [T, S, C, H, W], the values stay
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "image_major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "image_major_channels_last": lambda x: x.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2),
    "turned": lambda x: x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
    "slice": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], dim=-1)[..., 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("side", "pool"), [(1, False), (2, False), (2, True), (3, True)])
def test_finite_differences_of_one_image(side: int, pool: bool, layout: str) -> None:
    """First and second derivatives, under an epsilon that is a number; this seed is away from ties and kinks."""
    x, *rest, _ = inputs((2, 1, 2, 3, side, side, 3), seed=6)
    tensors = [LAYOUTS[layout](x.detach()).requires_grad_(), *rest]

    def block(*arguments: Tensor) -> Tensor:
        return conv_block(*arguments, 0.1, slope=0.2, pool=pool)

    assert torch.autograd.gradcheck(block, tensors)
    assert torch.autograd.gradgradcheck(block, tensors)


@pytest.mark.parametrize("number", [False, True], ids=["eps_of_a_task", "one_eps"])
@pytest.mark.parametrize(("side", "pool"), [(1, False), (2, False), (2, True), (5, True)])
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("tasks", [1, 2])
def test_layouts_do_not_matter(tasks: int, images: int, side: int, pool: bool, number: bool) -> None:
    """Neither those of the images nor those of a cotangent; the framework's batch norm fails at some of one image."""
    x, *rest, eps = inputs((tasks, images, 2, 4, side, side, 3))
    if number:
        eps = torch.full((tasks,), 0.1, dtype=torch.float64)
    else:
        rest = [*rest, eps]
    theirs = framework(x, *rest[:3], eps, 0.01, pool, "batch")
    wanted = [theirs, *second_order(theirs, [x, *rest])]
    for of_x, of_cotangent in itertools.product(LAYOUTS, LAYOUTS):
        other = LAYOUTS[of_x](x.detach()).requires_grad_()
        assert torch.equal(other, x)
        ours = conv_block(other, *rest[:3], 0.1 if number else eps, slope=0.01, pool=pool)
        found = [ours, *second_order(ours, [other, *rest], LAYOUTS[of_cotangent])]
        for actual, expected in zip(found, wanted, strict=True):
            assert (actual - expected).norm() <= 1e-11 * (1 + expected.norm()), (of_x, of_cotangent)


@pytest.mark.parametrize("slope", [0.01, 0.0, None])
@pytest.mark.parametrize("shape", ["one_task", "odd_size", "one_channel"])
def test_first_layer_is_the_same_function(shape: str, slope: float | None) -> None:
    """Statistics from the patches' covariance: value, first and second gradients as without (MATH.md 2)."""
    x, *rest = inputs(SHAPES[shape])
    x = x.detach()
    fast = conv_block(x, *rest, slope=slope, pool=True, patch_statistics=patch_statistics(x))
    plain = conv_block(x, *rest, slope=slope, pool=True)
    assert relative_error(fast, plain) < 1e-12
    for actual, expected in zip(second_order(fast, rest), second_order(plain, rest), strict=True):
        assert relative_error(actual, expected) < 1e-9 or expected.norm() < 1e-9


def test_statistics_given_and_returned() -> None:
    tensors = inputs(SHAPES["odd_size"])
    y, (mean, variance) = conv_block(*tensors, slope=0.01, pool=True, return_statistics=True)
    conv = torch.stack([F.conv2d(a, w, padding=1) for a, w in zip(tensors[0], tensors[1], strict=True)])
    assert relative_error(mean, conv.mean((1, 3, 4))) < 1e-12
    assert relative_error(variance, conv.var((1, 3, 4), correction=0)) < 1e-12
    assert not mean.requires_grad
    assert not variance.requires_grad
    again = conv_block(*tensors, slope=0.01, pool=True, statistics=(mean, variance))
    assert relative_error(again, y) < 1e-13
    # given statistics are constants of the normalisation: an image does not see its neighbours
    x = tensors[0].detach()
    alone = conv_block(x[:, :1], *tensors[1:], slope=0.01, pool=True, statistics=(mean, variance))
    assert relative_error(alone, y[:, :1]) < 1e-13
    x = x.requires_grad_()
    _, (_, from_patches) = conv_block(
        x.detach(),
        *tensors[1:],
        slope=0.0,
        pool=True,
        patch_statistics=patch_statistics(x.detach()),
        return_statistics=True,
    )
    assert relative_error(from_patches, variance) < 1e-11


def test_ties_go_to_the_first_position() -> None:
    """A constant image, no norm spread: every window ties, and the gradient goes to its first pixel, once."""
    x = torch.zeros(1, 1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    y = conv_block(x, weight, one, one, 0.0, slope=0.01, pool=True, statistics=(zero, one))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[::2, ::2] = 1
    torch.testing.assert_close(gradient[0, 0, 0], expected)


def test_slopes_at_the_kink_and_below() -> None:
    """z < 0 has the slope, z > 0 has 1, z = 0 the slope, as in the framework."""
    x = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64).view(1, 1, 1, 1, 3).requires_grad_()
    weight = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for slope, expected in ((0.25, [0.25, 0.25, 1.0]), (0.0, [0.0, 0.0, 1.0]), (None, [1.0, 1.0, 1.0])):
        y = conv_block(x, weight, one, zero, 0.0, slope=slope, pool=False, statistics=(zero, one))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.flatten().tolist() == expected


def test_zero_tasks() -> None:
    tensors = [t.detach()[:0].requires_grad_() for t in inputs(SHAPES["odd_size"])]
    y = conv_block(*tensors, slope=0.01, pool=True)
    assert y.shape == (0, 3, 5, 3, 4)
    for gradient, tensor in zip(torch.autograd.grad(y.sum(), tensors), tensors, strict=True):
        assert gradient.shape == tensor.shape


def test_float32_rounds_and_no_more() -> None:
    tensors = inputs((2, 5, 8, 16, 14, 14, 3))
    cotangent = torch.randn(2, 5, 16, 14, 14)
    single = [t.detach().float().requires_grad_() for t in tensors]
    results = []
    for arguments in (tensors, single):
        y = conv_block(*arguments, slope=0.01, pool=False)
        results.append([y, *torch.autograd.grad(y, arguments, cotangent.to(y.dtype))])
    for wanted, actual in zip(*results, strict=True):
        assert relative_error(actual, wanted) < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (2, 3, 2, 7)}, r"x must be \[T, S, Cin, H, W\], got \[2, 3, 2, 7\]"),
        ({"weight": (3, 5, 2, 3, 3)}, r"weight must be \[2, Cout, 2, 1 or 3, 1 or 3\]"),
        ({"weight": (2, 5, 2, 3, 1)}, "square kernel"),
        ({"scale": (3, 5)}, r"scale must be \[2 or 1, 5\]"),
        ({"bias": (2, 4)}, r"bias must be \[2 or 1, 5\]"),
        ({"eps": (1,)}, r"eps must be \[2\]"),
    ],
)
def test_wrong_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    names = ("x", "weight", "scale", "bias", "eps")
    tensors = dict(zip(names, inputs(SHAPES["odd_size"]), strict=True))
    tensors |= {name: torch.zeros(shape).double() for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        conv_block(*tensors.values(), slope=0.01, pool=True)


def test_refusals() -> None:
    tensors = inputs(SHAPES["odd_size"])
    x = tensors[0].detach()
    patches = patch_statistics(x)
    plain: dict[str, Any] = {"slope": 0.01, "pool": True}
    with pytest.raises(ValueError, match="norm must be 'batch' or 'group', got 'instance'"):
        conv_block(*tensors, **plain, norm="instance")
    with pytest.raises(ValueError, match=r"groups \(=2\) must divide the output channels \(=5\)"):
        conv_block(*tensors, **plain, norm="group", groups=2)
    with pytest.raises(ValueError, match="statistics belong to norm='batch'"):
        conv_block(*tensors, **plain, norm="group", return_statistics=True)
    with pytest.raises(ValueError, match="x requires no gradient"):
        conv_block(*tensors, **plain, patch_statistics=patches)
    with pytest.raises(ValueError, match="patch_statistics needs pool=True"):
        conv_block(x, *tensors[1:], slope=0.01, pool=False, patch_statistics=patches)
    with pytest.raises(ValueError, match="patch_statistics needs norm='batch'"):
        conv_block(x, *tensors[1:], **plain, norm="group", groups=1, patch_statistics=patches)
    with pytest.raises(ValueError, match="patch statistics must be float64"):
        conv_block(x, *tensors[1:], **plain, patch_statistics=(patches[0].float(), patches[1].float()))
    with pytest.raises(ValueError, match=r"weight must be torch.float64 on cpu like x, got torch.float32"):
        conv_block(x, tensors[1].float(), *tensors[2:], **plain)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(
        *[st.integers(1, 3)] * 2, *[st.integers(1, 5)] * 2, *[st.integers(2, 9)] * 2, st.sampled_from([1, 3])
    ),
    slope=st.sampled_from([0.0, 0.01, 0.3, None]),
    pool=st.booleans(),
    number=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(shape: tuple[int, ...], slope: float | None, pool: bool, number: bool, seed: int) -> None:
    *tensors, eps = inputs(shape, seed)
    if number:
        ours = conv_block(*tensors, 1e-2, slope=slope, pool=pool)
        theirs = framework(*tensors, torch.full_like(eps, 1e-2), slope, pool, "batch")
    else:
        tensors = [*tensors, eps]
        ours, theirs = conv_block(*tensors, slope=slope, pool=pool), framework(*tensors, slope, pool, "batch")
    assert (ours - theirs).abs().max() <= 1e-10 * theirs.abs().max()
    for actual, expected in zip(second_order(ours, tensors), second_order(theirs, tensors), strict=True):
        assert (actual - expected).norm() <= 1e-8 * (1 + expected.norm())


def test_one_number_for_epsilon() -> None:
    """A number is a constant epsilon, for every norm and for the first layer; second order included."""
    x, weight, scale, bias, _ = inputs(SHAPES["odd_size"])
    rest = [weight, scale, bias]
    many = torch.full((2,), 1e-3, dtype=torch.float64)
    for options in (
        {},
        {"norm": "group", "groups": 1},
        {"patch_statistics": patch_statistics(x.detach())},
        {"statistics": (bias.detach(), scale.detach().square())},
    ):
        one = conv_block(x.detach(), *rest, 1e-3, slope=0.01, pool=True, **options)  # type: ignore[call-overload]
        other = conv_block(x.detach(), *rest, many, slope=0.01, pool=True, **options)  # type: ignore[call-overload]
        for actual, expected in zip(second_order(one, rest), second_order(other, rest), strict=True):
            assert relative_error(actual, expected) < 1e-9 or expected.norm() < 1e-9
    _, (mean, variance) = conv_block(x, *rest, 1e-3, slope=0.01, pool=True, return_statistics=True)
    _, expected_pair = conv_block(x, *rest, many, slope=0.01, pool=True, return_statistics=True)
    for actual, expected in zip((mean, variance), expected_pair, strict=True):
        assert relative_error(actual, expected) < 1e-12


# --- without padding ---


def test_without_padding_is_the_framework_s_valid_convolution() -> None:
    x, weight, scale, bias, _ = inputs(SHAPES["odd_size"])
    options = {"slope": 0.1, "pool": True, "padded": False, "return_statistics": True}
    y, (mean, variance) = conv_block(x, weight, scale, bias, 1e-5, **options)
    for task in range(len(x)):
        convolved = F.conv2d(x[task], weight[task])
        normalised = F.batch_norm(convolved, None, None, scale[task], bias[task], training=True, eps=1e-5)
        expected = F.max_pool2d(F.leaky_relu(normalised, 0.1), 2)
        assert relative_error(y[task], expected) < 1e-12
        assert relative_error(mean[task], convolved.mean((0, 2, 3))) < 1e-12
        assert relative_error(variance[task], convolved.var((0, 2, 3), correction=0)) < 1e-12
    assert torch.autograd.gradcheck(
        lambda *operands: conv_block(*operands, 1e-2, slope=None, pool=False, padded=False), (x, weight, scale, bias)
    )


def test_without_padding_is_the_inside_of_what_padding_gives() -> None:
    x, weight, scale, bias, eps = inputs(SHAPES["one_task"])
    given = (bias.detach(), scale.detach().square())
    padded, valid = (
        conv_block(x, weight, scale, bias, eps, slope=0.0, pool=False, padded=padded, statistics=given)
        for padded in (True, False)
    )
    assert relative_error(valid, padded[..., 1:-1, 1:-1]) < 1e-12
    nothing = conv_block(x[:0], weight[:0], scale[:0], bias[:0], 0.1, slope=None, pool=True, padded=False)
    assert nothing.shape == (0, 2, 4, 2, 2)


def test_without_padding_a_group_norm() -> None:
    x, weight, scale, bias, _ = inputs(SHAPES["one_task"])
    y = conv_block(x, weight, scale, bias, 1e-5, slope=None, pool=False, padded=False, norm="group", groups=2)
    expected = F.group_norm(F.conv2d(x[0], weight[0]), 2, scale[0], bias[0], 1e-5)
    assert relative_error(y[0], expected) < 1e-12


def test_without_padding_something_must_be_left() -> None:
    x, weight, scale, bias, _ = inputs((1, 1, 1, 1, 3, 5, 3))
    with pytest.raises(ValueError, match=r"x must have H and W of at least 4 without padding, got \[1, 1, 1, 3, 5\]"):
        conv_block(x, weight, scale, bias, 0.1, slope=None, pool=True, padded=False)
    images = x.detach()
    with pytest.raises(ValueError, match="patch_statistics needs padding"):
        conv_block(
            images,
            weight,
            scale,
            bias,
            0.1,
            slope=None,
            pool=True,
            patch_statistics=patch_statistics(images),
            padded=False,
        )
