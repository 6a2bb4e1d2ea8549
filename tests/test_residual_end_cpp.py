"""residual_end in C++ over the table of cases: the bits of the definition to the second derivative."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import OperatorCalls, assert_bits_repeat, opcheck, require_cpp
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from cxgrad_fast.kernels import registration, residual_end, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, margin
from cxgrad_fast.kernels.cases import CASES, Case, inputs
from cxgrad_fast.kernels.residual_end import cpp

ops = torch.ops.cxgrad_fast
NAMES = ["residual_end", "residual_end_backward", "residual_end_double_backward"]
SMALL = [case for case in CASES if case.operator == "residual_end" and not case.large]
BY_NAME = {case.name: case for case in SMALL}
END = Case("residual_end", "", "an end of its own")
KINDS = ["plain", "padded", "no_pool", "relu"]
SLOPES = [0.0, 0.1, 1.0, 1.5]
POOLS = [(True, 0), (True, 1), (False, 0)]
PRECISIONS = [torch.float32, torch.float64]
nan, inf = math.nan, math.inf


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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, the operators' own buffers and torch's."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    ops.poison_buffers(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        ops.poison_buffers(False)
        torch.use_deterministic_algorithms(before)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same numbers in the same precision; NaN where NaN is wanted."""
    assert set(found) == set(wanted)
    for name, expected in wanted.items():
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=0, equal_nan=True, msg=lambda said, name=name: f"{name}: {said}"
        )


# --- the same numbers as the definition ---


def test_the_extension_is_what_is_tested() -> None:
    for case in SMALL:
        with OperatorCalls() as calls:
            derivatives(case, inputs(case))
        assert calls.names() == NAMES, case.name


@pytest.mark.usefixtures("way", "poisoned")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_bits_of_the_reference(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    found = derivatives(case, given)
    with use_backend("reference"):
        assert_same(found, derivatives(case, given))


def awkward() -> Iterator[Case]:
    """Channels about the widths of vectors, every way in which windows meet the border."""
    for (pool, padding), channels in itertools.product(POOLS, (1, 2, 7, 8, 15, 16, 17, 33)):
        for height, width in ((2, 2), (3, 2), (2, 5), (5, 4)):
            name = f"{'pool' if pool else 'full'}{padding}-{channels}-{height}x{width}"
            yield replace(
                END, name=name, channels=channels, height=height, width=width, pool=pool, padding=padding, images=2
            )
    yield replace(END, name="one_pixel", height=1, width=1, padding=1)
    yield replace(END, name="one_pixel_no_pool", height=1, width=1, pool=False)
    yield replace(END, name="one_column", height=6, width=1, padding=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", list(awkward()), ids=name_of)
def test_awkward_sizes(case: Case, dtype: torch.dtype) -> None:
    given = inputs(case, dtype)
    found = derivatives(case, given)
    with use_backend("reference"):
        assert_same(found, derivatives(case, given))


SPECIAL = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 1e-42])


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("slope", SLOPES)
@pytest.mark.parametrize(("pool", "padding"), POOLS)
def test_what_is_not_a_finite_number(pool: bool, padding: int, slope: float, dtype: torch.dtype) -> None:
    """The last NaN of a window wins it, -inf is more than padding, ReLU takes -inf to 0: as in the framework."""

    def draw(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (2, 3, 19, 7, 9), generator=generator)].to(dtype)

    generator = torch.Generator().manual_seed(0)
    for values in (SPECIAL, SPECIAL[1:], torch.tensor([-inf, -inf, -inf, -1.0]), torch.tensor([nan, 0.0])):
        x, shortcut = draw(values).requires_grad_(), torch.zeros(2, 3, 19, 7, 9, dtype=dtype, requires_grad=True)
        results = []
        for backend in ("cpp", "reference"):
            with use_backend(backend):
                out = residual_end(x, shortcut, slope=slope, pool=pool, padding=padding)
            q = SPECIAL.to(dtype).repeat(1 + out.numel() // len(SPECIAL))[: out.numel()].reshape(out.shape)
            first = torch.autograd.grad(out, x, q.requires_grad_(), create_graph=True)[0]
            cotangent = SPECIAL.flip(0).to(dtype).repeat(1 + x.numel() // len(SPECIAL))[: x.numel()].reshape(x.shape)
            second = torch.autograd.grad(first, q, cotangent)[0]
            results.append({"out": out.detach(), "first": first.detach(), "second": second})
        assert_same(*results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "image_major", "strided"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_of_arguments(kind: str, layout: str) -> None:
    """Whatever lies how, the cotangents too: the same bits, and results lie channels last."""
    case, odd = replace(BY_NAME[kind], height=7, width=5), replace(BY_NAME[kind], height=7, width=5, layout=layout)
    (x, shortcut), options = inputs(case).tensors.values(), inputs(case).constants
    results = []
    for other in (shortcut, inputs(odd).tensors["shortcut"]):
        out = residual_end(x, other, **options)
        shape = {"channels": out.shape[2], "height": out.shape[3], "width": out.shape[4]}
        lying = layout if other is not shortcut else "contiguous"
        q = inputs(replace(END, **shape, layout=lying), seed=5).tensors["x"]
        dx, _ = torch.autograd.grad(out, (x, other), q, create_graph=True)
        (second,) = torch.autograd.grad(dx, q, inputs(replace(odd, layout=lying), seed=6).tensors["x"])
        for result in (out, dx, second):
            assert result.permute(0, 1, 3, 4, 2).is_contiguous()
        results.append({"out": out.detach(), "first": dx.detach(), "second": second})
    assert_same(*results)


# --- derivatives ---

TINY = replace(END, tasks=1, images=2, channels=2, height=4, width=5)
CHECKED = [
    replace(TINY, name=f"{'pool' if pool else 'full'}{padding}-{slope}", pool=pool, padding=padding, slope=slope)
    for (pool, padding), slope in itertools.product(POOLS, SLOPES)
]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", CHECKED, ids=name_of)
def test_gradcheck(case: Case) -> None:
    """Numerical first and second derivatives, under random upstream gradients."""
    given = next(given for given in (inputs(case, seed=seed) for seed in range(99)) if margin(case, given) > 1e-3)
    leaves = list(given.tensors.values())

    def function(x: Tensor, shortcut: Tensor) -> Tensor:
        return residual_end(x, shortcut, **given.constants)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, gen_non_contig_grad_outputs=True, fast_mode=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_third_derivatives_are_refused(kind: str) -> None:
    case, given = BY_NAME[kind], inputs(BY_NAME[kind])
    leaves = list(given.tensors.values())
    (output,) = call(case, given)
    first = torch.autograd.grad((output**2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((gradient**2).sum() for gradient in first), leaves, create_graph=True)
    message = r"third derivatives of cxgrad_fast::residual_end are not there; the reference has them \(CXGRAD_BACKEND="
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(second[0].sum(), leaves)


@pytest.mark.parametrize("part", ["x", "shortcut"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_one_requires_gradients(kind: str, part: str) -> None:
    case, given = BY_NAME[kind], inputs(BY_NAME[kind])
    wanted = derivatives(case, given)
    for name, tensor in given.tensors.items():
        tensor.requires_grad_(name == part)
    (output,) = call(case, given)
    q = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(torch.autograd.grad(output, given.tensors[part], q)[0], wanted[f"d.{part}"])


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_tensor_and_itself(kind: str) -> None:
    """Both gradients are one tensor: adding them must not write into it."""
    x, options = inputs(BY_NAME[kind]).tensors["x"], inputs(BY_NAME[kind]).constants
    results = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            leaf = x.detach().clone().requires_grad_()
            out = residual_end(leaf, leaf, **options)
            (gradient,) = torch.autograd.grad((out**2).sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad((gradient**2).sum(), leaf)
        results.append({"first": gradient.detach(), "second": second})
    assert_same(*results)


def test_outer_pass_through_output_and_derivative_at_once() -> None:
    """As in the engine: the output goes on to a loss of its own beside the second derivative."""
    for kind in KINDS:
        given = inputs(BY_NAME[kind])
        leaves, results = list(given.tensors.values()), []
        for backend in ("cpp", "reference"):
            with use_backend(backend):
                (out,) = call(BY_NAME[kind], given)
                first = torch.autograd.grad((out**2).sum(), leaves, create_graph=True)
                loss = (out**3).sum() + sum(((gradient + 1) ** 2).sum() for gradient in first)
                results.append(dict(zip(given.tensors, torch.autograd.grad(loss, leaves), strict=True)))
        assert_same(*results)


# --- memory ---


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_graph_keeps_a_byte_an_output(kind: str) -> None:
    """That of both derivatives together: one tensor of codes, and neither arguments nor results."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = inputs(BY_NAME[kind], torch.float32)
    x, shortcut = given.tensors.values()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = residual_end(x, shortcut, **given.constants)
        q = torch.ones_like(out, requires_grad=True)
        torch.autograd.grad(out, (x, shortcut), q, create_graph=True)
    assert list(kept.values()) == [out.numel()]


@pytest.mark.usefixtures("way")
def test_both_gradients_are_one_tensor() -> None:
    given = inputs(BY_NAME["plain"])
    (out,) = call(BY_NAME["plain"], given)
    dx, dshortcut = torch.autograd.grad(out, list(given.tensors.values()), torch.ones_like(out))
    assert dx.data_ptr() == dshortcut.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_are_not_written(kind: str) -> None:
    given = inputs(BY_NAME[kind])
    before = {name: tensor.detach().clone() for name, tensor in given.tensors.items()}
    with OperatorCalls() as calls:
        derivatives(BY_NAME[kind], given)
    assert_same({name: tensor.detach() for name, tensor in given.tensors.items()}, before)
    for func, args in calls.calls:
        versions = [arg._version for arg in args if isinstance(arg, Tensor)]
        copies = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), args)
        func(*tree_map_only(Tensor, Tensor.detach, args))
        assert versions == [arg._version for arg in args if isinstance(arg, Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(args, copies, strict=True) if isinstance(a, Tensor))


# --- registered operators ---


def again(tensor: Tensor) -> Tensor:
    """A leaf with the same values and strides."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    small = replace(BY_NAME[kind], height=4, width=5)
    with OperatorCalls() as calls:
        derivatives(small, inputs(small))
    assert calls.names() == NAMES
    for func, args in calls.calls:
        last = func is ops.residual_end_double_backward.default  # it has no derivative to compare
        opcheck(func, tree_map_only(Tensor, Tensor.detach if last else again, args))


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_fakes_are_like_the_real_ones(case: Case) -> None:
    """Shapes, precisions and strides."""
    mode = FakeTensorMode()
    with OperatorCalls() as calls:
        derivatives(case, inputs(case, torch.float32))
    for func, args in calls.calls:
        real = func(*tree_map_only(Tensor, Tensor.detach, args))
        fakes = tree_map_only(Tensor, lambda tensor: mode.from_tensor(tensor.detach()), args)
        with mode:
            fake = func(*fakes)
        several = isinstance(real, tuple)
        for one, other in zip(real if several else [real], fake if several else [fake], strict=True):
            assert (other.shape, other.dtype, other.device) == (one.shape, one.dtype, one.device), func
            assert not one.numel() or other.stride() == one.stride(), func


def loss_and_gradients(options: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A loss of the output and of its own first derivative, with its gradients."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        output = residual_end(*tensors, **options)
        first = torch.autograd.grad((output**2).sum(), tensors, create_graph=True)
        loss = output.sin().sum() + sum((gradient**2).sum() for gradient in first)
        return loss, *torch.autograd.grad(loss, tensors)

    return function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traced_derivatives(kind: str, mode: str) -> None:
    """Each operator is one node of the graph, which gives the same numbers for other inputs."""
    given = inputs(BY_NAME[kind])
    function = loss_and_gradients(given.constants)
    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*given.tensors.values())
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    assert ours == [f"cxgrad_fast.{name}.default" for name in (*NAMES, NAMES[1])]
    assert not any("pool" in target or "relu" in target for target in targets)
    other = [tensor.detach() * -1.1 for tensor in given.tensors.values()]
    wanted = function(*(tensor.clone().requires_grad_() for tensor in other))
    for actual, expected in zip(graph(*other), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


def test_compiled() -> None:
    """torch.compile takes the operator and its first derivative as opaque nodes, without a break in its graph."""
    targets: list[str] = []

    def collect(module: GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module)

    def function(x: Tensor, shortcut: Tensor) -> Tensor:
        return cpp.residual_end(x, shortcut, 0.1, True, 1)[0].sin()

    leaves = list(inputs(BY_NAME["plain"]).tensors.values())
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect), fullgraph=True)
    found, wanted = compiled(*leaves), function(*leaves)
    assert torch.equal(found, wanted)
    for actual, expected in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, wanted)), strict=True):
        assert torch.equal(actual, expected)
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    assert ours == ["cxgrad_fast.residual_end.default", "cxgrad_fast.residual_end_backward.default"]
    torch._dynamo.reset()


# --- threads, refusals ---


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_repeat_on_any_number_of_threads(kind: str, dtype: torch.dtype) -> None:
    case = replace(BY_NAME[kind], images=9, channels=20, height=13, width=11)
    assert_bits_repeat(case, inputs(case, dtype))


def shaped(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("order", "change", "message"),
    [
        (0, {"x": shaped(2, 3, 3, 8)}, "x must be [T, S, C, H, W], got [2, 3, 3, 8]"),
        (0, {"x": shaped(2, 3, 3, 8, 8).half()}, "x must be Float or Double, got Half"),
        (0, {"x": shaped(2, 0, 3, 8, 8)}, "x must be [T, S, C, H, W], of which T alone may be 0, got [2, 0, 3, 8, 8]"),
        (0, {"x": shaped(2, 3, 3, 1, 8)}, "x must have H and W of at least 2 to be pooled, got [2, 3, 3, 1, 8]"),
        (0, {"shortcut": shaped(2, 3, 3, 8, 7)}, "shortcut must be [2, 3, 3, 8, 8] (like x), got [2, 3, 3, 8, 7]"),
        (0, {"shortcut": shaped(2, 3, 3, 8, 8).float()}, "shortcut must be Double on cpu like x, got Float on cpu"),
        (0, {"slope": -0.5}, "slope must be finite and not negative, got -0.5"),
        (0, {"slope": nan}, "slope must be finite and not negative, got nan"),
        (0, {"padding": 2}, "padding must be 0 or 1, got 2"),
        (1, {"q": shaped(2, 3, 3, 4)}, "q must be [T, S, C, H, W], got [2, 3, 3, 4]"),
        (1, {"codes": shaped(2, 3, 3, 4, 4)}, "codes must be Byte, got Double"),
        (1, {"codes": shaped(2, 3, 3, 4, 5).byte()}, "codes must be [2, 3, 3, 4, 4] (the forward operator's output)"),
        (1, {"q": shaped(2, 3, 3, 5, 4)}, "q must be [2, 3, 3, 4, 4] (like codes), got [2, 3, 3, 5, 4]"),
        (1, {"height": 6}, "codes must be [2, 3, 3, 3, 4] (the forward operator's output), got [2, 3, 3, 4, 4]"),
        (2, {"cotangent": shaped(2, 3, 3, 8)}, "cotangent must be [T, S, C, H, W], got [2, 3, 3, 8]"),
        (2, {"cotangent": shaped(2, 3, 3, 8, 8).half()}, "cotangent must be Float or Double, got Half"),
        (2, {"codes": shaped(2, 3, 3, 8, 8).byte()}, "codes must be [2, 3, 3, 4, 4] (the forward operator's output)"),
    ],
)
def test_readable_refusals(order: int, change: dict[str, Any], message: str) -> None:
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
