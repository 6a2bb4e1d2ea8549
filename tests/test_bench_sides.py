"""The sides of the episodes bench do the same work, whatever the algorithm; what cannot, says why."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import equal_work
import loop
import pytest
import sides
import torch
from functional import loss_and_gradients
from helpers import config_of, gradients, random_episodes, relative_error, spread_parameters
from isolated import Direct, Isolated
from measure import Dropped
from peers import parallel_metalearn_peer
from torch import Tensor

from cxgrad_fast import Config, Episodes, Learner
from cxgrad_fast.reference import ALGORITHMS, network


def of_algorithm(name: str, **overrides: Any) -> Config:
    """Few tiny images, two tasks, two inner steps."""
    return equal_work.small_copy(config_of(inner__algorithm=name, outer__meta_batch=2, **overrides))


def checked(name: str, config: Config) -> equal_work.Verdict:
    """What the first question of the equal-work check says of a side."""
    case = equal_work.make_case(config)
    return equal_work.check_small(Direct(name), case, equal_work.truth(case))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("side", ["loop", "ours-reference"])
def test_every_algorithm_has_a_loop_and_does_its_work(side: str, algorithm: str) -> None:
    assert not checked(side, of_algorithm(algorithm)).failure


def test_what_is_not_trained_is_expected_to_stay() -> None:
    assert not checked("loop", of_algorithm("alfa").override({"inner.random_init": True})).failure


def test_gradient_descent_has_a_step_of_its_own_to_compare_with() -> None:
    config = of_algorithm("maml").override({"outer.optimizer": "sgd", "outer.learning_rate": 0.1})
    assert not checked("loop", config).failure
    assert not checked("ours-reference", config).failure


def test_tasks_are_those_of_meta_training() -> None:
    """ProtoNet trains on more classes than it is tested on."""
    config = of_algorithm("protonet", task__train_ways=7, task__train_shots=1)
    assert equal_work.make_case(config).episodes.support_x.shape[:2] == (2, 7)
    assert not checked("loop", config).failure
    assert not checked("ours-reference", config).failure


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_loop_runs_the_norms_that_the_oracle_writes_out(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are slower than torch's, which released programs have: the others would look faster than they are."""
    config = of_algorithm(algorithm)
    case = equal_work.make_case(config)
    truth = equal_work.truth(case)

    def refused(*_: Any) -> Tensor:
        raise AssertionError("the oracle's own batch norm")

    monkeypatch.setattr(network, "batch_norm", refused)
    _, found = sides.SIDES["loop"](config, case.episodes, case.parameters).gradients()
    assert max(relative_error(found[name], truth.gradients[name]) for name in found) < 1e-8
    with pytest.raises(AssertionError, match="the oracle's own"):  # the oracle has its own again
        equal_work.truth(case)


@pytest.mark.parametrize(("norm", "written_out"), [("batch", "batch_norm"), ("group", "group_norm")])
def test_torchs_norms_are_the_oracles(norm: str, written_out: str) -> None:
    x = torch.rand(3, 2, 5, 5, dtype=torch.float64)
    theta = {"a.weight": torch.rand(4, 2, 3, 3), "a.bias": torch.rand(4), "a.norm.weight": torch.rand(4)}
    theta = {name: tensor.double() for name, tensor in theta.items()} | {"a.norm.bias": torch.rand(4).double()}
    settings: dict[str, Any] = {"eps": 1e-5, "norm": norm, "norm_groups": 2, "padding": 0}
    expected = network.conv_norm(theta, "a", x, **settings)
    with loop.torchs_norms():
        found = network.conv_norm(theta, "a", x, **settings)
    assert relative_error(found, expected) < 1e-14


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_calm_parameters_keep_every_algorithm_within_the_timed_tolerance(algorithm: str) -> None:
    settings: dict[str, Any] = {"outer__meta_batch": 2, "task__queries": 5, "model__filters": 8}
    config = config_of(inner__algorithm=algorithm, run__precision="float32", **settings)
    case = equal_work.make_case(config, calm=True)
    host = Direct("ours-reference")
    host.build(config, case.episodes, case.parameters)
    assert not equal_work.check_timed(host, case, equal_work.truth(case)).failure


@pytest.mark.parametrize("algorithm", ["alfa", "mamlpp", "metasgd"])
def test_calm_learning_rates_stay_near_where_they_start(algorithm: str) -> None:
    config = of_algorithm(algorithm)
    start = {name: tensor.detach() for name, tensor in Learner(config).meta_parameters.items()}
    calm = equal_work.make_case(config, calm=True).parameters
    rates = [name for name in start if name.startswith("rates.")]
    assert rates
    for name in rates:
        assert 0 < float(((calm[name] - start[name]) / start[name]).abs().max()) < 0.6
    assert float(calm["features.0.weight"].norm()) == pytest.approx(equal_work.CALM_NORM)


def test_a_gradient_that_is_zero_but_for_rounding_is_compared_with_the_others() -> None:
    """That of a bias in front of a norm: two of them have nothing in common, and a planted one is found."""
    config = of_algorithm("maml", model__conv_bias=True)
    assert not checked("loop", config).failure
    case = equal_work.make_case(config)
    truth = equal_work.truth(case)
    largest = max(float(gradient.norm()) for gradient in truth.gradients.values())
    assert float(truth.gradients["features.1.bias"].norm()) < equal_work.VANISHING * largest

    class Planted(Direct):
        def gradients(self) -> tuple[float, dict[str, Tensor]]:
            loss, found = super().gradients()
            found["features.1.bias"] += 1e-6 * largest
            return loss, found

    assert "features.1.bias" in equal_work.check_small(Planted("loop"), case, truth).failure


@pytest.mark.parametrize(
    "overrides",
    [
        {"outer.clip_value": 0.01, "outer.clip": "network"},
        {"outer.clip_norm": 0.05},
        {"inner.random_init": True},
        {"outer.reduction": "sum"},
        {"outer.optimizer": "sgd", "outer.clip_norm": 0.05},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_the_loop_takes_the_outer_steps_of_the_engine(overrides: dict[str, object]) -> None:
    """Clipped as the settings say, and what is not trained stays where it is."""
    config = of_algorithm("alfa").override(overrides)
    case = equal_work.make_case(config)
    after = []
    for name in ("loop", "ours-reference"):
        side = sides.SIDES[name](config, case.episodes, case.parameters)
        for _ in range(3):
            side.step()
        after.append(side.parameters())
    loops, ours = after
    assert max(relative_error(loops[name], ours[name]) for name in ours) < 1e-9
    stays = [name for name in ours if torch.equal(ours[name], case.parameters[name])]
    assert bool(stays) == ("inner.random_init" in overrides)


@pytest.mark.parametrize(
    "name", ["func-vmap", "func-vmap-compiled", "jax-vmap", "jax-map", "higher", "learn2learn", "parallel-metalearn"]
)
def test_a_side_names_the_algorithms_that_it_computes(name: str) -> None:
    assert sides.refusal(name, of_algorithm("cavia")).endswith("not cavia")
    assert "computes" not in sides.refusal(name, of_algorithm("maml"))


@pytest.mark.parametrize("setting", ["conv_bias", "pool_ceil", "channels_last"])
def test_a_network_that_others_are_not_written_for_is_refused(setting: str) -> None:
    config = of_algorithm("maml").override({f"model.{setting}": True})
    for name in ("func-vmap", "higher"):
        with pytest.raises(sides.Unavailable, match=f"without {setting}"):
            sides.SIDES[name](config, *_case_of(config))


@pytest.mark.parametrize("overrides", [{}, {"inner__order": 1}, {"inner__initial_context_order": 2, "model__slope": 0}])
@pytest.mark.parametrize("algorithm", ["cxgrad", "maml", "fomaml"])
def test_func_vmap_is_the_engine(algorithm: str, overrides: dict[str, Any]) -> None:
    config = config_of(inner__steps=2, **overrides).override({"inner.algorithm": algorithm})
    learner, batch = Learner(config), random_episodes(config)
    spread_parameters(learner)
    loss = learner.meta_loss(batch).loss
    expected = gradients(loss, learner.meta_parameters)
    found, value = loss_and_gradients(config)({n: t.detach() for n, t in learner.meta_parameters.items()}, batch)
    assert relative_error(value, loss) < 1e-10
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", parallel_metalearn_peer.ALGORITHMS)
@pytest.mark.parametrize("name", ["parallel-metalearn", "parallel-metalearn-sequential"])
def test_parallel_metalearn_does_the_same_work(name: str, algorithm: str) -> None:
    config = of_algorithm(algorithm)
    reason = sides.refusal(name, config)
    if reason:
        pytest.skip(reason)
    assert not checked(name, config).failure


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"outer.reduction": "sum"}, "averages over tasks"),
        ({"outer.clip_norm": 1.0}, "does not clip"),
        ({"inner.algorithm": "boil", "inner.head_learning_rate": 0.1}, "one rate for body and head"),
        ({"model.norm": "layer"}, "batch norm"),
    ],
)
def test_parallel_metalearn_says_what_it_cannot(overrides: dict[str, object], reason: str) -> None:
    config = of_algorithm("maml").override(overrides)
    with pytest.raises(sides.Unavailable, match=reason):
        sides.SIDES["parallel-metalearn"](config, *_case_of(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours-reference", "loop", "func-vmap", "higher", "learn2learn"])
def test_sides_do_the_same_work(name: str) -> None:
    config = equal_work.small_copy(config_of(inner__algorithm="maml", outer__meta_batch=2))
    reason = sides.refusal(name, config)
    if reason:
        pytest.skip(reason)
    case = equal_work.make_case(config)
    with closing(Isolated(name, 60)) as host:
        verdict = equal_work.check_small(host, case, equal_work.truth(case))
    assert not verdict.failure


def test_a_side_in_its_own_process_is_ended_at_its_limit() -> None:
    case = equal_work.make_case(config_of(inner__steps=1))
    with closing(Isolated("loop", 0.0)) as host, pytest.raises(Dropped, match="over its limit of 0 s in its build"):
        host.build(case.config, case.episodes, case.parameters)


def test_peers_say_why_not() -> None:
    config = config_of()
    for name in ("higher", "learn2learn"):
        assert sides.refusal(name, config) == "computes maml, not cxgrad"
    maml = config_of(inner__algorithm="maml")
    for name, package in {"jax-vmap": "jax", "jax-map": "jax", "higher": "higher"}.items():
        assert sides.refusal(name, maml) in ("", f"not installed (no module named '{package}')")
    with pytest.raises(sides.Unavailable, match="conv4 with batch norm"):
        sides.SIDES["func-vmap"](config_of(model__norm="layer"), *_case_of(config_of(model__norm="layer")))


def _case_of(config: Config) -> tuple[Episodes, dict[str, Tensor]]:
    case = equal_work.make_case(config)
    return case.episodes, case.parameters
