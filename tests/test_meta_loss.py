"""The engine against the released program's numbers and against the oracle."""

from __future__ import annotations

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from helpers import config_of, golden, gradients, random_episodes, relative_error, require_cpp, spread_parameters

from cxgrad_fast import Config, Episodes, Learner, reference


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else is tested here and elsewhere runs on the best that there is."""
    if request.param == "cpp":
        require_cpp()
    monkeypatch.setenv("CXGRAD_BACKEND", request.param)


def config_in(form: str, config: Config) -> Config:
    """CxGrad in one of its forms; MAML has only one."""
    return config.override({"inner.form": form}) if config.inner.algorithm == "cxgrad" else config


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", ["exact", "scaled"])
@pytest.mark.parametrize("name", ["cxgrad_5w1s_a", "maml_5w1s"])
def test_golden(name: str, form: str) -> None:
    arrays, config, episodes = golden(name)
    learner = Learner(config_in(form, config))
    learner.load_released({key[6:]: value for key, value in arrays.items() if key.startswith("param/")})
    out = learner.meta_loss(episodes)
    trace = torch.cat([out.support_losses, out.query_losses[:, None].detach()], 1)
    np.testing.assert_allclose(trace.numpy(), arrays["trace_loss"], rtol=1e-12)
    np.testing.assert_allclose(out.loss.item(), arrays["outer_loss"], rtol=1e-12)
    assert relative_error(out.query_logits, torch.from_numpy(arrays["query_logits"])) < 1e-11
    names = learner.released_names()
    for ours, gradient in gradients(out.loss, learner.meta_parameters).items():
        assert relative_error(gradient, torch.from_numpy(arrays[f"grad/{names[ours]}"])) < 1e-9, ours


def test_golden_on_two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        test_golden("cxgrad_5w1s_a", "exact")
    finally:
        torch.set_num_threads(before)


def compare_with_oracle(config: Config, tasks: int = 2, tolerance: float = 1e-8, iteration: int | None = None) -> None:
    learner = Learner(config)
    spread_parameters(learner)
    episodes = random_episodes(config, tasks)
    ours = learner.meta_loss(episodes, iteration)
    theirs = reference.meta_loss(config, learner.meta_parameters, episodes, iteration)
    for field in ("loss", "query_logits", "support_losses", "query_losses", "accuracy"):
        actual, expected = getattr(ours, field), getattr(theirs, field)
        assert actual.shape == expected.shape, field
        # the loss of a task that is solved, log(1 + 2e-8), has the rounding of numbers near 1
        is_close = relative_error(actual, expected) < 1e-10 or bool((actual - expected).abs().le(1e-15).all())
        assert is_close, field
    expected_gradients = gradients(theirs.loss, learner.meta_parameters)
    for name, gradient in gradients(ours.loss, learner.meta_parameters).items():
        # a sum that cancels to nothing (a head bias under plain softmax, say) has no relative error
        if expected_gradients[name].norm() > 1e-12:
            assert relative_error(gradient, expected_gradients[name]) < tolerance, name
        else:
            assert gradient.norm() < 1e-11, name


CASES = {
    "default": {},
    "one_step": {"inner.steps": 1},
    "two_steps_relu": {"inner.steps": 2, "model.slope": 0.0},
    "three_steps_5shot": {"inner.steps": 3, "task.shots": 5},
    "no_step": {"inner.steps": 0},
    "48_filters": {"model.filters": 48, "inner.steps": 2},
    "48_filters_5shot_relu": {"model.filters": 48, "inner.steps": 1, "task.shots": 5, "model.slope": 0.0},
    "even_size_2way_grey": {"model.image_size": 16, "task.ways": 2, "model.channels": 1},
    "first_order": {"inner.order": 1},
    "second_order_context": {"inner.initial_context_order": 2},
    "step_wise": {"inner.context_update": "step", "inner.steps": 3},
    "step_wise_first_order": {"inner.context_update": "step", "inner.order": 1, "inner.steps": 2},
    "step_wise_second_order": {"inner.context_update": "step", "inner.initial_context_order": 2, "inner.steps": 2},
    "sum_over_tasks": {"outer.reduction": "sum"},
    "large_epsilon": {"model.norm_eps": 1e-2},
    "maml": {"inner.algorithm": "maml"},
    "maml_first_order_relu": {"inner.algorithm": "maml", "inner.order": 1, "model.slope": 0.0},
    "group_norm": {"model.norm": "group", "model.norm_groups": 2, "inner.steps": 2},
    "layer_norm": {"model.norm": "layer", "inner.steps": 2},
    "odd_rows_kept": {"model.pool_ceil": True, "inner.steps": 2},
    "odd_rows_kept_from_the_second_layer_on": {"model.pool_ceil": True, "inner.steps": 1, "model.image_size": 22},
    "odd_rows_kept_group_norm": {
        "model.pool_ceil": True,
        "model.channels_last": True,
        "model.norm": "group",
        "model.norm_groups": 2,
        "inner.steps": 1,
    },
    "channels_last": {"model.channels_last": True, "model.image_size": 32, "inner.steps": 1},
    "resnet12": {"model.backbone": "resnet12", "model.filters": 2, "inner.steps": 2},
    "resnet12_released": {
        "model.backbone": "resnet12",
        "model.filters": 2,
        "inner.steps": 1,
        "model.slope": 0.0,
        "model.pool_last": False,
        "model.pool_padding": "0,0,1,1",
    },
    "resnet12_other_filters": {"model.backbone": "resnet12", "model.block_filters": "3,2,5,4", "inner.steps": 1},
    "resnet12_maml_group": {
        "model.backbone": "resnet12",
        "model.filters": 2,
        "inner.steps": 1,
        "inner.algorithm": "maml",
        "model.norm": "group",
        "model.norm_groups": 2,
    },
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("form", ["exact", "scaled"])
@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(case: str, form: str) -> None:
    config = config_in(form, config_of().override(CASES[case]))
    # without a step the scaler's gradient is zero and ResNet's long chains amplify rounding
    compare_with_oracle(config, tasks=1 if "relu" in case else 3)


def with_vanishing_factor(config: Config, bias: float) -> Learner:
    """A learner one of whose layers has a factor of softplus(bias), about."""
    learner = Learner(config)
    spread_parameters(learner)
    with torch.no_grad():
        learner.meta_parameters["scaler.2.weight"][1] *= 1e-3
        learner.meta_parameters["scaler.2.bias"][1] = bias
    return learner


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("bias", [-25.0, -60.0, -150.0])
def test_a_vanishing_factor(bias: float) -> None:
    """The exact form divides by a factor that may come near zero (seen: 4e-12): it still is the scaled network."""
    config = config_of(inner__steps=2)
    learner, episodes = with_vanishing_factor(config, bias), random_episodes(config)
    out, expected = learner.meta_loss(episodes), reference.meta_loss(config, learner.meta_parameters, episodes)
    assert relative_error(out.loss, expected.loss) < 1e-10
    wanted = gradients(expected.loss, learner.meta_parameters)
    for name, gradient in gradients(out.loss, learner.meta_parameters).items():
        assert relative_error(gradient, wanted[name]) < 1e-8 or wanted[name].norm() < 1e-12, name
    single = with_vanishing_factor(config.override({"run.precision": "float32"}), bias)
    rounded = single.meta_loss(episodes)
    # the layer's output is its bias to rounding, so that all its pooling windows tie: no gradient of this to compare
    assert all(gradient.isfinite().all() for gradient in gradients(rounded.loss, single.meta_parameters).values())


@pytest.mark.usefixtures("backend")
def test_non_contiguous_episodes() -> None:
    config = config_of(inner__steps=2)
    learner = Learner(config)
    straight = random_episodes(config)
    turned = Episodes(
        straight.support_x.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        straight.support_y.T.contiguous().T,
        straight.query_x.transpose(0, 1).contiguous().transpose(0, 1),
        straight.query_y.T.contiguous().T,
    )
    assert not turned.support_x.is_contiguous()
    expected = gradients(learner.meta_loss(straight).loss, learner.meta_parameters)
    for name, gradient in gradients(learner.meta_loss(turned).loss, learner.meta_parameters).items():
        assert relative_error(gradient, expected[name]) < 1e-9 or expected[name].norm() < 1e-12, name


@pytest.mark.usefixtures("backend")
def test_gradients_of_images() -> None:
    """Images that require gradients get them (without the first layer's patch statistics, which carry none)."""
    config = config_of(inner__steps=2)
    learner = Learner(config)
    plain = random_episodes(config)
    images = [plain.support_x.clone().requires_grad_(), plain.query_x.clone().requires_grad_()]
    episodes = Episodes(images[0], plain.support_y, images[1], plain.query_y)
    ours = torch.autograd.grad(learner.meta_loss(episodes).loss, images)
    theirs = torch.autograd.grad(reference.meta_loss(config, learner.meta_parameters, episodes).loss, images)
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < 1e-8


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_give_the_same(chunk: int, reduction: str) -> None:
    config = config_of(inner__steps=2, outer__reduction=reduction)
    whole, split = Learner(config), Learner(config.override({"run.tasks_per_chunk": chunk}))
    episodes = random_episodes(config, tasks=5)  # does not divide evenly
    a, b = whole.meta_loss(episodes), split.meta_loss(episodes)
    for field in dataclasses.fields(a):
        if field.name != "statistics":
            torch.testing.assert_close(getattr(b, field.name), getattr(a, field.name), rtol=1e-10, atol=1e-12)
    for name, pair in a.statistics.items():
        torch.testing.assert_close(b.statistics[name], pair, rtol=1e-10, atol=1e-12)
    expected = gradients(3 * a.loss, whole.meta_parameters)
    for name, gradient in gradients(3 * b.loss, split.meta_parameters).items():
        assert relative_error(gradient, expected[name]) < 1e-9 or expected[name].norm() < 1e-12, name


@pytest.mark.usefixtures("backend")
def test_chunks_without_gradients() -> None:
    config = config_of(inner__steps=1)
    episodes = random_episodes(config, tasks=3)
    learner = Learner(config.override({"run.tasks_per_chunk": 2}))
    with torch.no_grad():
        split = learner.meta_loss(episodes)
    assert not split.loss.requires_grad
    torch.testing.assert_close(split.loss, Learner(config).meta_loss(episodes).loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", ["default", "second_order_context", "step_wise", "maml", "group_norm", "resnet12"])
def test_recomputed_steps_give_the_same(case: str) -> None:
    config = config_of(inner__steps=2).override(CASES[case])
    plain, again = Learner(config), Learner(config.override({"run.recompute": True}))
    episodes = random_episodes(config)
    a, b = plain.meta_loss(episodes), again.meta_loss(episodes)
    torch.testing.assert_close(b.support_losses, a.support_losses, rtol=1e-12, atol=0)
    expected = gradients(a.loss, plain.meta_parameters)
    for name, gradient in gradients(b.loss, again.meta_parameters).items():
        assert relative_error(gradient, expected[name]) < 1e-9 or expected[name].norm() < 1e-12, name


def test_recompute_remembers_less() -> None:
    """Saved bytes grow by a whole pass a step without recomputation, by the fast weights alone with it."""

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def saved_bytes(steps: int, recompute: bool) -> int:
        config = config_of(inner__steps=steps, run__recompute=recompute, inner__algorithm="maml")
        learner, episodes = Learner(config), random_episodes(config)
        alive.clear()
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            out = learner.meta_loss(episodes)
        assert out.loss.requires_grad
        storages = [saved.tensor.untyped_storage() for saved in alive]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    plain = saved_bytes(3, False) - saved_bytes(2, False)
    recomputed = saved_bytes(3, True) - saved_bytes(2, True)
    assert recomputed < plain / 10


def test_meta_loss_equals_finite_differences() -> None:
    """The second-order meta-gradient is the derivative of the meta-loss, by central differences in float64."""
    config = config_of(inner__steps=2, inner__initial_context_order=2, inner__learning_rate=0.1)
    learner = Learner(config)
    spread_parameters(learner)
    episodes = random_episodes(config)
    exact = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    g = torch.Generator().manual_seed(3)
    for name, tensor in learner.meta_parameters.items():
        direction = torch.randn(tensor.shape, generator=g).double()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * 1e-6 * direction)
            values.append(learner.meta_loss(episodes).loss.item())
            with torch.no_grad():
                tensor.sub_(sign * 1e-6 * direction)
        slope = (values[0] - values[1]) / 2e-6
        assert abs(slope - (exact[name] * direction).sum().item()) < 1e-6 * max(1, abs(slope)), name
