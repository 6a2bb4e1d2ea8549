"""scaling_factors: its definition, missing and unwanted gradients, the least factor; the cases' table does the rest."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import OperatorCalls, relative_error, require_cpp
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from cxgrad_fast.kernels import registration, scaling_factors, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, like
from cxgrad_fast.kernels.cases import CASES, Inputs, inputs
from cxgrad_fast.kernels.scaling_factors import cpp

ops = torch.ops.cxgrad_fast
NAMES = ["scaling_factors", "scaling_factors_backward", "scaling_factors_double_backward"]
SCALER = ("context", "w0", "b0", "w2", "b2")
PLAIN, ZERO = (
    next(case for case in CASES if case.operator == "scaling_factors" and case.name == name)
    for name in ("plain", "zero_tasks")
)
LEAST = {torch.float32: 1e-11, torch.float64: 1e-90}
PRECISIONS = [torch.float32, torch.float64]
Wanted = tuple[bool, ...]


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpp":
        require_cpp()
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def _cpp() -> Iterator[None]:
    require_cpp()
    with use_backend("cpp"):
        yield


@pytest.fixture(params=["eager", "registered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Functions, and through the operators in torch.ops."""
    if request.param == "registered":
        monkeypatch.setattr(registration, "_traced", lambda: True)


# --- the definition ---


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_equals_the_formula(least: float) -> None:
    given = inputs(replace(PLAIN, least=least))
    c, w0, b0, w2, b2 = given.tensors.values()
    hidden = torch.einsum("td,hd->th", c, w0) + b0
    raw = (torch.einsum("th,lh->tl", hidden * (hidden > 0), w2) + b2).exp().add(1).log()
    gammas, eps = call(replace(PLAIN, least=least), given)
    assert bool(least) == bool((raw < least).any())
    assert relative_error(gammas, raw.clamp_min(least)) < 1e-14
    assert relative_error(eps, PLAIN.eps / raw.clamp_min(least) ** 2) < 1e-14


@pytest.mark.usefixtures("backend")
def test_zero_tasks() -> None:
    given = inputs(ZERO)
    gammas, eps = call(ZERO, given)
    assert gammas.shape == eps.shape == (0, 3)
    gradients = torch.autograd.grad(gammas.sum() + eps.sum(), list(given.tensors.values()), create_graph=True)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given.tensors.values()]
    assert not any(gradient.any() for gradient in gradients)


# --- missing and unwanted gradients ---


def partial(given: Inputs, outputs: Wanted, leaves: Wanted, on: Wanted) -> dict[str, Tensor]:
    """First gradients in some leaves of some outputs; second ones under cotangents of some of the first."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: tensor.detach().clone() for name, tensor in given.tensors.items()}
    for tensor, wanted in zip(tensors.values(), leaves, strict=True):
        tensor.requires_grad_(wanted)
    found = scaling_factors(**tensors, **given.constants)
    used = list(itertools.compress(found, outputs))
    cotangents = [cotangent.requires_grad_() for cotangent in like(found, generator)]
    cotangents = list(itertools.compress(cotangents, outputs))
    names = list(itertools.compress(tensors, leaves))
    first = torch.autograd.grad(used, [tensors[name] for name in names], cotangents, create_graph=True)
    results = {f"d.{name}": gradient.detach() for name, gradient in zip(names, first, strict=True)}
    second_on = [wanted for wanted, leaf in zip(on, leaves, strict=True) if leaf]
    below = list(itertools.compress(zip(first, like(first, generator), strict=True), second_on))
    if below:
        wanted = {name: tensors[name] for name in names} | {f"v.{index}": v for index, v in enumerate(cotangents)}
        second = torch.autograd.grad(
            [gradient for gradient, _ in below],
            list(wanted.values()),
            [cotangent for _, cotangent in below],
            allow_unused=True,
            materialize_grads=True,
        )
        results |= {f"dd.{name}": gradient for name, gradient in zip(wanted, second, strict=True)}
    return results


def only(*indices: int) -> Wanted:
    return tuple(index in indices for index in range(5))


@pytest.mark.usefixtures("_cpp", "way")
@pytest.mark.parametrize("outputs", [(True, True), (True, False), (False, True)], ids=["both", "gammas", "eps"])
@pytest.mark.parametrize("leaves", [only(*range(5)), only(0), only(1, 4), only(2, 3)], ids=str)
@pytest.mark.parametrize("on", [only(*range(5)), only(0), *(only(index) for index in range(1, 5))], ids=str)
def test_missing_gradients(outputs: Wanted, leaves: Wanted, on: Wanted) -> None:
    given = inputs(PLAIN)
    found = partial(given, outputs, leaves, on)
    with use_backend("reference"):
        wanted = partial(given, outputs, leaves, on)
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        assert relative_error(found[name], expected) < 1e-13 or expected.norm() < 1e-14, name


@pytest.mark.usefixtures("_cpp", "way")
def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    """As in the engine: the first derivative of eps in the context, of which the second is taken in weights that are
    made by other operators."""
    made = {name: tensor * 1 for name, tensor in inputs(PLAIN).tensors.items()}
    with OperatorCalls() as calls:
        _, eps = scaling_factors(**made, norm_eps=1e-3, least=0.0)
        e = torch.ones_like(eps, requires_grad=True)
        (first,) = torch.autograd.grad(eps, made["context"], e, create_graph=True)
        torch.autograd.grad(first.sum(), [made["w0"], made["b2"]])
    assert calls.names() == NAMES
    _, (_, backward), (_, double_backward) = calls.calls
    assert backward[0] is None  # no cotangent of gammas
    assert list(backward[-1]) == [True, False, False, False, False]
    assert [on is not None for on in double_backward[:5]] == [True, False, False, False, False]
    assert double_backward[5] is None
    assert list(double_backward[-1]) == [False, False, False, True, False, False, True]


@pytest.mark.usefixtures("_cpp", "way")
def test_graph_keeps_the_arguments_alone() -> None:
    tensors = inputs(PLAIN).tensors
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = scaling_factors(**tensors, norm_eps=1e-3, least=0.0)
        cotangents = [torch.ones_like(output, requires_grad=True) for output in outputs]
        torch.autograd.grad(outputs, list(tensors.values()), cotangents, create_graph=True)
    assert kept == {tensor.data_ptr() for tensor in (*tensors.values(), *cotangents)}


# --- the range ---


def with_sums(sums: list[float], dtype: torch.dtype) -> Inputs:
    """A scaler whose factors are softplus of about these numbers."""
    given = inputs(replace(PLAIN, layers=len(sums), eps=1e-5, least=LEAST[dtype]), dtype)
    with torch.no_grad():
        given.tensors["b2"].copy_(torch.tensor(sums))
    return given


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("dtype", "sums"),
    [
        (torch.float32, [-200.0, -60.0, -27.0, -20.0, 0.0, 5.0, 30.0, 1e4]),
        (torch.float64, [-800.0, -400.0, -207.0, -150.0, -60.0, 0.0, 5.0, 30.0, 1e4]),
    ],
    ids=str,
)
def test_every_layer_is_right_about_the_least_factor(dtype: torch.dtype, sums: list[float]) -> None:
    """Values and all derivatives, layer by layer, where factors are far below the least, near it, and large."""
    given = with_sums(sums, dtype)
    gammas, eps = call(PLAIN, given)
    found = {"gammas": gammas.detach(), "eps": eps.detach()}
    e = (1 / eps.detach()).requires_grad_()  # about as the loss's derivative is
    v = torch.ones_like(gammas).requires_grad_()
    for name, outputs, cotangents in (("v", gammas, v), ("e", eps, e)):
        first = torch.autograd.grad(outputs, given.tensors["b2"], cotangents, create_graph=True)[0]
        found[f"{name} first"] = first.detach()
        second = torch.autograd.grad(first.sum(), [given.tensors["b2"], cotangents], retain_graph=True)
        found |= {f"{name} second": second[0], f"{name} cotangent": second[1]}
    exact = closed_form(given.to(torch.float64), LEAST[dtype])
    assert found.keys() == exact.keys()
    tiny = torch.finfo(dtype).tiny
    for name, expected in exact.items():
        assert found[name].isfinite().all(), name
        rtol = 1e-4 if dtype == torch.float32 else 1e-12  # of exp(-200) by a last place of 200
        torch.testing.assert_close(
            found[name].double(), expected, rtol=rtol, atol=tiny, msg=lambda said, name=name: f"{name}: {said}"
        )


def closed_form(given: Inputs, least: float) -> dict[str, Tensor]:
    """The same by formulas, in shares of a factor, which neither vanish nor overflow."""
    c, w0, b0, w2, b2 = (tensor.detach() for tensor in given.tensors.values())
    s = torch.relu(c @ w0.T + b0) @ w2.T + b2
    linear = s > 20
    power = torch.where(linear, 0.0, s).exp()
    gamma = torch.where(linear, s, power.log1p()).clamp_min(least)
    slope = torch.where(linear, 1.0, power / (1 + power))
    bend = torch.where(linear, 0.0, slope / (1 + power))
    eps, share = 1e-5 / gamma / gamma, slope / gamma
    return {
        "gammas": gamma,
        "eps": eps,
        "v first": slope.sum(0),
        "v second": bend.sum(0),
        "v cotangent": slope,
        "e first": (-2 * share).sum(0),
        "e second": (6 * share**2 - 2 * bend / gamma).sum(0),
        "e cotangent": -2 * eps * share,
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_no_derivative_overflows_at_the_least_factor(dtype: torch.dtype) -> None:
    """Under cotangents of one, which are far larger than the loss's."""
    least = LEAST[dtype]
    given = with_sums([-26.0 if dtype == torch.float32 else -208.0, -1000.0, 0.5], dtype)
    (first, _), second = call(PLAIN, given), derivatives(PLAIN, given)
    assert (first[:, 1] == least).all()
    assert all(result.isfinite().all() for result in second.values())


@pytest.mark.usefixtures("_cpp")
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("spoiled", SCALER)
def test_what_is_not_a_number_stays_so(spoiled: str, dtype: torch.dtype) -> None:
    """In the results and derivatives in which the definition has it."""
    given = inputs(replace(PLAIN, least=LEAST[dtype]), dtype)
    with torch.no_grad():
        given.tensors[spoiled][0] = float("nan")
    found = derivatives(PLAIN, given)
    with use_backend("reference"):
        wanted = derivatives(PLAIN, given)
    assert wanted["output.0"].isnan().any()
    for name, expected in wanted.items():
        assert torch.equal(found[name].isnan(), expected.isnan()), name


# --- tracing ---


def loss_and_gradients(context: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """A loss of a moved context's factors, where the context moves by its first derivative; and its gradients."""
    eps = scaling_factors(context, *rest, norm_eps=1e-3, least=0.0)[1]
    (step,) = torch.autograd.grad((eps**2).sum(), context, create_graph=True)
    gammas, eps = scaling_factors(context - step, *rest, norm_eps=1e-3, least=0.0)
    loss = gammas.sin().sum() + eps.sum()
    return loss, *torch.autograd.grad(loss, [context, *rest])


@pytest.mark.usefixtures("_cpp")
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traced_derivatives(mode: str) -> None:
    """Each operator is one node of the graph, which gives the same numbers for other inputs."""
    given = inputs(PLAIN)
    graph = make_fx(loss_and_gradients, tracing_mode=mode, _allow_non_fake_inputs=True)(*given.tensors.values())
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    called = [*NAMES[:2], NAMES[0], *NAMES[1:], NAMES[1]]
    assert sorted(ours) == sorted(f"cxgrad_fast.{name}.default" for name in called)
    other = [tensor.detach() * -1.1 for tensor in given.tensors.values()]
    wanted = loss_and_gradients(*(tensor.clone().requires_grad_() for tensor in other))
    for actual, expected in zip(graph(*other), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@pytest.mark.usefixtures("_cpp")
def test_compiled() -> None:
    """torch.compile takes the operator and its first derivative as opaque nodes, without a break in its graph."""
    targets: list[str] = []

    def collect(module: GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module)

    def function(*tensors: Tensor) -> Tensor:
        gammas, eps = cpp.scaling_factors(*tensors, 1e-3, 0.0)
        return gammas.sin() + eps

    leaves = list(inputs(PLAIN).tensors.values())
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect), fullgraph=True)
    found, wanted = compiled(*leaves), function(*leaves)
    assert torch.equal(found, wanted)
    for actual, expected in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (found, wanted)), strict=True):
        assert torch.equal(actual, expected)
    ours = [target for target in targets if target.startswith("cxgrad_fast")]
    assert ours == ["cxgrad_fast.scaling_factors.default", "cxgrad_fast.scaling_factors_backward.default"]
    torch._dynamo.reset()


# --- refusals ---


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"context": torch.ones(2)}, "context must be [T, D], got [2]"),
    ({"w0": torch.ones(7, 4)}, "w0 must be [H, 5] (D from context), got [7, 4]"),
    ({"b0": torch.ones(6)}, "b0 must be [7] (H from w0), got [6]"),
    ({"w2": torch.ones(3, 6)}, "w2 must be [L, 7] (H from w0), got [3, 6]"),
    ({"b2": torch.ones(3, 1)}, "b2 must be [3] (L from w2), got [3, 1]"),
    ({"w2": torch.ones(0, 7), "b2": torch.ones(0)}, "w2 must hold at least one value, got [0, 7]"),
    ({"b2": torch.ones(3).double()}, "b2 must be torch.float32 on cpu like context, got torch.float64 on cpu"),
    ({"context": torch.ones(2, 5).long()}, "context must be floating point, got torch.int64"),
    ({"norm_eps": -1.0}, "norm_eps must be finite and not negative, got -1.0"),
    ({"least": float("nan")}, "least must be finite and not negative, got nan"),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change: dict[str, Any], message: str) -> None:
    given = inputs(PLAIN, torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        scaling_factors(**{**given.tensors, **given.constants, **change})


def test_readable_refusals_of_the_operators() -> None:
    require_cpp()
    c, w0, b0, w2, b2 = (tensor.detach() for tensor in inputs(PLAIN).tensors.values())
    scaler, five, seven = (c, w0, b0, w2, b2, 1e-3, 0.0), [True] * 5, [True] * 7

    def forward(*changed: Any) -> Callable[[], Any]:
        return lambda: ops.scaling_factors(*changed, *scaler[len(changed) :])

    refusals: dict[str, Callable[[], Any]] = {
        "context must be [T, D], got [2]": forward(c[:, 0]),
        "context must be Float or Double, got Half": forward(c.half()),
        "w0 must be [H, 5] (D from context), none 0, got [7, 4]": forward(c, w0[:, :4]),
        "w0 must be [H, 5] (D from context), none 0, got [0, 5]": forward(c, w0[:0]),
        "b0 must be [7] (H from w0), got [6]": forward(c, w0, b0[:6]),
        "w2 must be [L, 7] (H from w0), none 0, got [3, 6]": forward(c, w0, b0, w2[:, :6]),
        "b2 must be [3] (L from w2), got [2]": forward(c, w0, b0, w2, b2[:2]),
        "b2 must be Double on cpu like context, got Float on cpu": forward(c, w0, b0, w2, b2.float()),
        "norm_eps must be finite and not negative, got -1": forward(c, w0, b0, w2, b2, -1.0),
        "least must be finite and not negative, got inf": forward(c, w0, b0, w2, b2, 1e-3, float("inf")),
        "v must be [2, 3] (T from context, L from w2), got [3]": lambda: ops.scaling_factors_backward(
            b2, None, *scaler, five
        ),
        "e must be Double on cpu like context, got Float on cpu": lambda: ops.scaling_factors_backward(
            None, torch.ones(2, 3), *scaler, five
        ),
        "on_b0 must be [7] (like what it is a cotangent of), got [3]": lambda: ops.scaling_factors_double_backward(
            None, None, b2, None, None, None, None, *scaler, seven
        ),
    }
    for message, refused in refusals.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            refused()
