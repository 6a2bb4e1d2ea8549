"""Captured meta-steps without a device: what a CUDA graph would replay is run again, on the same fixed tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import config_of, random_episodes
from torch import Tensor

from cxgrad_fast import Config, Episodes, Learner
from cxgrad_fast.engine.captured import Captured, CaptureError, CudaGraphs, Packed, Waits
from cxgrad_fast.engine.updates import build_optimizer
from cxgrad_fast.learner import NonFiniteLossError

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
RATE = 2**-10  # a captured learning rate is a float32


class Rerun:
    """Records a function by keeping it: a replay runs it, and moves its results to where they were the first time."""

    def __init__(self, warm_ups: int = CudaGraphs.WARM_UPS, may_wait: bool = False) -> None:
        self.warm_ups, self.may_wait = warm_ups, may_wait
        self.recorded = 0
        self.recording = False

    def warm_up(self, function: Callable[[], Sequence[Tensor]]) -> None:
        for _ in range(self.warm_ups):
            function()

    def record(self, function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        self.recorded += 1
        self.recording = True
        try:
            with Waits() as waits:
                function()
        finally:
            self.recording = False
        if waits.found and not self.may_wait:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = [tensor.clone() for tensor in function()]

        def replay() -> None:
            for place, tensor in zip(results, function(), strict=True):
                place.copy_(tensor)

        return replay, results


def fused(learner: Learner) -> Learner:
    """With the optimizer that a CUDA device would have, which the CPU has too."""
    outer = replace(learner.config.outer, learning_rate=RATE)
    learner.optimizer = build_optimizer(outer, learner.optimizer.param_groups[0]["params"], learner.device, fused=True)
    return learner


def pair(config: Config, graphs: Rerun | None = None) -> tuple[Learner, Learner, list[str]]:
    """A captured learner, an uncompiled one, and what the first reported."""
    told: list[str] = []
    captured, plain = fused(Learner(config)), fused(Learner(config))
    captured._captured = captured._captured_step(graphs or Rerun())
    captured._captured._report = told.append
    return captured, plain, told


def assert_same(captured: Learner, plain: Learner) -> None:
    for name, parameter in plain.meta_parameters.items():
        assert torch.equal(captured.meta_parameters[name], parameter), name
    states = (learner.state_dict() for learner in (captured, plain))
    torch.testing.assert_close(*states, rtol=0, atol=0)


def step_both(captured: Learner, plain: Learner, episodes: Episodes, iteration: int | None = None) -> None:
    ours, expected = captured.meta_step(episodes, iteration), plain.meta_step(episodes, iteration)
    for field in ("loss", "query_logits", "support_losses", "query_losses", "accuracy"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field
    for name, statistics in expected.statistics.items():
        for actual, wanted in zip(ours.statistics[name], statistics, strict=True):
            assert actual.dtype == wanted.dtype
            assert torch.equal(actual, wanted), name


CASES: dict[str, dict[str, Any]] = {
    "cxgrad": {},
    "float32": {"run.precision": "float32"},
    "maml_group_norm": {"inner.algorithm": "maml", "model.norm": "group", "model.norm_groups": 2},
    "resnet12_chunks": {"model.backbone": "resnet12", "model.filters": 2, "run.tasks_per_chunk": 1},
    "recompute": {"run.recompute": True},
    "sgd": {"outer.optimizer": "sgd"},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_uncompiled_step_to_the_bit(case: str) -> None:
    """Warming up and recording leave no trace: parameters, Adam's state, running statistics, over a few steps."""
    captured, plain, told = pair(config_of(inner__steps=1, model__image_size=16).override(CASES[case]))
    for seed in range(3):
        step_both(captured, plain, random_episodes(plain.config, 2, seed))
    assert_same(captured, plain)
    (message,) = told
    assert message.startswith("meta-step captured in ")


def test_fifty_steps_with_other_rates_and_shapes() -> None:
    graphs = Rerun(warm_ups=1)
    captured, plain, told = pair(config_of(inner__steps=1, model__image_size=16, model__filters=2), graphs)
    for seed in range(50):
        for learner in (captured, plain):
            learner.optimizer.param_groups[0]["lr"] = RATE / 2 ** (seed // 7)
        step_both(captured, plain, random_episodes(plain.config, 1 + seed // 10 % 2, seed))
    assert_same(captured, plain)
    assert graphs.recorded == 2  # one a shape, whatever the learning rate
    assert ["again, for another shape" in message for message in told] == [False, True]


def test_a_run_goes_on_from_a_checkpoint() -> None:
    """Loading replaces tensors that the graph wrote to: it is recorded again."""
    config = config_of(inner__steps=1, model__image_size=16)
    graphs = Rerun(warm_ups=1)
    captured, plain, _ = pair(config, graphs)
    step_both(captured, plain, random_episodes(config, 2, 0))
    saved = plain.state_dict()
    step_both(captured, plain, random_episodes(config, 2, 1))
    for learner in (captured, plain):
        learner.load_state_dict(saved)
    captured._captured = captured._captured_step(graphs)
    step_both(captured, plain, random_episodes(config, 2, 2))
    assert_same(captured, plain)


def test_a_checkpoint_of_another_device_keeps_this_one_s_optimizer() -> None:
    config = config_of()
    there, here = fused(Learner(config)), Learner(config)
    there.meta_step(random_episodes(config))
    here.load_state_dict(there.state_dict())
    assert here.optimizer.param_groups[0]["fused"] is None
    there.load_state_dict(here.state_dict())
    assert there.optimizer.param_groups[0]["fused"] is True


def test_adam_says_nothing_of_steps_outside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a graph can hold may warn there, which is an error in these tests: uncompiled steps, and warming up."""
    learner = fused(Learner(config_of()))
    for group in learner.optimizer.param_groups:
        group["capturable"] = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # torch 2.11 asks the first, 2.15 the second
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False))
    for _ in range(2):
        for parameter in learner.meta_parameters.values():
            parameter.grad = torch.ones_like(parameter)
        learner.optimizer.step()
        learner.load_state_dict(learner.state_dict())
        assert learner.optimizer.param_groups[0]["capturable"]


def test_a_step_that_is_not_finite_changes_nothing_and_stops_those_after_it() -> None:
    config = config_of(inner__steps=1, model__image_size=16)
    captured, plain, _ = pair(config)
    good = random_episodes(config, 2, 0)
    bad = replace(good, query_x=good.query_x * float("nan"))
    step_both(captured, plain, good)
    before = captured.state_dict()
    first, second, third = (captured.start_step(episodes) for episodes in (bad, good, good))
    torch.testing.assert_close(captured.state_dict(), before, rtol=0, atol=0)
    for pending, what in ((first, "the loss of this meta-step is not"), (second, "left out"), (third, "left out")):
        with pytest.raises(NonFiniteLossError, match=what):
            pending.on_host()
    step_both(captured, plain, random_episodes(config, 2, 1))  # whoever goes on can
    assert_same(captured, plain)


def test_results_outlive_the_next_step() -> None:
    config = config_of(inner__steps=1, model__image_size=16)
    captured, plain, _ = pair(config)
    pending = [captured.start_step(random_episodes(config, 2, seed)) for seed in range(3)]
    for seed, one in enumerate(pending):
        expected = plain.meta_step(random_episodes(config, 2, seed))
        assert torch.equal(one.result().loss, expected.loss)
        assert torch.equal(one.on_host().query_logits, expected.query_logits)


def test_what_cannot_be_captured_is_named_and_runs_uncompiled() -> None:
    config = config_of(inner__steps=1, model__image_size=16)
    captured, plain, told = pair(config)
    right = captured._captured._gradients

    def reads_a_value(parameters: Any, episodes: Any, phase: Any) -> Any:
        out, gradients = right(parameters, episodes, phase)
        return out, [gradients[0] * (1 if out.loss.item() > 0 else 2), *gradients[1:]]

    captured._captured._gradients = reads_a_value
    step_both(captured, plain, random_episodes(config, 2, 0))
    step_both(captured, plain, random_episodes(config, 2, 1))
    assert_same(captured, plain)
    (message,) = told
    assert message.startswith("the meta-step cannot be captured, going on without: operation not permitted when stream")
    assert "_local_scalar_dense reads a value" in message


def test_a_graph_that_a_caller_keeps_is_not_in_the_way() -> None:
    """On a device its nodes belong to the caller's stream; here they tell when a recording comes upon one."""
    config = config_of(inner__steps=1, model__image_size=16)
    graphs = Rerun(warm_ups=1)
    captured, plain, told = pair(config, graphs)

    def refuse(gradient: Tensor) -> None:
        if graphs.recording:
            raise RuntimeError("operation would make the legacy stream depend on a capturing blocking stream")

    episodes = random_episodes(config)
    out = captured.meta_loss(episodes)
    for parameter in captured.meta_parameters.values():
        parameter.register_hook(refuse)
    step_both(captured, plain, episodes)
    assert captured._captured is not None, told
    assert_same(captured, plain)
    assert out.loss.requires_grad


def test_the_engine_waits_for_nothing() -> None:
    """No call of a meta-step, its update included, reads a value or copies between devices."""
    config = config_of(inner__steps=1, model__image_size=16)
    captured, _, _ = pair(config, Rerun(warm_ups=1))
    assert captured._captured is not None
    captured.start_step(random_episodes(config))  # records under Waits, which the stand-in refuses to ignore
    assert captured._captured is not None


def test_waits_are_found_where_they_are() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        x.sum().item()
        x[x > 1]
        torch.empty(3, device="meta").copy_(x)
        x.to("meta")
        x.double().clone().copy_(x)  # on one device
    reasons = [line.partition(" (")[0] for line in waits.found]
    assert reasons == [
        "_local_scalar_dense reads a value",
        "index reads a value",
        "copy_ copies from cpu to meta",
        "_to_copy copies from cpu to meta",
    ]
    config = config_of()
    with Waits() as waits:
        Learner(config)._check_labels(random_episodes(config))
    assert waits.found[0].startswith("_local_scalar_dense reads a value (cxgrad_fast/learner.py:")


def test_state_is_restored_where_recording_fails() -> None:
    total = torch.ones(())

    def function(x: Tensor) -> list[Tensor]:
        total.add_(x)
        return [total * float(total.item())]

    with pytest.raises(CaptureError, match="_local_scalar_dense reads a value"):
        Captured(function, [torch.ones(())], Rerun(), lambda: {"total": total})
    assert total == 1


def test_packed_keeps_shapes_and_types() -> None:
    tensors = [torch.rand(2, 3), torch.rand((), dtype=torch.float64), torch.rand(0), torch.rand(4)]
    packed = Packed.pack(tensors)
    assert packed.dtype == torch.float64
    for actual, expected in zip(Packed(tensors).unpack(packed), tensors, strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


# --- on a device ---


@GPU
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_on_cuda_it_is_one_graph_with_the_uncompiled_numbers(precision: str) -> None:
    config = config_of(run__device="cuda", run__precision=precision)
    captured, plain = Learner(config.override({"run.compile": True})), Learner(config)
    for seed in range(5):
        step_both(captured, plain, random_episodes(config, 2, seed).to("cuda"))
    assert captured._captured is not None
    assert_same(captured, plain)
