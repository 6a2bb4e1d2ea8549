"""Predicted memory against what tensors really take; chunks that fit; nothing that grows."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from helpers import config_of, random_episodes, relative_error, require_cpp

from cxgrad_fast import Learner
from cxgrad_fast.engine import memory
from cxgrad_fast.engine.memory import peak_of, plan
from cxgrad_fast.kernels import backends


def test_peak_counts_what_is_there_at_once() -> None:
    def function() -> torch.Tensor:
        a = torch.empty(1000)
        b = a + 1  # 2 x 4000 bytes
        del a
        view = b.view(10, 100)[3:]  # no memory of its own
        return view.double()  # 700 x 8

    assert peak_of(function) == 4000 + 5600


def test_peak_follows_what_autograd_keeps() -> None:
    def function() -> None:
        x = torch.empty(250, requires_grad=True)
        y = x.exp()  # kept for the backward pass
        z = y.sin()  # keeps y
        torch.autograd.grad(z.sum(), x)

    # x, y, z; then the sum and its gradient of 4 bytes each, cos y and two gradients, of which z is the one that stays
    assert 3 * 1000 < peak_of(function) <= 6 * 1000 + 8


@pytest.mark.parametrize(
    ("tasks", "available", "chunk", "expected"),
    [
        (4, 10_000, 0, 4),
        (4, 400, 0, 2),  # 0.8 * 400 = 320: 100 + 2 * 80 fits, 100 + 3 * 80 does not; two chunks of two are as good
        (5, 400, 0, 3),
        (9, 400, 0, 3),
        (4, 10, 0, 1),
        (1, 10_000, 0, 1),
        (4, 10, 3, 3),  # a person's choice
        (2, 10_000, 9, 2),
    ],
)
def test_the_largest_chunk_that_fits(tasks: int, available: int, chunk: int, expected: int) -> None:
    found = plan(lambda count: 20 + 80 * count, tasks, available, chunk)
    assert (found.chunk, found.predicted) == (expected, 20 + 80 * expected)


def test_available_is_less_than_there_is() -> None:
    free = memory.available(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 62


def in_use() -> int:
    """Bytes that the C library has given out: every tensor that is no operator's, and Python's larger objects."""

    class Info(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "o", "s", "hblks", "hblkhd", "u", "f", "uordblks")]
        _fields_ += [("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]

    library = ctypes.CDLL(None)
    library.mallinfo2.restype = Info
    found = library.mallinfo2()
    return found.uordblks + found.hblkhd


def test_the_prediction_is_what_a_step_takes() -> None:
    """Against the allocator's own count around one meta-step; scratch memory of the kernels makes the difference."""
    require_cpp()
    config = config_of(model__image_size=28, model__filters=16, task__queries=15, run__precision="float32")
    learner = Learner(config)
    predicted = learner.plan_memory(2).predicted
    assert learner.engine.tasks_per_chunk == 0
    learner.meta_step(random_episodes(config))
    backends.release_buffers()
    learner.meta_step(random_episodes(config))
    held = backends.release_buffers()  # what the arena had to take for it
    assert 0.6 * predicted < held < 1.6 * predicted


def test_chunks_are_chosen_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(inner__steps=1, model__image_size=16)
    learner, whole = Learner(config), Learner(config)
    need = learner.plan_memory(4)
    assert need.chunk == 4
    assert str(need).startswith("memory: 4 tasks, all at once: predicted peak ")
    monkeypatch.setattr(memory, "available", lambda device: need.predicted)
    assert learner.plan_memory(4).chunk == 2
    episodes = random_episodes(config, tasks=4)
    torch.testing.assert_close(learner.meta_step(episodes).loss, whole.meta_step(episodes).loss)
    for name, parameter in whole.meta_parameters.items():
        assert relative_error(learner.meta_parameters[name], parameter) < 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize(("is_compiled", "steps"), [(False, 500), (True, 2000)])
def test_nothing_grows(is_compiled: bool, steps: int) -> None:
    """Bytes in use after 200 steps and at the end."""
    config = config_of(
        inner__steps=1, model__image_size=16, model__filters=2, task__queries=1, run__compile=is_compiled
    )
    learner, episodes = Learner(config), random_episodes(config, tasks=1)
    counts = []
    for part in (200, steps - 200):
        for _ in range(part):
            learner.meta_step(episodes)
        gc.collect()
        counts.append(in_use())
    assert counts[1] - counts[0] < 50 * (steps - 200)  # the smallest tensor of a step takes 64
