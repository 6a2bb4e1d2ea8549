"""What the C++ operators spend: convolution work to the last multiply-add, and memory that comes back to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from helpers import config_of, gradients, random_episodes, relative_error, require_cpp
from layers import Layer, layers
from ranks import Launched
from roofline import step_cost
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cxgrad_fast import Config, Learner
from cxgrad_fast.kernels import use_backend
from cxgrad_fast.kernels.case_calls import call, like
from cxgrad_fast.kernels.cases import Case, Inputs, inputs

ops = torch.ops.cxgrad_fast
BLOCK = Case("conv_block", "", "a block of its own", images=4, channels=5, out=6, height=6, width=8)
BLOCKS = {
    "pool": BLOCK,
    "no_pool": replace(BLOCK, pool=False),
    "pointwise": replace(BLOCK, kernel=1, slope=None),
    "odd": replace(BLOCK, height=7, width=5),
    "first": replace(BLOCK, channels=3, first_layer=True),
}


@pytest.fixture(autouse=True)
def _cpp() -> Iterator[None]:
    require_cpp()
    with use_backend("cpp"):
        yield


def work_of(run: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions in a call."""
    ops.take_convolution_count()
    run()
    return int(ops.take_convolution_count())


# --- one block, in units of its convolution ---


def units_of(case: Case, run: Callable[[Inputs], object]) -> Fraction:
    given = inputs(case)
    unit = case.tasks * case.images * case.height * case.width * case.kernel**2 * case.channels * case.out
    return Fraction(work_of(lambda: run(given)), unit)


def first(given: Inputs, case: Case, asked: Sequence[str]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    (output,) = call(case, given)
    q = torch.randn(output.shape, dtype=output.dtype, requires_grad=True)
    return output, q, torch.autograd.grad(output, [given.tensors[name] for name in asked], q, create_graph=True)


def second(given: Inputs, case: Case, asked: Sequence[str], also_output: bool = True) -> None:
    """Everything's gradient of a function of ``asked``'s first derivatives, and of the output as in the engine."""
    output, q, found = first(given, case, asked)
    outputs = [*found, output] if also_output else list(found)
    cotangents = like(outputs, torch.Generator().manual_seed(0))
    torch.autograd.grad(outputs, [q, *given.tensors.values()], cotangents, allow_unused=True)


@pytest.mark.parametrize("name", ["pool", "no_pool", "pointwise", "odd"])
def test_nine_units_for_a_block(name: str) -> None:
    """MATH.md 1: three of the first order, six of the outer pass, whatever else is asked for."""
    case = BLOCKS[name]
    assert units_of(case, lambda given: call(case, given)) == 1
    everything = ["x", "weight", "scale", "bias", "eps"]
    for asked, alone in ((everything, 3), (["x", "weight"], 3), (["x"], 2), (["weight"], 2), (["scale", "eps"], 1)):
        assert units_of(case, lambda given, asked=asked: first(given, case, asked)) == alone
    assert units_of(case, lambda given: second(given, case, ["x", "weight"])) == 9
    assert units_of(case, lambda given: second(given, case, everything)) == 9
    assert units_of(case, lambda given: second(given, case, ["x", "weight"], also_output=False)) == 9


@pytest.mark.parametrize("name", ["pool", "no_pool", "pointwise", "odd"])
def test_context_pass_of_a_block(name: str) -> None:
    """The gradient in epsilon needs no convolution, the way to the layers before one; differentiated again, four:
    conv(X, w), wgrad(X, dy) and the two of the outer pass. The layer that ends the way has the outer two alone."""
    case = BLOCKS[name]
    assert units_of(case, lambda given: first(given, case, ["eps"])) == 1
    assert units_of(case, lambda given: second(given, case, ["eps"])) == 1 + 2
    assert units_of(case, lambda given: first(given, case, ["x", "eps"])) == 2
    assert units_of(case, lambda given: second(given, case, ["x", "eps"])) == 2 + 4
    # without a cotangent X: conv(x, W), dgrad(dy, W) and the outer two
    assert units_of(case, lambda given: second(given, case, ["weight", "eps"])) == 2 + 4


def test_first_layer() -> None:
    """MATH.md 2: dense is the forward pass alone; at the arg-max, a quarter each: the sparse weight gradient, u, and
    the outer pass's weight gradient. Epsilon's gradient needs none, but its derivative the sparse weight gradient."""
    case, quarter = BLOCKS["first"], Fraction(1, 4)
    assert units_of(case, lambda given: call(case, given)) == 1
    assert units_of(case, lambda given: first(given, case, ["weight", "eps"])) == 1 + quarter
    assert units_of(case, lambda given: second(given, case, ["weight", "eps"])) == 1 + 3 * quarter
    assert units_of(case, lambda given: second(given, case, ["weight"], also_output=False)) == 1 + 2 * quarter
    assert units_of(case, lambda given: first(given, case, ["eps"])) == 1
    assert units_of(case, lambda given: second(given, case, ["eps"])) == 1 + 2 * quarter


def test_framework_counts_no_convolution() -> None:
    """So that ours are all there are."""
    with FlopCounterMode(display=False) as counter:
        second(inputs(BLOCK), BLOCK, ["x", "weight"])
    assert not any("conv" in str(operator) for operator in counter.get_flop_counts().get("Global", {}))


# --- a meta-step, against bench/roofline.py's least ---

STEPS: dict[str, dict[str, Any]] = {
    "cxgrad": {},
    "maml": {"inner.algorithm": "maml"},
    "first_order": {"inner.order": 1},
    "maml_first_order": {"inner.algorithm": "maml", "inner.order": 1},
    "second_order_context": {"inner.initial_context_order": 2},
    "step_wise": {"inner.context_update": "step"},
    "no_step": {"inner.steps": 0},
    "five_shot_grey": {"task.shots": 5, "model.channels": 1, "task.ways": 2},
    **{name: {"inner.algorithm": name} for name in ("alfa", "anil", "boil", "fomaml", "l2f", "mamlpp", "metasgd")},
    "anil_first_order": {"inner.algorithm": "anil", "inner.order": 1},
    "l2f_embedding_in_graph": {"inner.algorithm": "l2f", "inner.embedding_in_graph": True},
}


def meta_step(config: Config, tasks: int = 2) -> int:
    """Multiply-adds of the convolutions in a meta-loss and its gradient."""
    learner, episodes = Learner(config), random_episodes(config, tasks)
    with FlopCounterMode(display=False) as counter:
        spent = work_of(lambda: gradients(learner.meta_loss(episodes).loss, learner.meta_parameters))
    assert not any("convolution" in str(operator) for operator in counter.get_flop_counts()["Global"])
    return spent


def least(config: Config) -> int:
    """Multiply-adds of the convolutions in the least form."""
    cost = step_cost(config)
    flops = cost.flops - cost.by("layer")["head"][0]
    assert flops % 2 == 0
    return flops // 2


def small(case: str, size: int) -> Config:
    overrides = {"model.image_size": size, "inner.steps": 2, "outer.meta_batch": 2}
    return config_of(inner__algorithm=STEPS[case].get("inner.algorithm", "cxgrad")).override(overrides | STEPS[case])


def first_layer(config: Config) -> Layer:
    layer = layers(config)[0]
    assert isinstance(layer, Layer)
    return layer


@pytest.mark.parametrize("case", STEPS)
def test_meta_step_spends_the_least(case: str) -> None:
    """Exactly, but for the first layer of a context pass that is differentiated: it takes two sparse weight gradients,
    its own and the outer pass's, which the least form adds up first."""
    config = small(case, 16)
    images, twice = config.outer.meta_batch * config.task.ways * config.task.shots, 0
    if config.inner.algorithm == "cxgrad" and config.inner.initial_context_order == 2:
        twice = images * first_layer(config).sparse // 2
    assert meta_step(config) == least(config) + twice


@pytest.mark.parametrize(
    "settings", [{"inner.algorithm": "cavia"}, {"inner.algorithm": "modgrad"}, {"inner.joint": True}]
)
def test_no_meta_step_spends_less_than_the_least(settings: dict[str, Any]) -> None:
    """These compute again what their passes have in common; images of ANIL's joint pass have no first-layer form."""
    config = config_of(inner__algorithm=settings.get("inner.algorithm", "anil"), outer__meta_batch=2).override(settings)
    assert meta_step(config) >= least(config)


def test_odd_images() -> None:
    """Windows count, not positions: 10x10 of them for 21x21."""
    config = small("cxgrad", 21)
    assert meta_step(config) == least(config)


# --- buffers ---


def large_step(**overrides: Any) -> Callable[[], Any]:
    settings = {
        "model__filters": 16,
        "model__image_size": 42,
        "inner__steps": 2,
        "run__precision": "float32",
    } | overrides
    config = config_of(**settings)
    learner, episodes = Learner(config), random_episodes(config)
    return lambda: gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)


@pytest.mark.parametrize("backbone", ["conv4", "resnet12"])
def test_a_step_reuses_the_last_one_s_buffers(backbone: str) -> None:
    step = large_step(model__backbone=backbone, model__filters=16 if backbone == "conv4" else 4)
    ops.release_buffers()
    before = ops.fresh_buffer_bytes()
    step()
    warm = ops.fresh_buffer_bytes()
    assert warm - before > 4 << 20
    for _ in range(3):
        step()
    assert ops.fresh_buffer_bytes() == warm


def test_buffers_follow_a_change_of_sizes() -> None:
    """What an earlier phase has left, of a training step before validation, say, makes room for the next one's."""
    ops.release_buffers()
    for step in (large_step(), large_step(model__image_size=32), large_step(model__filters=12)):
        step()
        step()
        warm = ops.fresh_buffer_bytes()
        step()
        assert ops.fresh_buffer_bytes() == warm


def kept_after(sizes: Sequence[int]) -> int:
    """Bytes that come back after calls with images of these sizes."""
    case = replace(BLOCK, images=8, channels=16, out=16)
    ops.release_buffers()
    for size in sizes:
        call(case, inputs(replace(case, height=size, width=size)))
    return int(ops.release_buffers())


def compare_kept() -> None:
    """In a process of its own: small blocks would fill the gaps that live tensors of other tests leave."""
    sizes = list(range(24, 64, 4))
    with use_backend("cpp"):
        assert 0 < kept_after(sizes) == kept_after(sizes[-1:])


def test_other_sizes_do_not_pile_up(tmp_path) -> None:
    """Many sizes one after the other keep no more than the largest one needs."""
    launched = Launched(tmp_path / "process", 1, compare_kept)
    assert launched.wait() == [0], launched.err()


def test_release() -> None:
    step = large_step(inner__steps=1)
    step()
    assert ops.release_buffers() > 0
    assert ops.release_buffers() == 0
    before = ops.fresh_buffer_bytes()
    step()
    assert ops.fresh_buffer_bytes() > before


def test_live_results_survive_release_and_reuse() -> None:
    case = replace(BLOCK, images=16, channels=16, out=16, height=32, width=32)
    given = inputs(case)
    (kept,) = call(case, given)
    values = kept.detach().clone()
    ops.release_buffers()
    for seed in range(3):
        call(case, inputs(case, seed=seed))
    assert torch.equal(kept, values)
    assert kept.data_ptr() != call(case, given)[0].data_ptr()
    place = kept.data_ptr()
    del kept
    places = {call(case, given)[0].data_ptr() for _ in range(3)}
    assert places <= {place} or ops.release_buffers() > 0


def test_a_view_keeps_its_buffer() -> None:
    case = replace(BLOCK, images=16, channels=16, out=16, height=32, width=32)
    given = inputs(case)
    view = call(case, given)[0][0, 0].detach()
    values = view.clone()
    for seed in range(1, 4):
        call(case, inputs(case, seed=seed))
    assert relative_error(view, values) == 0
