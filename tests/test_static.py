"""Compiled meta-steps: the uncompiled ones' numbers to the bit, one program a shape, said in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import config_of, random_episodes, require_cpp
from torch import Tensor

from cxgrad_fast import Config, Learner
from cxgrad_fast.config import preset
from cxgrad_fast.engine import StaticGradients, static
from cxgrad_fast.engine.flat import Flat

CASES: dict[str, dict[str, Any]] = {
    "cxgrad": {},
    "float32": {"run.precision": "float32"},
    "scaled": {"inner.form": "scaled"},
    "step_wise": {"inner.context_update": "step"},
    "first_order": {"inner.order": 1},
    "maml": {"inner.algorithm": "maml"},
    "odd_rows_kept": {"model.pool_ceil": True},
    "group_norm": {"model.norm": "group", "model.norm_groups": 2},
    "resnet12": {"model.backbone": "resnet12", "model.filters": 2},
    "chunks": {"run.tasks_per_chunk": 1},
    "recompute": {"run.recompute": True},
}


def pair(config: Config) -> tuple[Learner, Learner, list[str]]:
    """A compiled learner that never goes back to the uncompiled step, an uncompiled one, and what was reported."""
    told: list[str] = []
    compiled, plain = Learner(config.override({"run.compile": True})), Learner(config)
    compiled._gradients = StaticGradients(compiled._loss_and_gradients, told.append)
    return compiled, plain, told


def assert_equal_steps(
    compiled: Learner, plain: Learner, steps: int, tasks: int = 2, iteration: int | None = None
) -> None:
    for seed in range(steps):
        episodes = random_episodes(plain.config, tasks, seed=seed)
        ours, expected = compiled.meta_step(episodes, iteration), plain.meta_step(episodes, iteration)
        for field in ("loss", "query_logits", "support_losses", "query_losses", "accuracy"):
            actual = getattr(ours, field)
            assert torch.equal(actual, getattr(expected, field)), field
            assert not actual.requires_grad
    for name, parameter in plain.meta_parameters.items():
        assert torch.equal(compiled.meta_parameters[name], parameter), name
    for name, statistics in plain.running_statistics.items():
        for actual, wanted in zip(compiled.running_statistics[name], statistics, strict=True):
            assert torch.equal(actual, wanted), name


@pytest.mark.parametrize(("algorithm", "most"), [("cxgrad", 325), ("maml", 225)])
def test_a_meta_step_is_few_calls(algorithm: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operator calls of glyphs-5w1s, 2 tasks; before the operators of update, head and scaler 1,614 and 869."""
    require_cpp()
    monkeypatch.setenv("CXGRAD_BACKEND", "cpp")
    config = preset("glyphs-5w1s", {"inner.algorithm": algorithm})
    compiled, _, told = pair(config)
    compiled.meta_step(random_episodes(config, config.outer.meta_batch))
    assert int(told[0].split()[-3]) <= most, told


# the definitions write into their tensors, which the program then may not take apart
@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend"), [*((case, "cpp") for case in CASES), ("maml", "reference")])
def test_equals_the_uncompiled_step_to_the_bit(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cpp":
        require_cpp()
    monkeypatch.setenv("CXGRAD_BACKEND", backend)
    monkeypatch.setattr(static, "_TRIALS", 0)  # the program alone
    compiled, plain, told = pair(config_of(inner__steps=1, model__image_size=16).override(CASES[case]))
    assert_equal_steps(compiled, plain, steps=2)
    assert len(told) == 1
    assert told[0].startswith("meta-step compiled in ")


@pytest.mark.slow
def test_fifty_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_TRIALS", 0)
    compiled, plain, _ = pair(config_of(inner__steps=1, model__image_size=16))
    assert_equal_steps(compiled, plain, steps=50)


@pytest.mark.slow
def test_one_program_a_shape() -> None:
    """Other values, another learning rate or more steps compile nothing; another meta-batch does, once, and says so."""
    compiled, plain, told = pair(config_of(inner__steps=1))
    for tasks in (2, 1, 2, 1):
        for learner in (compiled, plain):
            learner.optimizer.param_groups[0]["lr"] /= 2
        assert_equal_steps(compiled, plain, steps=1, tasks=tasks)
    assert ["again, for another shape" in message for message in told] == [False, True]


@pytest.mark.parametrize(("own", "kept"), [(2.0, False), (0.5, True)])
def test_what_does_not_pay_is_dropped(own: float, kept: bool) -> None:
    compiled, plain, told = pair(config_of(inner__steps=1))
    # compiling, then the program and the uncompiled step in turns; a busy machine holds the better one up, mostly
    held_up = [0.0, 9.0, 0.0, 1.0] if kept else [0.0, 2.0, 0.0, 9.0]
    clock = iter([0.0, 9.0, *held_up, *[0.0, own, 0.0, 1.0] * 2, *held_up, *held_up])
    compiled._gradients = StaticGradients(compiled._loss_and_gradients, told.append, lambda: next(clock))
    assert_equal_steps(compiled, plain, steps=12)
    (static,) = compiled._gradients.statics.values()
    (program,) = static._programs.values()
    assert (program is not None) is kept
    dropped = ["compiling the meta-step does not pay here (0.50 of the uncompiled speed): going on without"]
    assert told[1:] == ([] if kept else dropped)


def test_what_cannot_be_traced_runs_uncompiled() -> None:
    config = config_of(inner__steps=1)
    learner, told = Learner(config), []

    def reads_a_value(parameters: Any, episodes: Any, phase: Any) -> Any:
        out, gradients = learner._loss_and_gradients(parameters, episodes, phase)
        return out, [gradients[0] * (out.loss.item() > 0), *gradients[1:]]

    learner._gradients = StaticGradients(reads_a_value, told.append)
    plain = Learner(config)
    assert_equal_steps(learner, plain, steps=2)
    (message,) = told
    assert message.startswith("the meta-step cannot be compiled, going on without: ")


def test_flat_program_is_short() -> None:
    """Copies, views that undo each other, calls made before and what nobody asks for are gone."""

    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        unused = (a * 3).sum()
        del unused
        turned = a.t().t().unsqueeze(0).squeeze(0).detach()
        return [turned * b + a * b, (a * b).transpose(0, 1).transpose(1, 0)]

    a, b = torch.randn(3, 4), torch.randn(3, 4)
    flat = Flat(function, [a, b])
    assert flat.calls == 2  # the product and the sum
    for actual, expected in zip(flat(b, a), function(b, a), strict=True):
        assert torch.equal(actual, expected)


def test_flat_program_keeps_what_is_written() -> None:
    def function(a: Tensor) -> list[Tensor]:
        twice, total = a * 2, torch.zeros_like(a)
        again = a * 2  # equal so far
        total += twice
        again += total
        return [twice, again, total.detach()]

    a = torch.randn(3)
    for actual, expected in zip(Flat(function, [a])(a + 1), function(a + 1), strict=True):
        assert torch.equal(actual, expected)


def test_flat_program_tells_one_from_true() -> None:
    """Arguments that compare equal but are of different types are different calls."""

    def function(a: Tensor) -> list[Tensor]:
        return [torch.full_like(a, 1), torch.full_like(a, True), a + 1, a + 1.0]

    a = torch.arange(3)
    for actual, expected in zip(Flat(function, [a])(a), function(a), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
