"""linear_cross_entropy in C++ against the definition: numbers, what is not there, layouts, memory, tracing."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import OperatorCalls, assert_bits_repeat, opcheck, require_cpp
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from cxgrad_fast.kernels import linear_cross_entropy, registration, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, like
from cxgrad_fast.kernels.cases import CASES, Case, inputs
from cxgrad_fast.kernels.linear_cross_entropy import cpp

ops = torch.ops.cxgrad_fast
NAMES = ["linear_cross_entropy", "linear_cross_entropy_backward", "linear_cross_entropy_double_backward"]
SMALL = [case for case in CASES if case.operator == "linear_cross_entropy" and not case.large]
BY_NAME = {case.name: case for case in SMALL}
HEAD = Case("linear_cross_entropy", "", "a head of its own", height=1, width=1)
BACKENDS = ["reference", "cpp"]
PRECISIONS = [torch.float32, torch.float64]


def name_of(case: Case) -> str:
    return case.name


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    require_cpp()
    with use_backend("cpp"):
        yield


@pytest.fixture(params=["eager", "registered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Functions, and through the operators in torch.ops."""
    if request.param == "registered":
        monkeypatch.setattr(registration, "_traced", lambda: True)


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float = 1e-13) -> None:
    assert set(found) == set(wanted)
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape, name
        error = (found[name].double() - expected).norm()
        assert error <= allowed * expected.norm() + 1e-14, f"{name}: {error:.2e}"


# --- the same numbers as the definition ---


def awkward() -> Iterator[Case]:
    """Sizes about those of register blocks, vectors, and pieces of work."""
    for ways, features in itertools.product((1, 2, 4, 5, 6, 11), (1, 7, 8, 17, 33, 130)):
        yield replace(HEAD, name=f"{ways}x{features}", out=ways, channels=features)
    for images in (1, 2, 4, 5, 19, 21, 41, 129, 261):
        yield replace(HEAD, name=f"{images}_images", images=images, channels=9)
    for features in (511, 513, 1023, 1025, 2100):
        yield replace(HEAD, name=f"{features}_features", channels=features)
    yield replace(HEAD, name="131_ways", out=131, channels=20)
    yield replace(HEAD, name="one_column", channels=5, height=7)
    yield replace(HEAD, name="one_channel", channels=1, height=7, width=3)


@pytest.mark.parametrize("case", list(awkward()), ids=name_of)
def test_awkward_sizes(case: Case) -> None:
    """Float64 as the definition, float32 with at most twice the error of the framework's, or half a last place."""
    double, single = inputs(case), inputs(case, torch.float32)
    found, rounded = derivatives(case, double), derivatives(case, single)
    with use_backend("reference"):
        assert_close(found, derivatives(case, double))
        own, exact = derivatives(case, single), derivatives(case, single.to(torch.float64))
    for name, wanted in exact.items():
        error, allowed = ((result[name].double() - wanted).norm() for result in (rounded, own))
        assert error <= 2 * allowed + 3e-8 * wanted.norm(), f"{name}: {error:.2e}, the framework {allowed:.2e}"


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)], ids=["losses", "logits", "both"])
def test_what_has_no_cotangent_is_not_there(outputs: tuple[int, ...], asked: tuple[int, ...]) -> None:
    """Second derivatives through some of the outputs and some of their gradients."""
    case = BY_NAME["plain"]
    results = []
    for backend in BACKENDS:
        with use_backend(backend), OperatorCalls() as calls:
            given = inputs(case)
            leaves = list(given.tensors.values())
            both = call(case, given)
            found = [both[index] for index in outputs]
            u = [t.requires_grad_() for t in like(found, torch.Generator().manual_seed(1))]
            first = torch.autograd.grad(found, leaves, u, create_graph=True)
            some = [first[index] for index in asked]
            cotangents = like(first, torch.Generator().manual_seed(2))
            second = torch.autograd.grad(
                some, [*leaves, *u], [cotangents[index] for index in asked], allow_unused=True, materialize_grads=True
            )
        results.append(dict(zip("abcdefgh", (*first, *second), strict=False)))
        if backend == "cpp":
            assert calls.names() == NAMES
            _, _, arguments = (args for _, args in calls.calls)
            there = [arguments[index] is not None for index in range(5)]
            assert there == [*(index in asked for index in range(3)), *(index in outputs for index in range(2))]
    assert_close(results[1], results[0])


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "bias")], ids="-".join)
def test_only_some_require_gradients(wanted: tuple[str, ...]) -> None:
    """What nobody wants is not computed: an empty vector."""
    case, results = BY_NAME["plain"], []
    for backend in BACKENDS:
        given = inputs(case)
        for name, tensor in given.tensors.items():
            tensor.requires_grad_(name in wanted)
        leaves = [given.tensors[name] for name in wanted]
        with use_backend(backend), OperatorCalls() as calls:
            losses, _ = call(case, given)
            first = torch.autograd.grad((losses**2).sum(), leaves, create_graph=True)
            second = torch.autograd.grad([(t**2).sum() for t in first], leaves)
        results.append(dict(zip("abcdef", (*first, *second), strict=False)))
        for func, args in calls.calls:
            if func is not ops.linear_cross_entropy.default:
                assert args[-2:] == ("x" in wanted, "weight" in wanted)
                made = func(*tree_map_only(Tensor, Tensor.detach, args))
                assert [t.numel() > 0 for t in made[:3]] == ["x" in wanted, "weight" in wanted, True]
    assert_close(results[1], results[0])


def test_a_gradient_that_the_pass_does_not_use_is_not_computed() -> None:
    given = inputs(BY_NAME["plain"])
    hidden = {name: tensor * 1 for name, tensor in given.tensors.items()}  # of what is no leaf, the engine says
    losses, _ = linear_cross_entropy(**hidden, **given.constants)
    with OperatorCalls() as calls:
        torch.autograd.grad(losses.sum(), given.tensors["bias"])
    ((_, args),) = calls.calls
    assert args[-2:] == (False, False)


@pytest.mark.parametrize("gap", [5.0, 20.0, 30.0])
def test_sure_of_a_label(gap: float) -> None:
    """The loss of a label that is nearly certain, and its gradients, do not cancel: float32 has all their digits."""
    results = []
    for dtype in (torch.float32, torch.float64):
        bias = torch.tensor([[0.0, 1.0, gap, 2.0, 0.0]], dtype=dtype, requires_grad=True)
        x, weight = bias.new_zeros(1, 1, 1), bias.new_zeros(1, 5, 1)
        losses, _ = linear_cross_entropy(x, weight, bias, torch.tensor([[2]]))
        (gradient,) = torch.autograd.grad(losses.sum(), bias, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum() + 2 * gradient[0, 2], bias)
        results.append((losses, gradient, second))
    exact = math.log1p((2 + math.e + math.e**2) * math.exp(-gap))
    assert results[0][0].item() == pytest.approx(exact, rel=1e-6)
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


# --- layouts and memory ---

LAYOUTS = ["contiguous", "channels_last", "image_major", "strided"]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_bits_do_not_depend_on_layouts(dtype: torch.dtype) -> None:
    """Whatever lies how, cotangents and what is expanded too; gradients of images lie channels last."""

    def laid(tensor: Tensor, layout: str) -> Tensor:
        if layout == "channels_last" and tensor.dim() == 5:
            return tensor.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        if layout == "image_major" and tensor.dim() > 1:
            return tensor.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "strided":
            return torch.stack([tensor, tensor * math.nan], -1)[..., 0]
        return tensor.contiguous()

    given = inputs(BY_NAME["plain"], dtype)
    results = []
    for layout in LAYOUTS:
        leaves = [laid(t.detach(), layout).requires_grad_() for t in given.tensors.values()]
        labels = laid(given.constants["labels"], "image_major" if layout == "strided" else layout)
        outputs = linear_cross_entropy(*leaves, labels)
        generator = torch.Generator().manual_seed(1)
        u = [laid(t, layout).requires_grad_() for t in like(outputs, generator)]
        first = torch.autograd.grad(outputs, leaves, u, create_graph=True)
        second = torch.autograd.grad(first, [*leaves, *u], [laid(t, layout) for t in like(first, generator)])
        assert all(t.permute(0, 1, 3, 4, 2).is_contiguous() for t in (first[0], second[0]))
        results.append((*outputs, *first, *second))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_bits_of_an_expanded_weight() -> None:
    given, g = inputs(BY_NAME["plain"], torch.float32), torch.Generator().manual_seed(3)
    x, labels = given.tensors["x"], given.constants["labels"]
    weight, bias, u = torch.randn(1, 4, 27, generator=g), torch.randn(1, 4, generator=g), torch.ones(1)
    results = []
    for prepare in (lambda t: t.expand(2, *t.shape[1:]), lambda t: t.expand(2, *t.shape[1:]).contiguous()):
        leaves = [x, *(prepare(t).requires_grad_() for t in (weight, bias))]
        losses, logits = linear_cross_entropy(*leaves, labels)
        first = torch.autograd.grad(losses, leaves, prepare(u).requires_grad_(), create_graph=True)
        on = [prepare(t[:1].detach()) for t in first]
        results.append((losses, logits, *first, *torch.autograd.grad(first, leaves, on)))
    assert all(map(torch.equal, *results))


def copied(run: Callable[[], Any]) -> int:
    """How many tensors the framework copies in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::copy_")


@pytest.mark.parametrize("layout", ["flat", "images", "slice"])
def test_nothing_is_copied(layout: str) -> None:
    """Of images as conv_block lays them out only the weight is turned, and its gradient turned back."""
    images = layout == "images"
    case = replace(BY_NAME["expanded"], layout="channels_last", **({} if images else {"height": 1, "width": 1}))
    given = inputs(case, torch.float32)
    x = given.tensors["x"].detach()
    if layout == "slice":  # every second image of more features
        x = F.pad(x.flatten(2), (0, 5)).repeat_interleave(2, 1)[:, ::2, : x.shape[2]]
    weight, bias = (given.tensors[name].detach() for name in ("weight", "bias"))
    arguments = (x, weight.expand(2, -1, -1), bias.expand(2, -1), given.constants["labels"])
    ops.linear_cross_entropy(*arguments)
    assert copied(lambda: ops.linear_cross_entropy(*arguments)) == int(images) + 1  # and the small bias
    losses, logits, probabilities = ops.linear_cross_entropy(*arguments)
    assert copied(lambda: ops.linear_cross_entropy_backward(losses, logits, *arguments, probabilities, True, True)) == (
        2 * int(images)
    )


def test_arguments_are_not_written() -> None:
    with OperatorCalls() as calls:
        derivatives(BY_NAME["plain"], inputs(BY_NAME["plain"]))
    assert calls.names() == NAMES
    for func, args in calls.calls:
        copies = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), args)
        func(*tree_map_only(Tensor, Tensor.detach, args))
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True) if isinstance(a, Tensor))


SIZES = {
    "few": replace(HEAD, tasks=3, images=5, channels=48, height=5, width=5),
    "many_images": replace(HEAD, images=150, channels=130),
    "many_features": replace(HEAD, tasks=1, images=25, channels=16000),
    "many_ways": replace(HEAD, images=40, out=100, channels=700),
}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_bits_repeat_on_any_number_of_threads(size: str, dtype: torch.dtype) -> None:
    assert_bits_repeat(SIZES[size], inputs(SIZES[size], dtype))


def test_tasks_do_not_see_each_other() -> None:
    """A task's bits are those that it has alone."""
    given = inputs(SIZES["few"], torch.float32)
    arguments = [t.detach() for t in (*given.tensors.values(), given.constants["labels"])]
    results = []
    for part in (slice(None), slice(1, 2)):
        *leaves, labels = (t[part].clone() for t in arguments)
        leaves = [t.requires_grad_() for t in leaves]
        losses, _ = linear_cross_entropy(*leaves, labels)
        first = torch.autograd.grad((losses**2).sum(), leaves, create_graph=True)
        results.append((losses, *first, *torch.autograd.grad([(t**2).sum() for t in first], leaves)))
    assert all(torch.equal(whole[1:2], alone) for whole, alone in zip(*results, strict=True))


# --- registered operators ---


def again(tensor: Tensor) -> Tensor:
    """A leaf with the same values and strides."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("name", ["plain", "expanded", "5w1s"])
def test_opcheck(name: str) -> None:
    with OperatorCalls() as calls:
        derivatives(BY_NAME[name], inputs(BY_NAME[name]))
    assert calls.names() == NAMES
    for func, args in calls.calls:
        last = func is ops.linear_cross_entropy_double_backward.default  # it has no derivative to compare
        opcheck(func, tree_map_only(Tensor, Tensor.detach if last else again, args))


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=2)), ids=str)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_fakes_are_like_the_real_ones(case: Case, needs: tuple[bool, bool]) -> None:
    """Shapes, precisions and strides; also of what is not there or not needed."""
    mode = FakeTensorMode()
    with OperatorCalls() as calls:
        derivatives(case, inputs(case, torch.float32))
    for func, args in calls.calls:
        variants = [args]
        if func is ops.linear_cross_entropy_backward.default:
            variants = [(*args[:-2], *needs), (None, *args[1:-2], *needs), (args[0], None, *args[2:-2], *needs)]
        if func is ops.linear_cross_entropy_double_backward.default:
            variants = [(*args[:-2], *needs), (*args[:3], None, *args[4:]), (*args[:4], None, *args[5:])]
        for given in variants:
            real = func(*tree_map_only(Tensor, Tensor.detach, given))
            fakes = tree_map_only(Tensor, lambda tensor: mode.from_tensor(tensor.detach()), given)
            with mode:
                fake = func(*fakes)
            for one, other in zip(real, fake, strict=True):
                assert (other.shape, other.dtype, other.device) == (one.shape, one.dtype, one.device), func
                assert not one.numel() or other.stride() == one.stride(), func


def loss_and_gradients(labels: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """A loss of the outputs and of their own first derivative, with its gradients."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        losses, logits = linear_cross_entropy(*tensors, labels)
        first = torch.autograd.grad((losses**2).sum(), tensors, create_graph=True)
        loss = losses.sin().sum() + logits.cos().sum() + sum((gradient**2).sum() for gradient in first)
        return loss, *torch.autograd.grad(loss, tensors)

    return function


@pytest.mark.parametrize("name", ["plain", "5w1s"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traced_derivatives(name: str, mode: str) -> None:
    """Each operator is one node of the graph, which gives the same numbers for other inputs."""
    given = inputs(BY_NAME[name])
    function = loss_and_gradients(given.constants["labels"])
    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*given.tensors.values())
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t.startswith("cxgrad_fast")] == [
        f"cxgrad_fast.{n}.default" for n in (*NAMES, NAMES[1])
    ]
    assert not any("softmax" in target or "mm" in target for target in targets)
    other = [tensor.detach() * -1.1 for tensor in given.tensors.values()]
    wanted = function(*(tensor.clone().requires_grad_() for tensor in other))
    for actual, expected in zip(graph(*other), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)


def test_compiled() -> None:
    """torch.compile takes the operator and its first derivative as opaque nodes, without a break in its graph."""
    targets: list[str] = []

    def collect(module: GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module)

    given = inputs(BY_NAME["plain"])
    leaves, labels = list(given.tensors.values()), given.constants["labels"]

    def function(*tensors: Tensor) -> Tensor:
        losses, logits, _ = cpp.linear_cross_entropy(*tensors, labels)
        return losses.sin().sum() + logits.cos().sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect), fullgraph=True)
    found, wanted = compiled(*leaves), function(*leaves)
    assert torch.equal(found, wanted)
    for actual, expected in zip(*(torch.autograd.grad(y, leaves) for y in (found, wanted)), strict=True):
        assert torch.equal(actual, expected)
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    assert ours == ["cxgrad_fast.linear_cross_entropy.default", "cxgrad_fast.linear_cross_entropy_backward.default"]
    torch._dynamo.reset()


def shaped(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("order", "change", "message"),
    [
        (0, {"x": shaped(2, 3)}, "x must be [T, S, ...], got [2, 3]"),
        (0, {"x": shaped(2, 3, 3, 3, 3).half()}, "x must be Float or Double, got Half"),
        (0, {"x": shaped(2, 0, 27)}, "x must be [T, S, ...], of which T alone may be 0, got [2, 0, 27]"),
        (0, {"weight": shaped(2, 4, 26)}, "weight must be [2, N, 27] (T and D from x), got [2, 4, 26]"),
        (0, {"weight": shaped(2, 4, 27).float()}, "weight must be Double on cpu like x, got Float"),
        (0, {"weight": shaped(2, 0, 27)}, "weight must have an output, got [2, 0, 27]"),
        (0, {"bias": shaped(2, 5)}, "bias must be [2, 4] (T from x, N from weight), got [2, 5]"),
        (0, {"labels": shaped(2, 4).long()}, "labels must be [2, 3] (T and S from x), got [2, 4]"),
        (0, {"labels": shaped(2, 3)}, "labels must be whole numbers on cpu, got Double on cpu"),
        (1, {"labels": shaped(2, 3).long() + 4}, "labels must be from 0 to 3, got 4"),
        (1, {"losses_gradient": shaped(3)}, "losses_gradient must be [2] (T from x), got [3]"),
        (1, {"logits_gradient": shaped(2, 3, 5)}, "logits_gradient must be [2, 3, 4] (T and S from x, N from weight)"),
        (
            1,
            {"losses_gradient": None, "logits_gradient": None},
            "losses_gradient or logits_gradient must be there",
        ),
        (1, {"probabilities": shaped(2, 3, 5)}, "probabilities must be [2, 3, 4] (the forward operator's output)"),
        (2, {"probabilities": shaped(2, 3, 4).float()}, "probabilities must be Double, got Float"),
        (2, {"labels": shaped(2, 3).long() - 1}, "labels must be from 0 to 3, got -1"),
        (
            2,
            {"on_x": shaped(2, 3, 27)},
            "on_x must be [2, 3, 3, 3, 3] (like what it is a cotangent of), got [2, 3, 27]",
        ),
        (2, {"on_bias": shaped(2, 4).float()}, "on_bias must be Double on cpu like x, got Float"),
    ],
)
def test_readable_refusals_of_the_operators(order: int, change: dict[str, Any], message: str) -> None:
    with OperatorCalls() as calls:
        derivatives(BY_NAME["plain"], inputs(BY_NAME["plain"]))
    func, args = calls.calls[order]
    names = [argument.name for argument in func._schema.arguments]
    given = list(tree_map_only(Tensor, Tensor.detach, args))
    func(*given)
    for name, value in change.items():
        given[names.index(name)] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        func(*given)
