"""What every algorithm of the table owes: the oracle's numbers, in every mode of the engine and of the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    config_of,
    gradients,
    lengthen_weights,
    random_episodes,
    relative_error,
    spread_parameters,
)
from ranks import Launched
from test_captured import Rerun, assert_same, step_both
from test_captured import pair as captured_pair
from test_meta_loss import compare_with_oracle
from test_static import assert_equal_steps
from test_static import pair as compiled_pair
from tiny_runs import train, words
from torch import Tensor

from cxgrad_fast import Config, Episodes, EpisodeSampler, InputError, Learner
from cxgrad_fast.algorithms import ALGORITHMS
from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.config import ALGORITHMS as CONFIGS
from cxgrad_fast.config import MetricConfig
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.engine import join_ranks, prediction, static
from cxgrad_fast.evaluate import predict_tasks

pytest_plugins = ("tiny_runs_fixtures",)

_PADDED = {  # as CloserLookFewShot's on small images
    "model.image_size": 22,
    "inner.relation_padding": 1,
    "inner.shots_rule": "mean",
    "inner.joint": True,
    "inner.statistics_momentum": 0.1,
}
# one row an algorithm, and one for each of its switches; what is not said is the algorithm's own default
VARIANTS: dict[str, dict[str, Any]] = {
    "alfa": {},
    "alfa_random_init": {"inner.random_init": True},
    "anil": {},
    "anil_joint": {"inner.joint": True},
    "boil": {},
    "boil_head_too": {"inner.head_learning_rate": 0.1},
    "cavia": {},
    "cavia_everywhere": {"inner.layers": "0,1,2,3", "inner.hidden": True, "inner.context_at_head": True},
    "cxgrad": {},
    "fomaml": {},
    "l2f": {},
    "l2f_embedding_in_graph": {"inner.embedding_in_graph": True},
    "maml": {},
    "mamlpp": {},
    "matchingnet": {},
    "matchingnet_plain": {"inner.full_context": False},
    "matchingnet_support_cosine_apart": {"inner.attention": "support_cosine", "inner.joint": False},
    "metasgd": {},
    "modgrad": {"inner.steps": 3, "inner.mixtures": 2},  # the third round is the first whose context has moved twice
    "protomaml": {},
    "protonet": {},
    "protonet_euclidean_apart": {"inner.distance": "euclidean", "inner.joint": False},
    "protonet_cosine": {"inner.distance": "cosine"},
    "relationnet": {"model.image_size": 46},
    "relationnet_padded": _PADDED,
    "relationnet_softmax": _PADDED | {"inner.loss": "softmax", "task.shots": 2},
    "reptile": {"inner.batch": 4},
    # epsilon above the rounding of a bias in front of a norm, of which Adam would make steps
    "reptile_new_moments": {"inner.batch": 4, "inner.moments": "new", "inner.adam_eps": 1e-4},
    "reptile_sgd": {"inner.optimizer": "sgd", "inner.reduction": "mean", "inner.learning_rate": 0.1},
}
START = 0  # iteration: MAML++ asks the query set after every step
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def algorithm_of(variant: str) -> str:
    return max((name for name in ALGORITHMS if variant.startswith(name)), key=len)


def is_metric(variant: str) -> bool:
    """Without an inner loop, and its settings."""
    return issubclass(CONFIGS[algorithm_of(variant)], MetricConfig)


def tiny(variant: str, **changes: Any) -> Config:
    """Conv-4 of four filters on 16 x 16 images, two steps (modgrad: three), float64."""
    steps = {} if is_metric(variant) else {"inner.steps": 2}
    settings = {"inner.algorithm": algorithm_of(variant)} | steps | VARIANTS[variant]
    config = config_of(model__image_size=16, task__ways=3).override(settings)
    return config.override({name.replace("__", "."): value for name, value in changes.items()})


def spread(config: Config) -> Learner:
    """With parameters that are nothing special."""
    learner = Learner(config)
    spread_parameters(learner)
    return learner


def test_every_algorithm_of_the_table_is_here() -> None:
    assert {algorithm_of(variant) for variant in VARIANTS} == set(ALGORITHMS)


# --- the numbers ---

NETWORKS: dict[str, dict[str, Any]] = {
    "second_order": {},
    "first_order": {"inner.order": 1},
    "conv_bias": {"model.conv_bias": True},
    "conv_bias_first_order": {"model.conv_bias": True, "inner.order": 1},
    "no_step": {"inner.steps": 0},
    "group_norm": {"model.norm": "group", "model.norm_groups": 2},
}
ON_RESNET12 = {"model__backbone": "resnet12", "model__filters": 2}


@pytest.mark.parametrize("network", NETWORKS)
@EVERY
def test_equals_the_oracle(variant: str, network: str) -> None:
    if (variant, network) == ("mamlpp", "no_step"):
        pytest.skip("its program has at least one step")
    if is_metric(variant) and any(name.startswith("inner.") for name in NETWORKS[network]):
        pytest.skip("there is no inner loop")
    settings = {} if variant == "fomaml" and "inner.order" in NETWORKS[network] else NETWORKS[network]
    compare_with_oracle(tiny(variant).override(settings))


# the query losses count alike; after an epoch; the last but one iteration of its kind; the last query alone
@pytest.mark.parametrize("iteration", [0, 500, 7499, 7500])
def test_mamlpp_equals_the_oracle_in_every_phase(iteration: int) -> None:
    compare_with_oracle(tiny("mamlpp", inner__steps=3), iteration=iteration)


def has_second_order(variant: str) -> bool:
    return not is_metric(variant) and algorithm_of(variant) != "reptile"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if has_second_order(name)])
def test_equals_the_oracle_in_first_iterations_of_first_order(variant: str) -> None:
    config = tiny(variant, inner__first_order_iterations=3)
    for iteration in (2, 3):
        compare_with_oracle(config, iteration=iteration)


def on_resnet12(variant: str) -> Config:
    config = tiny(variant, **ON_RESNET12)
    return config if is_metric(variant) else config.override({"inner.steps": 1})


@pytest.mark.parametrize(
    "variant", [name for name in VARIANTS if algorithm_of(name) not in ("cavia", "modgrad", "relationnet")]
)
def test_equals_the_oracle_on_resnet12(variant: str) -> None:
    compare_with_oracle(on_resnet12(variant))


# on ResNet-12 these have no oracle: theirs is of Conv-4
@pytest.mark.parametrize("variant", ["cavia", "cavia_everywhere", "modgrad"])
def test_equals_finite_differences_on_resnet12(variant: str) -> None:
    settings = {"inner.layers": "0,2,5,15"} if variant == "cavia_everywhere" else {}
    learner = spread(on_resnet12(variant).override(settings))
    episodes = random_episodes(learner.config)
    exact = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    g = torch.Generator().manual_seed(3)  # the step is that small for the edges of pooling and activations
    for role in ("convolution", "norm", "head", "own"):
        names = [name for name, declared in learner.algorithm.declared.items() if declared.role == role]
        turns = {name: torch.randn(exact[name].shape, generator=g).double() for name in names}
        values = []
        for sign in (1, -1):
            moved = {name: t.detach() + sign * 1e-8 * turns.get(name, 0) for name, t in learner.meta_parameters.items()}
            values.append(learner.engine.meta_loss(moved, episodes).loss.item())
        slope = (values[0] - values[1]) / 2e-8
        expected = sum((exact[name] * turns[name]).sum().item() for name in names)
        assert abs(slope - expected) < 1e-5 * max(1, abs(expected)), role


@EVERY
def test_float32_is_near_float64(variant: str) -> None:
    config = tiny(variant)
    double, single = Learner(config), Learner(config.override({"run.precision": "float32"}))
    for learner in (double, single):
        lengthen_weights(learner)
    episodes = random_episodes(config)
    expected, found = (flat_gradients(learner, episodes) for learner in (double, single))
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < 1e-4


def flat_gradients(learner: Learner, episodes: Episodes) -> Tensor:
    found = gradients(learner.meta_loss(episodes, START).loss, learner.meta_parameters)
    return torch.cat([gradient.flatten() for gradient in found.values()])


# --- the ways of computing them ---


@pytest.mark.parametrize("variant", [name for name in VARIANTS if algorithm_of(name) != "reptile"])  # it has no graph
def test_recomputed_steps_have_the_same_bits(variant: str) -> None:
    plain, again = spread(tiny(variant)), spread(tiny(variant, run__recompute=True))
    episodes = random_episodes(plain.config)
    ours, expected = again.meta_loss(episodes, START), plain.meta_loss(episodes, START)
    assert torch.equal(ours.query_logits, expected.query_logits)
    assert torch.equal(ours.support_losses, expected.support_losses)
    found = [flat_gradients(learner, episodes) for learner in (again, plain)]
    assert torch.equal(*found)


@EVERY
def test_chunks_give_the_same_gradients(variant: str) -> None:
    whole, split = spread(tiny(variant)), spread(tiny(variant, run__tasks_per_chunk=2))
    episodes = random_episodes(whole.config, tasks=3)
    ours, expected = split.meta_loss(episodes, START), whole.meta_loss(episodes, START)
    assert relative_error(ours.query_logits, expected.query_logits) < 1e-12
    assert relative_error(ours.objectives, expected.objectives) < 1e-12
    assert relative_error(flat_gradients(split, episodes), flat_gradients(whole, episodes)) < 1e-12


@EVERY
def test_the_flat_program_has_the_eager_bits(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_TRIALS", 0)  # the program alone
    compiled, plain, told = compiled_pair(tiny(variant))
    assert_equal_steps(compiled, plain, steps=2, iteration=START)
    (message,) = told
    assert message.startswith("meta-step compiled in ")


@EVERY
def test_the_captured_step_has_the_eager_bits(variant: str) -> None:
    captured, plain, told = captured_pair(tiny(variant), Rerun(warm_ups=1))
    for seed in range(2):
        step_both(captured, plain, random_episodes(plain.config, 2, seed), START)
    assert_same(captured, plain)
    (message,) = told
    assert message.startswith("meta-step captured in ")


def check_two_ranks() -> None:
    """In each of two ranks: the gradients of a meta-step, which are in Adam's first moments, against one process's."""
    with join_ranks() as ranks:
        for variant in VARIANTS:
            config = tiny(variant, outer__meta_batch=3)
            one = Learner(config)
            if one.algorithm.sequential:
                with pytest.raises(InputError, match="tasks follow each other, 2 ranks cannot share them"):
                    Learner(config, ranks)
                continue
            many = Learner(config, ranks)
            for learner in (many, one):
                spread_parameters(learner)
            episodes = random_episodes(config, tasks=3)
            ours, expected = many.meta_step(episodes[ranks.shard(3)], START), one.meta_step(episodes, START)
            assert relative_error(ours.query_logits, expected.query_logits) < 1e-12, variant
            moments = [
                torch.cat(
                    [moment["exp_avg"].flatten() for moment in learner.state_dict()["optimizer"]["state"].values()]
                )
                for learner in (many, one)
            ]
            assert relative_error(*moments) < 1e-12, variant
            for layer, pair in one.running_statistics.items():
                assert relative_error(torch.stack(many.running_statistics[layer]), torch.stack(pair)) < 1e-12, variant


def test_two_ranks_give_one_process_s_gradients(tmp_path: Path) -> None:
    launched = Launched(tmp_path / "ranks", 2, check_two_ranks)
    assert launched.wait() == [0, 0], launched.err()


@EVERY
def test_memory_is_predicted(variant: str) -> None:
    plan = Learner(tiny(variant)).plan_memory(2)
    assert plan.chunk == 1 if variant == "reptile" else 2
    assert plan.predicted > 0


# --- its life in a Learner ---


@EVERY
def test_a_meta_step_moves_what_is_trained_and_nothing_else(variant: str) -> None:
    learner = spread(tiny(variant))
    before = {name: tensor.detach().clone() for name, tensor in learner.meta_parameters.items()}
    learner.meta_step(random_episodes(learner.config), START)
    moved = [name for name, tensor in learner.meta_parameters.items() if not torch.equal(tensor, before[name])]
    expected = [name for name, declared in learner.algorithm.declared.items() if declared.trained or declared.carried]
    assert moved == expected
    assert all(tensor.grad is None for tensor in learner.meta_parameters.values())


@EVERY
def test_training_goes_on_to_the_bit(variant: str) -> None:
    one, two = spread(tiny(variant)), Learner(tiny(variant, run__seed=1))
    for seed in range(2):
        one.meta_step(random_episodes(one.config, seed=seed), seed)
    two.load_state_dict(one.state_dict())
    ours, expected = (learner.meta_step(random_episodes(one.config, seed=2), 2) for learner in (two, one))
    assert torch.equal(ours.query_logits, expected.query_logits)
    torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)


def trained(variant: str, seed: int = 1, **changes: Any) -> Learner:
    """With running statistics, and parameters that are nothing special."""
    learner = Learner(tiny(variant, **changes))
    learner.meta_step(random_episodes(learner.config))
    spread_parameters(learner, seed)
    return learner


@EVERY
def test_adapt_and_predict_agree(variant: str) -> None:
    learner = trained(variant)
    episodes = random_episodes(learner.config)
    one_by_one = torch.cat([learner.meta_loss(episodes[task : task + 1]).query_logits for task in range(2)])
    assert relative_error(learner.predict(episodes), one_by_one) < 1e-10
    for statistics in ("transductive", "support", "running"):
        if learner.algorithm.joint and statistics != "transductive":
            with pytest.raises(InputError, match="normalises both sets together"):
                learner.predict(episodes, statistics)
            continue
        expected = learner.predict(episodes, statistics)
        batches = episodes.batches
        adapted = learner.adapt(episodes.support_x, episodes.support_y, statistics, batches)
        assert relative_error(adapted(episodes.query_x), expected) < 1e-12
        batches = None if batches is None else batches[1]
        alone = learner.adapt(episodes.support_x[1], episodes.support_y[1], statistics, batches)
        assert relative_error(alone(episodes.query_x[1]), expected[1]) < 1e-12
        if statistics != "transductive":  # an answer does not depend on the other queries
            assert relative_error(alone(episodes.query_x[1, :1]), expected[1, :1]) < 1e-12
            assert relative_error(expected, learner.predict(episodes)) > 1e-6


@EVERY
def test_compiled_predictions_have_the_eager_bits(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_TRIALS", 0)
    monkeypatch.setattr(prediction, "PATIENCE", 0)
    plain, compiled = trained(variant), Learner(tiny(variant, run__compile=True))
    compiled.load_state_dict(plain.state_dict())
    for seed in (1, 2):
        episodes = random_episodes(plain.config, 2, seed)
        assert torch.equal(compiled.predict(episodes), plain.predict(episodes))


@EVERY
def test_an_ensemble_answers_with_its_mean(variant: str) -> None:
    members = [trained(variant, seed) for seed in (1, 2)]
    g = torch.Generator().manual_seed(0)
    size = members[0].config.model.image_size
    images = torch.randint(256, (5 * 8, size, size, 3), generator=g, dtype=torch.uint8)
    pool = ImagePool(images, torch.arange(5).repeat_interleave(8), tuple("abcde"), "val", "noise")
    sampler = EpisodeSampler(pool, members[0].config, torch.float64)
    logits, labels = predict_tasks(members, sampler, 3, tasks_per_batch=2)
    episodes = sampler.sample(0, 3)
    assert torch.equal(labels, episodes.query_y)
    expected = torch.stack([member.predict(episodes) for member in members]).mean(0)
    assert relative_error(logits, expected) < 1e-12


@pytest.mark.parametrize("conv_bias", [False, True])
@EVERY
def test_released_names_round_trip(variant: str, conv_bias: bool) -> None:
    one, two = (learner(tiny(variant, model__conv_bias=conv_bias)) for learner in (spread, Learner))
    names = one.released_names()
    assert len(set(names.values())) == len(names)
    two.load_released({names[name]: tensor.detach() for name, tensor in one.meta_parameters.items()})
    for name, tensor in one.meta_parameters.items():
        assert torch.equal(two.meta_parameters[name], tensor), name


@pytest.mark.parametrize(
    "algorithm", ["anil", "boil", "cavia", "matchingnet", "metasgd", "modgrad", "protonet", "reptile"]
)
def test_a_released_program_without_resnet12_is_told(algorithm: str) -> None:
    with pytest.raises(InputError, match=f"the released program of {algorithm} has no parameter like our 'features.0"):
        Learner(tiny(algorithm, **ON_RESNET12)).load_released({})


def test_untrained_parameters_are_not_in_the_norm_that_is_clipped() -> None:
    """A step whose gradient is clipped to the norm that it has is the step without clipping."""
    learner = spread(tiny("alfa_random_init"))
    episodes = random_episodes(learner.config)
    declared = learner.algorithm.declared
    found = gradients(learner.meta_loss(episodes).loss, learner.meta_parameters)
    norm = torch.cat([found[name].flatten() for name in found if declared[name].trained]).norm().item()
    clipped = spread(tiny("alfa_random_init", outer__clip_norm=1.001 * norm))
    for each in (learner, clipped):
        each.meta_step(episodes)
    torch.testing.assert_close(clipped.state_dict(), learner.state_dict(), rtol=0, atol=0)


# --- the command ---


@pytest.mark.parametrize("variant", [*ALGORITHMS, "alfa_random_init"])
def test_a_run_trains_resumes_and_tests(variant: str, images: Path, tmp_path: Path) -> None:
    settings = {"inner.algorithm": algorithm_of(variant)} | VARIANTS[variant]
    changes = {name.replace(".", "__"): value for name, value in settings.items()}
    changes |= {"evaluation__validation_tasks": 2, "evaluation__test_tasks": 2, "run__checkpoint_every": 9}
    run = tmp_path / "run"
    assert train("--out", run, *words(images, **changes, outer__iterations=2)) == 0
    assert train("--resume", run, "--outer.iterations=3") == 0
    assert read_checkpoint(run / "latest.pt").iteration == 3
    assert json.loads((run / "result.json").read_text())["test"]["tasks"] == 2


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"inner__algorithm": "cavia", "inner__layers": "1,4"},
            "setting 'inner.layers' (=1, 4): conv4 has the convolutions 0 to 3, not 4",
        ),
        (
            {"inner__algorithm": "modgrad", "inner__layers": "-5"},
            "setting 'inner.layers' (=-5): conv4 has the convolutions 0 to 3, not -5",
        ),
        (
            {"inner__algorithm": "modgrad", "inner__layers": "16", "model__backbone": "resnet12"},
            "setting 'inner.layers' (=16): resnet12 has the convolutions 0 to 15, not 16",
        ),
        ({"inner__algorithm": "fomaml", "inner__order": "2"}, "setting 'inner.order' takes one of 1, got 2"),
        (
            {"inner__algorithm": "protonet", "inner__order": "1"},
            "setting 'inner.order' belongs to alfa, anil, boil, cavia, cxgrad, fomaml, l2f, maml, mamlpp, metasgd, "
            "modgrad, protomaml, reptile, not to protonet (inner.algorithm), which has 'inner.distance'",
        ),
        (
            {"inner__algorithm": "maml", "task__train_ways": "4"},
            "setting 'task.train_ways' (=4) must be task.ways (=3): the head of maml has a row for each class, only "
            "matchingnet, protomaml, protonet, relationnet have none",
        ),
        (
            {"inner__algorithm": "relationnet", "model__backbone": "resnet12"},
            "setting 'model.backbone' (=resnet12) must be conv4: relationnet has an encoder of its own",
        ),
        (
            {"inner__algorithm": "relationnet", "model__image_size": "28"},
            "setting 'model.image_size' (=28) leaves nothing of the maps that relationnet compares: use at least 46, "
            "or inner.relation_padding = 1 with at least 22",
        ),
        (
            {"inner__algorithm": "relationnet", "inner__relation_padding": "1", "model__image_size": "21"},
            "setting 'model.image_size' (=21) leaves nothing of the maps that relationnet compares: use at least 22",
        ),
        (
            {"inner__algorithm": "protonet", "inner__statistics_momentum": "0"},
            "setting 'inner.statistics_momentum' must be greater than 0, got 0.0",
        ),
        (
            {"inner__algorithm": "anil", "inner__joint": "true", "evaluation__statistics": "support"},
            "setting 'evaluation.statistics' (=support) does not go with inner.joint, which normalises support and "
            "query images together: use transductive",
        ),
        (
            {"model__conv_bias": "true", "model__norm": "layer"},
            "setting 'model.conv_bias' needs model.norm = batch, which removes the biases, not layer",
        ),
    ],
)
def test_bad_settings_are_told_and_no_folder_is_made(
    changes: dict[str, Any], told: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--out", tmp_path / "run", *words(images, **changes)) == 2
    assert capsys.readouterr().err == f"error: {told}\n"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("algorithm", ["cavia", "modgrad"])
def test_no_layers_are_told(algorithm: str) -> None:
    with pytest.raises(InputError, match=r"'inner.layers' must name at least one convolution"):
        tiny(algorithm, inner__layers=())
    assert tiny("cavia", inner__layers=(), inner__context_at_head=True).inner.layers == ()
