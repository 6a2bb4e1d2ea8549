"""conv_block in C++ over the table of cases: right to the second derivative, whichever parts of it are asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import OperatorCalls, assert_bits_repeat, opcheck, relative_error, require_cpp
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from cxgrad_fast.kernels import registration, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, like, margin
from cxgrad_fast.kernels.cases import CASES, Case, Inputs, inputs
from cxgrad_fast.kernels.conv_block import cpp

ops = torch.ops.cxgrad_fast
NAMES = ("conv_block", "conv_block_backward", "conv_block_double_backward")
AGAIN = ("conv_block_convolution", "conv_block_activation")  # what is made again, not kept
SMALL = [case for case in CASES if case.operator == "conv_block" and not case.large]
OURS = [case for case in SMALL if case.norm == "batch" and not case.given]  # what is left to the definition is not
BY_NAME = {case.name: case for case in SMALL}
EXACT = 1e-12  # measured 1e-15
CLEAR = 1e-4  # from ties and kinks: float32 decides as float64 does
BLOCK = Case("conv_block", "", "a block of its own")


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


def stain(case: Case, given: Inputs) -> None:
    """Leave NaN in the scratch memory that a call of this shape uses."""
    tensors = {name: torch.full_like(tensor, math.nan).requires_grad_() for name, tensor in given.tensors.items()}
    constants = dict(given.constants)
    for name in ("x", "patch_statistics"):
        if name in constants:
            constants[name] = tree_map_only(Tensor, lambda tensor: torch.full_like(tensor, math.nan), constants[name])
    found = derivatives(case, Inputs(tensors, constants))
    assert not case.tasks or found["d.weight"].isnan().all()


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, expected in wanted.items():
        assert found[name].shape == expected.shape, name
        assert found[name].dtype == expected.dtype, name
        assert relative_error(found[name], expected) < EXACT or (found[name] - expected).norm() < EXACT, name


# --- the same numbers as the definition ---


def test_the_extension_is_what_is_tested() -> None:
    for case in OURS:
        with OperatorCalls() as calls:
            derivatives(case, inputs(case))
        assert set(calls.names()) - set(AGAIN) == set(NAMES), case.name
    for case in SMALL:
        if case not in OURS:
            with OperatorCalls() as calls:
                derivatives(case, inputs(case))
            assert calls.names() == [], case.name


@pytest.mark.usefixtures("way", "poisoned")
@pytest.mark.parametrize("case", OURS, ids=name_of)
def test_float64_equals_the_reference(case: Case) -> None:
    given = inputs(case)
    stain(case, given)
    found = derivatives(case, given)
    with use_backend("reference"):
        compare(found, derivatives(case, given))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", OURS, ids=name_of)
def test_every_number_is_written(case: Case, dtype: torch.dtype) -> None:
    """The same bits, whatever was in memory before."""
    given = inputs(case, dtype)
    stain(case, given)
    found = derivatives(case, given)
    ops.poison_buffers(False)
    torch.use_deterministic_algorithms(False)
    for name, expected in derivatives(case, given).items():
        assert torch.equal(found[name], expected), name


def awkward() -> Iterator[Case]:
    """Sizes about the widths of vectors and of register blocks, images about those of tiles."""
    for channels, out in ((1, 7), (5, 9), (15, 17), (16, 31), (33, 8), (7, 65)):
        for kernel, pool in ((3, True), (3, False), (1, True), (1, False)):
            height, width = (3 + out % 4, 2 + channels % 5)
            name = f"{channels}-{out}-{height}x{width}-k{kernel}-{'pool' if pool else 'full'}"
            shape = {"channels": channels, "out": out, "height": height, "width": width, "kernel": kernel}
            yield replace(BLOCK, **shape, name=name, pool=pool)
        shape = {"channels": channels % 6, "out": out, "height": 2 + out % 6, "width": 3 + out % 5}
        yield replace(BLOCK, **shape, name=f"first-{channels % 6}-{out}", first_layer=True)
    many = {"height": 2, "width": 3, "images": 101}  # several groups of images to a block of tiles
    yield replace(BLOCK, **many, name="many_images")
    yield replace(BLOCK, **many, name="many_images_pointwise", kernel=1, pool=False)
    yield replace(BLOCK, height=1, width=23, pool=False, name="one_row")
    yield replace(BLOCK, height=40, width=38, images=1, name="large_image")  # several blocks of tiles to an image


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", list(awkward()), ids=name_of)
def test_awkward_sizes(case: Case, dtype: torch.dtype) -> None:
    for seed in range(20):
        given = inputs(case, dtype, seed=seed)
        if dtype == torch.float64 or margin(case, given) > 1e-6:
            break
    with use_backend("reference"):
        wanted = derivatives(case, given.to(torch.float64))
        own = derivatives(case, given)
    stain(case, given)
    for name, tensor in derivatives(case, given).items():
        exact = wanted[name]
        # a filter of one number before a norm: its gradient is what cancels, for everybody
        allowed = EXACT if dtype == torch.float64 else max(1e-5, 2 * relative_error(own[name], exact))
        assert relative_error(tensor, exact) < allowed or exact.norm() < 1e-9, name


# --- parts of the derivatives ---

PARTS = ["plain", "no_pool", "no_activation", "pointwise_pool", "relu", "odd_size", "first_layer", "first_layer_odd"]


def part_of_derivatives(given: Inputs, case: Case, asked: Sequence[str], target: Sequence[str]) -> dict[str, Tensor]:
    """First derivatives in ``asked`` alone, second ones of those in ``target`` alone (``q``: the first cotangent)."""
    (output,) = call(case, given)
    generator = torch.Generator().manual_seed(5)
    (q,) = (cotangent.requires_grad_() for cotangent in like([output], generator))
    first = torch.autograd.grad(output, [given.tensors[name] for name in asked], q, create_graph=True)
    leaves = [{**given.tensors, "q": q}[name] for name in target]
    second = torch.autograd.grad(first, leaves, like(first, generator), allow_unused=True, materialize_grads=True)
    found = {f"d.{name}": gradient.detach() for name, gradient in zip(asked, first, strict=True)}
    return found | {f"dd.{name}": gradient for name, gradient in zip(target, second, strict=True)}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "asked", ["x", "weight", "scale", "bias", "eps", "x eps", "x weight", "weight eps", "bias eps"]
)
@pytest.mark.parametrize("name", PARTS)
def test_second_derivative_of_a_part(name: str, asked: str) -> None:
    """A context pass takes the gradient in epsilon alone, and is differentiated in everything else."""
    case, given = BY_NAME[name], inputs(BY_NAME[name])
    parts = [part for part in asked.split() if part in given.tensors]
    if not parts:
        pytest.skip("images have no gradient")
    everything = [*given.tensors, "q"]
    for target in ([target] for target in everything):
        found = part_of_derivatives(given, case, parts, target)
        with use_backend("reference"):
            compare(found, part_of_derivatives(given, case, parts, target))
    found = part_of_derivatives(given, case, parts, everything)
    with use_backend("reference"):
        compare(found, part_of_derivatives(given, case, parts, everything))


@pytest.mark.usefixtures("poisoned", "way")
@pytest.mark.parametrize("required", ["x", "weight", "scale", "bias", "eps", "weight eps", "x eps", "x weight"])
@pytest.mark.parametrize("name", PARTS)
def test_only_a_part_requires_gradients(name: str, required: str) -> None:
    case, given = BY_NAME[name], inputs(BY_NAME[name])
    parts = [part for part in required.split() if part in given.tensors]
    if not parts:
        pytest.skip("images have no gradient")
    for part, tensor in given.tensors.items():
        tensor.requires_grad_(part in parts)
    found = part_of_derivatives(given, case, parts, [*parts, "q"])
    with use_backend("reference"):
        compare(found, part_of_derivatives(given, case, parts, [*parts, "q"]))


@pytest.mark.parametrize("name", PARTS)
def test_first_cotangent_without_a_graph(name: str) -> None:
    """Its gradient is not there to be asked for, and the rest is the same."""
    case, given = BY_NAME[name], inputs(BY_NAME[name])
    wanted = part_of_derivatives(given, case, list(given.tensors), [*given.tensors, "q"])
    (output,) = call(case, given)
    generator = torch.Generator().manual_seed(5)
    leaves = list(given.tensors.values())
    first = torch.autograd.grad(output, leaves, like([output], generator), create_graph=True)
    second = torch.autograd.grad(first, leaves, like(first, generator), allow_unused=True, materialize_grads=True)
    for part, gradient in zip(given.tensors, second, strict=True):
        assert torch.equal(gradient, wanted[f"dd.{part}"]), part


@pytest.mark.parametrize("name", PARTS)
def test_outer_pass_through_output_and_derivatives_at_once(name: str) -> None:
    """As in the engine: the output goes on to a loss of its own beside the second derivative."""

    def outer(given: Inputs) -> dict[str, Tensor]:
        leaves = list(given.tensors.values())
        (output,) = call(case, given)
        first = torch.autograd.grad((output**2).sum(), leaves, create_graph=True)
        loss = (output**3).sum() + sum(((gradient + 1) ** 2).sum() for gradient in first)
        return dict(zip(given.tensors, torch.autograd.grad(loss, leaves), strict=True))

    case, given = BY_NAME[name], inputs(BY_NAME[name])
    found = outer(given)
    with use_backend("reference"):
        compare(found, outer(given))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["plain", "no_pool", "first_layer"])
def test_third_derivatives_are_refused(name: str) -> None:
    case, given = BY_NAME[name], inputs(BY_NAME[name])
    leaves = list(given.tensors.values())
    (output,) = call(case, given)
    first = torch.autograd.grad((output**2).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((gradient**2).sum() for gradient in first), leaves, create_graph=True)
    message = r"third derivatives of cxgrad_fast::conv_block are not there; the reference has them \(CXGRAD_BACKEND="
    for part, gradient in zip(given.tensors, second, strict=True):
        if gradient.requires_grad:
            with pytest.raises(NotImplementedError, match=message):
                torch.autograd.grad(gradient.sum(), leaves, allow_unused=True, retain_graph=True)
        else:
            assert part == "bias", part  # no way to hold it against a constant


# --- numerical derivatives ---

TINY = replace(BLOCK, tasks=2, images=2, channels=1, out=2, height=4, width=4, eps=1e-2)
CHECKED = [
    replace(
        TINY, name=f"{'pool' if size == 4 else 'full'}-{slope}", height=size, width=size, pool=size == 4, slope=slope
    )
    for size, slope in itertools.product((4, 3), (None, 0.0, 0.01))
] + [
    replace(TINY, name="odd", tasks=1, channels=2, height=5, width=3),
    replace(TINY, name="pointwise", channels=2, kernel=1, height=3),
    replace(TINY, name="shared_affine", shared_affine=True),
    *(replace(TINY, name=f"first-{slope}", first_layer=True, channels=2, slope=slope) for slope in (None, 0.0, 0.01)),
]


def away_from_ties(case: Case, distance: float) -> Inputs:
    return next(given for given in (inputs(case, seed=seed) for seed in range(99)) if margin(case, given) > distance)


@pytest.mark.parametrize("case", CHECKED, ids=name_of)
def test_gradcheck(case: Case) -> None:
    """Numerical first and second derivatives in every input, epsilon among them, under random upstream gradients."""

    def function(*tensors: Tensor) -> Tensor:
        return call(case, Inputs(dict(zip(given.tensors, tensors, strict=True)), given.constants))[0]

    given = away_from_ties(case, 1e-3)
    leaves = list(given.tensors.values())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves, gen_non_contig_grad_outputs=True, fast_mode=True)


@pytest.mark.parametrize("case", CHECKED, ids=name_of)
def test_gradcheck_of_the_registered_operator(case: Case) -> None:
    """Its differentiable outputs, y among them where it has one; that one's way is differentiated once."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(given.tensors, tensors, strict=True))
        x = named.pop("x", given.constants.get("x"))
        affine = (named[name].expand(case.tasks, -1) for name in ("scale", "bias"))
        slope = 1.0 if case.slope is None else case.slope
        outputs = ops.conv_block(x, named["weight"], *affine, named["eps"], slope, case.pool, *statistics)
        return tuple(output for output in outputs if output.requires_grad)

    given = away_from_ties(case, 1e-3)
    statistics = given.constants.get("patch_statistics", (None, None))
    leaves = list(given.tensors.values())
    assert len(function(*leaves)) == (1 if case.first_layer else 2)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(lambda *tensors: function(*tensors)[0], leaves, fast_mode=True)


# --- registered operators ---


def again(tensor: Tensor) -> Tensor:
    """A leaf with the same values and strides."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("name", ["plain", "no_pool", "first_layer"])
def test_opcheck(name: str) -> None:
    small = replace(BY_NAME[name], height=4, width=5, out=2)
    with OperatorCalls() as calls:
        derivatives(small, inputs(small))
    samples = {
        func: args
        for (func, args), name in zip(calls.calls, calls.names(), strict=True)
        if name not in AGAIN and (func is not ops.conv_block_backward.default or args[1] is None)
    }
    assert {func._schema.name for func in samples} == {f"cxgrad_fast::{name}" for name in NAMES}
    for func, args in samples.items():
        last = func is ops.conv_block_double_backward.default  # it has no derivative to compare
        opcheck(func, tree_map_only(Tensor, Tensor.detach if last else again, args))


FAKED = [*PARTS, "one_channel", "one_task", "smallest", "one_pixel", "strided", "zero_tasks", "first_layer_grey"]


@pytest.mark.parametrize("name", FAKED)
def test_fakes_are_like_the_real_ones(name: str) -> None:
    """Shapes, precisions and strides, whatever is asked for."""

    def fake_of(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor.detach())

    case, mode = BY_NAME[name], FakeTensorMode()
    given = inputs(case, torch.float32)
    with OperatorCalls() as calls:
        derivatives(case, given)
        for asked in ("x", "weight", "eps", "x eps", "weight bias"):
            parts = [part for part in asked.split() if part in given.tensors]
            for target in (["weight"], [*given.tensors, "q"]) if parts else ():
                part_of_derivatives(given, case, parts, target)
    assert len(calls.calls) >= 3
    different = {(func, *tree_map_only(Tensor, lambda tensor: tensor.shape, args)): args for func, args in calls.calls}
    for (func, *_), args in different.items():
        real = func(*tree_map_only(Tensor, Tensor.detach, args))
        fakes = tree_map_only(Tensor, fake_of, args)
        with mode:
            fake = func(*fakes)
        for index, (one, other) in enumerate(zip(real, fake, strict=True)):
            place = f"{func}[{index}]"
            assert (other.shape, other.dtype, other.device) == (one.shape, one.dtype, one.device), place
            assert not one.numel() or other.stride() == one.stride(), place


def loss_and_gradients(case: Case, constants: dict[str, Any]) -> Callable[..., tuple[Tensor, ...]]:
    """A loss of the output and of its own first derivatives, with its gradients, of the tensors of the case."""

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = Inputs(dict(zip(names, tensors, strict=True)), constants)
        (output,) = call(case, given)
        first = torch.autograd.grad((output**2).sum(), tensors, create_graph=True)
        loss = output.sin().sum() + sum((gradient**2).sum() for gradient in first)
        return loss, *torch.autograd.grad(loss, tensors)

    names = list(inputs(case).tensors)
    return function


@pytest.mark.parametrize("name", ["plain", "no_pool", "first_layer"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traced_derivatives(name: str, mode: str) -> None:
    """Each operator is one node of the graph, which gives the same numbers for other inputs."""
    case, given = BY_NAME[name], inputs(BY_NAME[name])
    function = loss_and_gradients(case, given.constants)
    graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(*given.tensors.values())
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    again = {f"cxgrad_fast.{name}.default" for name in AGAIN}
    ours = [target for target in targets if target.startswith("cxgrad_fast") and target not in again]
    assert ours == [f"cxgrad_fast.{name}.default" for name in (*NAMES, NAMES[1])]
    assert not any("aten.convolution" in target or "batch_norm" in target for target in targets)
    other = [tensor.detach() * 1.1 for tensor in given.tensors.values()]
    wanted = function(*(tensor.clone().requires_grad_() for tensor in other))
    for actual, expected in zip(graph(*other), wanted, strict=True):
        assert relative_error(actual, expected) < EXACT


@pytest.mark.parametrize("name", ["plain", "first_layer"])
def test_compiled(name: str) -> None:
    """torch.compile takes the operator and its first derivative as opaque nodes, without a break in its graph."""
    targets: list[str] = []

    def collect(module: GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module)

    def function(weight: Tensor, scale: Tensor, bias: Tensor, eps: Tensor) -> Tensor:
        return cpp.conv_block(x, weight, scale, bias, eps, 0.01, True, *statistics)[0].sin()

    given = inputs(BY_NAME[name])
    named = dict(given.tensors)
    x = named.pop("x", given.constants.get("x")).detach()
    statistics = given.constants.get("patch_statistics", (None, None))
    leaves = list(named.values())
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect), fullgraph=True)
    found, wanted = compiled(*leaves), function(*leaves)
    torch.testing.assert_close(found, wanted, rtol=EXACT, atol=0)
    for actual, expected in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, wanted)), strict=True):
        assert relative_error(actual, expected) < EXACT
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    assert ours == ["cxgrad_fast.conv_block.default", "cxgrad_fast.conv_block_backward.default"]
    assert not any("aten.convolution" in target or "batch_norm" in target for target in targets)
    torch._dynamo.reset()


# --- rounding, repetition, threads ---

LAYER = replace(BLOCK, images=5, channels=48, out=48, height=21, width=21, eps=1e-5)
LAYERS = [
    replace(LAYER, name="48"),
    replace(LAYER, name="48-no_pool", pool=False),
    replace(LAYER, name="64", channels=64, out=64, height=10, width=10),
    replace(LAYER, name="48-pointwise", kernel=1, pool=False, slope=None),
    replace(LAYER, name="48-first", channels=3, height=42, width=42, first_layer=True),
]
# every kind of call once (what only differs in memory rounds alike), many tasks: one error says little of its size
ROUNDED = [
    replace(BY_NAME[name], tasks=24)
    for name in (
        *("plain", "one_image", "one_channel", "odd_size", "smallest", "one_pixel", "no_pool", "no_activation_pool"),
        *("relu", "pointwise", "pointwise_pool", "production_eps", "dead_filter"),
        *("first_layer", "first_layer_odd", "first_layer_grey", "first_layer_relu", "first_layer_smooth"),
    )
]


def decided(case: Case, given: Inputs) -> Tensor:
    """Which outputs are away from ties and kinks in float64: there float32 takes the same branches."""
    exact = given.to(torch.float64)
    constants = {name: value for name, value in exact.constants.items() if name != "patch_statistics"}
    with torch.no_grad(), use_backend("reference"):
        (z,) = call(case, Inputs(exact.tensors, constants | {"slope": None, "pool": False}))
    gap = torch.full_like(z, math.inf)
    if case.pool:
        two = z.unfold(3, 2, 2).unfold(4, 2, 2).flatten(5).topk(2, dim=5).values
        z, gap = two[..., 0], two[..., 0] - two[..., 1]
    return gap.minimum(z.abs() if case.slope not in (None, 1.0) else gap) > CLEAR


def errors_by_task(case: Case, given: Inputs, exact: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Relative error of each task's part of each output and derivative; what rounding decides is left out."""
    found = masked_derivatives(case, given, mask)
    errors = {}
    for name, wanted in exact.items():
        tasks = len(wanted)
        difference = (found[name].double() - wanted).reshape(tasks, -1).norm(dim=1)
        errors[name] = difference / wanted.reshape(tasks, -1).norm(dim=1)
    return errors


def masked_derivatives(case: Case, given: Inputs, mask: Tensor) -> dict[str, Tensor]:
    """As :func:`derivatives`, with a cotangent (and its gradient) of zero outside of a mask."""
    (output,) = call(case, given)
    generator = torch.Generator().manual_seed(1)
    (q,) = ((cotangent * mask).requires_grad_() for cotangent in like([output], generator))
    leaves = list(given.tensors.values())
    first = torch.autograd.grad(output, leaves, q, create_graph=True)
    second = torch.autograd.grad(first, [*leaves, q], like(first, generator), allow_unused=True, materialize_grads=True)
    found = {"output": output.detach()}
    found |= {f"d.{name}": gradient.detach() for name, gradient in zip(given.tensors, first, strict=True)}
    found |= {f"dd.{name}": gradient for name, gradient in zip([*given.tensors, "q"], second, strict=True)}
    return found | {"dd.q": found["dd.q"] * mask}


@pytest.mark.parametrize("case", ROUNDED + LAYERS, ids=name_of)
def test_float32_error_is_at_most_twice_torchs(case: Case) -> None:
    """Of every output and derivative, in the geometric mean over tasks and seeds: one ratio of two errors is noise."""
    ratios: dict[str, list[Tensor]] = {}
    for seed in range(4):
        single = inputs(case, torch.float32, seed=seed)
        mask = decided(case, single)
        assert mask.double().mean() > 0.7
        with use_backend("reference"):
            exact = masked_derivatives(case, single.to(torch.float64), mask)
            exact = {name: wanted for name, wanted in exact.items() if wanted.norm() > 1e-9}
            allowed = errors_by_task(case, single, exact, mask)
        for name, error in errors_by_task(case, single, exact, mask).items():
            half_a_place = 2**-24  # below, being right is luck
            ratios.setdefault(name, []).append(error.clamp_min(half_a_place) / allowed[name].clamp_min(half_a_place))
    means = {name: round(math.exp(torch.cat(found).log().mean()), 2) for name, found in ratios.items()}
    assert max(means.values()) <= 2, means


MANY = replace(BLOCK, tasks=2, images=9, channels=48, out=48, height=13, width=11)  # several blocks, groups and parts
PARALLEL = [
    replace(MANY, name="pool"),
    replace(MANY, name="no_pool", pool=False),
    replace(MANY, name="one_task", tasks=1, images=30, height=6, width=7),
    replace(MANY, name="one_image", tasks=1, images=1, channels=33, out=70),
    replace(MANY, name="pointwise", kernel=1, pool=False, slope=None, channels=40),
    replace(MANY, name="first_layer", channels=3, height=26, width=23, first_layer=True),
    replace(MANY, name="five_tasks", tasks=5, images=3, channels=20),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PARALLEL, ids=name_of)
def test_bits_repeat_on_any_number_of_threads(case: Case, dtype: torch.dtype) -> None:
    assert_bits_repeat(case, inputs(case, dtype))


@pytest.mark.parametrize("case", PARALLEL, ids=name_of)
def test_tasks_do_not_see_each_other(case: Case) -> None:
    """The bits of a task are those that it has alone."""

    def last(tensor: Tensor) -> Tensor:
        return tensor.detach()[-1:].clone().requires_grad_(tensor.requires_grad)

    given = inputs(case, torch.float32)
    alone = Inputs(*(tree_map_only(Tensor, last, part) for part in (given.tensors, given.constants)))
    q = torch.randn(call(case, given)[0].shape)
    results = []
    for arguments, cotangent in ((given, q), (alone, q[-1:])):
        (output,) = call(case, arguments)
        gradients = torch.autograd.grad(output, list(arguments.tensors.values()), cotangent)
        results.append([output, *gradients])
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[-1:], part)


# --- what the registered operators refuse ---


def sample(order: int) -> tuple[Any, list[Any], list[str]]:
    """The operator of an order, the arguments of a call, and their names."""
    with OperatorCalls() as calls:
        derivatives(BY_NAME["plain"], inputs(BY_NAME["plain"]))
    func, args = calls.calls[order]
    return (
        func,
        list(tree_map_only(Tensor, Tensor.detach, args)),
        [argument.name for argument in func._schema.arguments],
    )


def shaped(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("order", "change", "message"),
    [
        (0, {"x": shaped(2, 3, 3, 8)}, r"x must be \[T, S, Cin, H, W\], got \[2, 3, 3, 8\]"),
        (0, {"x": shaped(2, 0, 3, 8, 8)}, r"x must be .*, of which T alone may be 0, got \[2, 0, 3, 8, 8\]"),
        (0, {"x": shaped(2, 3, 3, 0, 8)}, r"x must be .*, of which T alone may be 0, got \[2, 3, 3, 0, 8\]"),
        (0, {"x": shaped(2, 3, 3, 1, 8)}, r"x must have H and W of at least 2 to be pooled, got \[2, 3, 3, 1, 8\]"),
        (0, {"weight": shaped(2, 0, 3, 3, 3)}, r"weight must have an output channel, got \[2, 0, 3, 3, 3\]"),
        (0, {"x": shaped(2, 3, 3, 8, 8).half()}, "x must be Float or Double, got Half"),
        (
            0,
            {"weight": shaped(2, 4, 5, 3, 3)},
            r"weight must be \[2, Cout, 3, k, k\] with k 1 or 3 \(T and Cin from x\), got \[2, 4, 5, 3, 3\]",
        ),
        (0, {"weight": shaped(2, 4, 3, 5, 5)}, r"weight must be .* with k 1 or 3 .*, got \[2, 4, 3, 5, 5\]"),
        (0, {"weight": shaped(2, 4, 3, 3, 3).float()}, "weight must be Double on cpu like x, got Float on cpu"),
        (0, {"scale": shaped(1, 4)}, r"scale must be \[2, 4\] \(T from x, Cout from weight\), got \[1, 4\]"),
        (0, {"bias": shaped(2, 3)}, r"bias must be \[2, 4\] \(T from x, Cout from weight\), got \[2, 3\]"),
        (0, {"bias": shaped(2, 4).float()}, "bias must be Double on cpu like x, got Float on cpu"),
        (0, {"eps": shaped(1)}, r"eps must be \[2\] \(T from x\), got \[1\]"),
        (0, {"slope": -0.5}, "slope must be finite and not negative, got -0.5"),
        (0, {"patch_mean": shaped(2, 27)}, "patch_mean and patch_covariance come together"),
        (
            0,
            {"patch_mean": shaped(2, 9), "patch_covariance": shaped(2, 27, 27)},
            r"patch_mean must be \[2, 27\] \(T from x, 9 Cin\), got \[2, 9\]",
        ),
        (
            0,
            {"patch_mean": shaped(2, 27), "patch_covariance": shaped(2, 27, 27).float()},
            "patch statistics must be Double, got Double and Float",
        ),
        (
            0,
            {"patch_mean": shaped(2, 27), "patch_covariance": shaped(2, 27, 27), "pool": False},
            "patch statistics need pool=True and a 3x3 kernel",
        ),
        (
            1,
            {"q": shaped(2, 3, 4, 8, 8)},
            r"q must be \[2, 3, 4, 4, 4\] \(the forward .* output\), got \[2, 3, 4, 8, 8",
        ),
        (1, {"q": shaped(2, 3, 4, 4, 4).float()}, "q must be Double on cpu like x, got Float on cpu"),
        (
            1,
            {"y_gradient": shaped(2, 3, 4, 4, 4)},
            r"y_gradient must be \[2, 3, 4, 8, 8\] \(like y\), got \[2, 3, 4, 4, 4",
        ),
        (1, {"y_gradient": shaped(2, 3, 4, 8, 8).float()}, "y_gradient must be Double on cpu like x, got Float on cpu"),
        (1, {"y": shaped(0)}, r"y must be \[2, 3, 4, 8, 8\] \(the convolution's output; .*\), got \[0\]"),
        (1, {"selected": shaped(0)}, r"selected must be \[2, 3, 4, 4, 4\] .*, got \[0\]"),
        (1, {"corners": shaped(2, 3, 4, 4, 4)}, "corners must be Byte, got Double"),
        (1, {"moments": shaped(2, 4)}, r"moments must be \[2, 2, 4\] \(T, mean and variance, Cout\), got \[2, 4\]"),
        (1, {"moments": shaped(2, 2, 4).float()}, "moments must be Double, got Float"),
        (2, {"on_x": shaped(2, 3)}, r"on_x must be \[2, 3, 3, 8, 8\] \(like what it is a cotangent of\), got \[2, 3\]"),
        (2, {"on_weight": shaped(2, 4, 3, 3, 3).float()}, "on_weight must be Double on cpu like x, got Float on cpu"),
        (2, {"on_eps": shaped(4)}, r"on_eps must be \[2\] .*, got \[4\]"),
        (2, {"dscale": shaped(4)}, r"dscale must be \[2, 4\] \(like scale\), got \[4\]"),
        (2, {"dbias": shaped(2, 4).float()}, "dbias must be Double on cpu like x, got Float on cpu"),
    ],
)
def test_readable_refusals(order: int, change: dict[str, Any], message: str) -> None:
    func, args, names = sample(order)
    func(*args)
    for name, value in change.items():
        args[names.index(name)] = value
    with pytest.raises(ValueError, match=message):
        func(*args)


def test_sparse_gradient_is_checked() -> None:
    with OperatorCalls() as calls:
        derivatives(BY_NAME["first_layer"], inputs(BY_NAME["first_layer"]))
    func, args = calls.calls[2]
    place = [argument.name for argument in func._schema.arguments].index("sparse")
    for sparse, got in ((shaped(2, 27, 5), r"\[2, 27, 5\]"), (shaped(3), r"\[3\]")):
        changed = [sparse if index == place else arg for index, arg in enumerate(args)]
        with pytest.raises(ValueError, match=rf"sparse must be \[2, 27, 4\] .*, got {got}"):
            func(*tree_map_only(Tensor, Tensor.detach, changed))
