from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import config_of, random_episodes, relative_error, require_cpp, spread_parameters

from cxgrad_fast import Episodes, EpisodeSampler, InputError, Learner, reference
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.kernels import registration
from cxgrad_fast.learner import NonFiniteLossError


def test_meta_training_learns() -> None:
    """Loss falls and accuracy rises on a fixed small pool of tasks, for both algorithms."""
    for algorithm in ("cxgrad", "maml"):
        config = config_of(
            inner__algorithm=algorithm,
            inner__steps=3,
            outer__learning_rate=0.01,
            model__image_size=16,
            run__precision="float32",
        )
        learner, episodes = Learner(config), random_episodes(config, tasks=2)
        outs = [learner.meta_step(episodes) for _ in range(25)]
        assert outs[-1].loss < 0.6 * outs[0].loss, algorithm
        assert outs[-1].accuracy > outs[0].accuracy, algorithm


def test_meta_step_is_adam_on_the_oracles_gradients() -> None:
    config = config_of(inner__steps=2)
    learner, episodes = Learner(config), random_episodes(config)
    parameters = {name: t.detach().clone().requires_grad_() for name, t in learner.meta_parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=config.outer.learning_rate)
    for _ in range(3):
        learner.meta_step(episodes)
        optimizer.zero_grad()
        reference.meta_loss(config, parameters, episodes).loss.backward()
        optimizer.step()
    for name, tensor in parameters.items():
        assert relative_error(learner.meta_parameters[name], tensor) < 1e-7, name


def test_non_finite_loss_changes_nothing() -> None:
    config = config_of(inner__steps=1)
    learner, episodes = Learner(config), random_episodes(config)
    learner.meta_step(episodes)
    before = {name: tensor.detach().clone() for name, tensor in learner.meta_parameters.items()}
    moments = learner.state_dict()["optimizer"]["state"][0]["exp_avg"].clone()
    broken = Episodes(episodes.support_x, episodes.support_y, episodes.query_x * float("nan"), episodes.query_y)
    with pytest.raises(NonFiniteLossError, match="the loss of this meta-step is not finite"):
        learner.meta_step(broken)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.meta_parameters.items())
    assert torch.equal(moments, learner.state_dict()["optimizer"]["state"][0]["exp_avg"])


def test_state_dict_goes_on_to_the_bit(tmp_path: object) -> None:
    config = config_of(inner__steps=1)
    one, two = Learner(config), Learner(config.override({"run.seed": 1}))
    episodes = random_episodes(config)
    one.meta_step(episodes)
    path = f"{tmp_path}/state.pt"
    torch.save(one.state_dict(), path)
    two.load_state_dict(torch.load(path, weights_only=True))
    for learner in (one, two):
        learner.meta_step(episodes)
    for name, tensor in one.meta_parameters.items():
        assert torch.equal(tensor, two.meta_parameters[name]), name
    for name, pair in one.running_statistics.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, two.running_statistics[name], strict=True))


def test_load_state_dict_refuses_what_does_not_fit() -> None:
    learner = Learner(config_of())
    with pytest.raises(ValueError, match=r"parameter 'scaler.0.bias' is not on both sides"):
        learner.load_state_dict(Learner(config_of(inner__algorithm="maml")).state_dict())
    with pytest.raises(
        ValueError, match=r"'features.0.weight' must be \[4, 3, 3, 3\] by the config, got \[5, 3, 3, 3\]"
    ):
        learner.load_state_dict(Learner(config_of(model__filters=5)).state_dict())


def test_released_names() -> None:
    names = Learner(config_of()).released_names()
    assert names["features.0.weight"] == "classifier.layer_dict.conv0.conv.weight"
    assert names["features.3.norm.bias"] == "classifier.layer_dict.conv3.norm_layer.bias"
    assert names["head.weight"] == "classifier.layer_dict.linear.weights"
    assert names["head.bias"] == "classifier.layer_dict.linear.bias"
    assert names["scaler.2.weight"] == "gamma_generator.2.weight"
    names = Learner(config_of(model__backbone="resnet12", model__filters=2)).released_names()
    assert names["features.2.1.weight"] == "classifier.layer_dict.layer2.conv2.conv.weight"
    assert names["features.0.shortcut.norm.weight"] == "classifier.layer_dict.layer0.shortcut_norm_layer.weight"
    assert len(set(names.values())) == len(names)


def test_load_released_names_what_is_wrong() -> None:
    learner = Learner(config_of())
    names = learner.released_names()
    good = {names[name]: tensor.detach().numpy() + 1 for name, tensor in learner.meta_parameters.items()}
    learner.load_released(good | {"classifier.layer_dict.conv0.norm_layer.running_mean": torch.zeros(4)})
    assert (learner.meta_parameters["head.bias"] == 1).all()
    with pytest.raises(ValueError, match=r"has no 'classifier.layer_dict.linear.bias' \(our head.bias\)"):
        learner.load_released({name: v for name, v in good.items() if name != names["head.bias"]})
    with pytest.raises(ValueError, match=r"'head.bias' must be \[5\] by the config, got \[7\]"):
        learner.load_released(good | {names["head.bias"]: torch.zeros(7)})
    for odd, told in (
        (torch.zeros(5, dtype=torch.complex64), r"a tensor \[5\] of torch.complex64"),
        (np.zeros(5, np.int64), r"array\(\[0, 0, 0, 0, 0\]\)"),
        (torch.zeros(5).to_sparse(), "a sparse_coo one"),
        (None, "None"),
    ):
        with pytest.raises(ValueError, match=f"parameter 'head.bias' must be a tensor of .* or float64, got {told}"):
            learner.load_released(good | {names["head.bias"]: odd})
    assert (learner.meta_parameters["head.bias"] == 1).all()


def test_predict_is_the_oracles_inner_loop() -> None:
    """First order at test gives the logits of second order, without a graph."""
    config = config_of()
    learner, episodes = Learner(config), random_episodes(config, tasks=3)
    spread_parameters(learner)
    logits = learner.predict(episodes)
    assert not logits.requires_grad
    expected = reference.meta_loss(config, learner.meta_parameters, episodes).query_logits
    assert relative_error(logits, expected) < 1e-10


def test_adapt_one_task_or_several() -> None:
    config = config_of(inner__steps=2)
    learner, episodes = Learner(config), random_episodes(config, tasks=3)
    together = learner.adapt(episodes.support_x, episodes.support_y)(episodes.query_x)
    assert relative_error(together, learner.predict(episodes)) < 1e-13
    alone = learner.adapt(episodes.support_x[1], episodes.support_y[1])
    assert relative_error(alone(episodes.query_x[1]), together[1]) < 1e-10
    assert alone(episodes.query_x[1].float()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"query_x must be \[Q, C, H, W\] as support_x was, got \[3, 15, 3, 21, 21\]"):
        alone(episodes.query_x)
    with pytest.raises(ValueError, match=r"query_x must hold images \[3, 21, 21\]"):
        alone(episodes.query_x[0, :, :, :20])


def test_statistics_of_the_query_pass() -> None:
    """Support and running statistics make an image's logits independent of its neighbours; transductive ones not."""
    config = config_of(inner__steps=2)
    learner, episodes = Learner(config), random_episodes(config, tasks=2)
    with pytest.raises(InputError, match="statistics = running needs the averages of meta-training"):
        learner.predict(episodes, "running")
    learner.meta_step(episodes)
    part = Episodes(episodes.support_x, episodes.support_y, episodes.query_x[:, :4], episodes.query_y[:, :4])
    for statistics, independent in (("support", True), ("running", True), ("transductive", False)):
        whole, few = learner.predict(episodes, statistics)[:, :4], learner.predict(part, statistics)
        assert (relative_error(few, whole) < 1e-12) == independent, statistics
    # with the support set as the query set, its statistics are the batch's own
    same = Episodes(episodes.support_x, episodes.support_y, episodes.support_x, episodes.support_y)
    assert relative_error(learner.predict(same, "support"), learner.predict(same)) < 1e-12
    with pytest.raises(InputError, match="statistics takes one of transductive, support, running, got 'batch'"):
        learner.predict(episodes, "batch")


def test_running_statistics_are_an_average() -> None:
    """Of one step: its query pass's; of two: their mean."""
    config = config_of(inner__steps=1, outer__learning_rate=1e-12)
    learner = Learner(config)
    episodes = [random_episodes(config, seed=seed) for seed in (1, 2)]
    found = [learner.meta_loss(e).statistics for e in episodes]
    learner.meta_step(episodes[0])
    for name, pair in learner.running_statistics.items():
        for running, batch in zip(pair, found[0][name], strict=True):
            assert relative_error(running, batch) < 1e-9
    learner.meta_step(episodes[1])
    for name, pair in learner.running_statistics.items():
        for running, a, b in zip(pair, found[0][name], found[1][name], strict=True):
            assert relative_error(running, (a + b) / 2) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_switched_off_the_numbers_are_the_same(mode, compiled: bool) -> None:
    config = config_of(inner__steps=2, run__compile=compiled)
    e = random_episodes(config)
    outside = Learner(config)
    with mode():
        inside, made_there = Learner(config), random_episodes(config)
        loss = inside.meta_loss(e)
        assert not loss.loss.requires_grad
        assert loss.loss == outside.meta_loss(e).loss
        step = inside.meta_step(made_there)
        inside.plan_memory(2)
    assert torch.equal(step.query_logits, outside.meta_step(e).query_logits)
    for statistics in ("transductive", "support", "running"):
        wanted = outside.predict(e, statistics)
        adapted = outside.adapt(e.support_x[0], e.support_y[0], statistics)
        with mode():
            for learner in (inside, outside):
                for episodes in (e, made_there):
                    assert torch.equal(learner.predict(episodes, statistics), wanted), statistics
            there = inside.adapt(made_there.support_x[0], made_there.support_y[0], statistics)
            assert torch.equal(there(made_there.query_x[0]), adapted(e.query_x[0]))
            state = inside.state_dict()
            outside.load_state_dict(state)
        assert torch.equal(there(made_there.query_x[0]), adapted(made_there.query_x[0]))
    for learner in (inside, outside):  # and can be trained afterwards
        learner.load_state_dict(copy.deepcopy(state))
        learner.meta_step(made_there)
    for name, tensor in inside.meta_parameters.items():
        assert torch.equal(tensor, outside.meta_parameters[name]), name


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"'run.device' \(=cuda:2\): torch sees 2 CUDA devices, counted from cuda:0"):
        Learner(config_of(run__device="cuda:2"))


def test_the_largest_seed_serves_weights_and_episodes() -> None:
    pool = ImagePool(
        torch.zeros(60, 2, 2, 3, dtype=torch.uint8),
        torch.arange(6).repeat_interleave(10),
        tuple("abcdef"),
        "train",
        "x",
    )
    for sampler in ("counter", "released"):
        config = config_of(run__seed=2**32 - 105, data__sampler=sampler)
        assert Learner(config).meta_parameters["head.weight"].isfinite().all()
        torch.Generator().manual_seed(config.run.seed)
        assert EpisodeSampler(pool, config).indices(10**9, 2).max() < 60


def test_seeds() -> None:
    a, b, c = (Learner(config_of(run__seed=seed)).meta_parameters for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["features.0.weight"], c["features.0.weight"])


def test_other_norms_have_no_statistics() -> None:
    config = config_of(model__norm="layer", inner__steps=1)
    learner, episodes = Learner(config), random_episodes(config)
    assert learner.meta_step(episodes).statistics == {}
    with pytest.raises(InputError, match=r"needs model\.norm = batch, not layer"):
        learner.predict(episodes, "support")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"run.precision": "tf32", "run.backend": "cpp"},
            r"\(=tf32\) is not for this machine: it needs the Triton operators on a CUDA device; use float32",
        ),
        (
            {"run.precision": "tf32", "run.backend": "triton"},
            r"the Triton operators run on CUDA devices, not on cpu; use float32 or float64",
        ),
        (
            {"run.precision": "bfloat16", "run.backend": "reference"},
            r"\(=bfloat16\) is not for this machine: the reference operators have no such products",
        ),
        ({"run.device": "gpu"}, "setting 'run.device' takes auto, cpu or cuda"),
        ({"run.device": "mps"}, "setting 'run.device' takes auto, cpu or cuda"),
    ],
)
def test_modes_that_are_not_here(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Learner(config_of().override(overrides))


def test_bfloat16_needs_amx_or_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    require_cpp()
    config = config_of(run__precision="bfloat16")
    registration.load()
    try:
        torch.ops.cxgrad_fast.assume_tiles(False)
        with pytest.raises(InputError, match=r"a CPU with AMX, and this CPU has none; .+ \(CXGRAD_ROUND_IN_SOFTWARE=1"):
            Learner(config)
        monkeypatch.setenv("CXGRAD_ROUND_IN_SOFTWARE", "1")
        assert Learner(config).dtype == torch.float32
        torch.ops.cxgrad_fast.assume_tiles(True)
        monkeypatch.delenv("CXGRAD_ROUND_IN_SOFTWARE")
        assert Learner(config).dtype == torch.float32
        monkeypatch.setenv("CXGRAD_BACKEND", "reference")
        with pytest.raises(InputError, match="the reference operators have no such products"):
            Learner(config)
    finally:
        torch.ops.cxgrad_fast.assume_tiles(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device() -> None:
    with pytest.raises(InputError, match="needs a CUDA device, and torch sees none"):
        Learner(config_of(run__device="cuda"))
