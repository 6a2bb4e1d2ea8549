"""CUDA graphs on a device that is not there: what a failed capture leaves behind, and how long one waits for a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import config_of, random_episodes
from test_captured import GPU, Rerun, pair, step_both
from torch import Tensor

from cxgrad_fast import Episodes, Learner
from cxgrad_fast.engine import ALONE, RankLostError, Ranks, step
from cxgrad_fast.engine.captured import Captured, CaptureError, CudaGraphs


class Stream:
    """One of a device's, by name."""

    def __init__(self, name: str = "another") -> None:
        self.name = name
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class On:
    """``torch.cuda.stream``."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream

    def __enter__(self) -> None:
        self._before, self._device.current = self._device.current, self._stream

    def __exit__(self, *error: object) -> None:
        self._device.current = self._before


class Device:
    """What ``torch.cuda.graph``, which is torch's own here, and ``CudaGraphs`` call of a device.

    Attributes:
        current: the thread's stream.
        pools: of the allocator that captures are under way in.
        users: of each pool, how many captures.
        is_broken: whether the next capture cannot be ended.
        at_begin: called where one begins.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.callers = self.current = Stream("the caller's")
        self.pools: list[tuple[int, int]] = []
        self.users: dict[tuple[int, int], int] = {}
        self.is_broken = False
        self.at_begin: Callable[[], None] = lambda: None
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        fakes = {
            "device": lambda device: nullcontext(),
            "current_device": lambda: 0,
            "Stream": Stream,
            "stream": lambda stream: On(self, stream),
            "current_stream": lambda: self.current,
            "set_stream": self.set_stream,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "graph_pool_handle": self.new_pool,
            "CUDAGraph": lambda: Graph(self),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    def new_pool(self) -> tuple[int, int]:
        return (0, len(self.users) + 1)

    def begin_allocate(self, pool: tuple[int, int]) -> None:
        assert self.users.get(pool) != 0, "the allocator asserts that a pool that it knows has a user"
        self.pools.append(pool)
        self.users[pool] = self.users.get(pool, 0) + 1

    def end_allocate(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.users[pool] -= 1


class Graph:
    """``torch.cuda.CUDAGraph``; a replay does nothing."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def capture_begin(self, pool: tuple[int, int] | None = None, **options: object) -> None:
        """The options, of which torch 2.15 has more than 2.11, say what is refused in a capture."""
        self._pool = pool or self._device.new_pool()
        self._device.begin_allocate(self._pool)
        self._device.at_begin()

    def capture_end(self) -> None:
        if self._device.is_broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._device.end_allocate(0, self._pool)

    def pool(self) -> tuple[int, int]:
        return self._pool

    def replay(self) -> None:
        pass


# --- capture ---


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def graphs_of(device: Device) -> CudaGraphs:
    return CudaGraphs(torch.device("cuda", 0))


def test_a_broken_capture_leaves_stream_and_allocator_as_they_were(device: Device) -> None:
    graphs, streams = graphs_of(device), list[str]()

    def function() -> list[Tensor]:
        streams.append(device.current.name)
        if device.pools:
            device.is_broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return []

    with pytest.raises(CaptureError, match="previous error during capture"):
        Captured(function, [], graphs)
    assert streams == ["another"] * (graphs.WARM_UPS + 1) + ["the caller's"]  # warm-up, capture; to explain it
    assert device.current is device.callers
    assert device.pools == []
    assert set(device.users.values()) == {0}
    device.is_broken = False
    Captured(list, [], graphs)()  # and another can be captured
    assert device.current is device.callers


def test_a_capture_that_ends_with_an_error_in_it_is_left_once(device: Device) -> None:
    graphs = graphs_of(device)
    with pytest.raises(ZeroDivisionError):
        graphs.record(lambda: [1 / 0])  # type: ignore[list-item]
    assert device.current is device.callers
    assert device.pools == []
    assert set(device.users.values()) == {1}  # the graph's own end lets go of it


def test_graphs_share_their_memory(device: Device) -> None:
    graphs = graphs_of(device)
    for _ in range(2):
        graphs.record(list)
    assert list(device.users.values()) == [2]


def test_garbage_is_collected_before_a_capture(device: Device) -> None:
    """A graph of autograd that is part of a cycle would be met in it."""

    class Cycle:
        def __init__(self) -> None:
            self.own = self

    gc.disable()
    try:
        garbage = weakref.ref(Cycle())
        assert garbage() is not None
        found: list[object] = []
        device.at_begin = lambda: found.append(garbage())
        graphs_of(device).record(list)
        assert found == [None]
    finally:
        gc.enable()


def test_what_a_failed_warm_up_started_is_waited_for(device: Device) -> None:
    """The state that it wrote to is put back behind it."""

    def function() -> list[Tensor]:
        raise RuntimeError("out of memory")

    with pytest.raises(CaptureError, match="out of memory"):
        Captured(function, [], graphs_of(device))
    assert [stream.name for stream in device.callers.waited_for] == ["another"]


# --- a rank that does not come ---


class Event:
    """Comes after so many looks."""

    def __init__(self, looks: float) -> None:
        self.looks = looks

    def query(self) -> bool:
        self.looks -= 1
        return self.looks <= 0

    def synchronize(self) -> None:
        assert self.looks < float("inf"), "this waits for ever"


class Time:
    """The module ``time`` of a host that has nothing else to do."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(step, "time", found)
    return found


def shared(patience: timedelta) -> tuple[Learner, Episodes]:
    """A captured learner that believes itself one of two ranks, and its episodes."""
    config = config_of(inner__steps=1, model__image_size=16, outer__meta_batch=2)
    captured, _, _ = pair(config, Rerun(warm_ups=1))
    captured._ranks = Ranks(0, 2, timeout=patience)
    captured._captured = captured._captured_step(Rerun(warm_ups=1))
    captured._captured._report = lambda message: None
    return captured, random_episodes(config)


def waiting_for(learner: Learner, episodes: Episodes, looks: float) -> step.Pending:
    pending: Any = learner.start_step(episodes)
    pending._event = Event(looks)
    return pending


def test_a_lost_rank_ends_the_wait_for_a_captured_step(device: Device, clock: Time) -> None:
    learner, episodes = shared(timedelta(minutes=10))
    assert waiting_for(learner, episodes, 5000).result().loss.isfinite()  # slow, not lost
    assert clock.now < 600
    first, second = (waiting_for(learner, episodes, float("inf")) for _ in range(2))
    began = clock.now
    with pytest.raises(RankLostError, match=r"did not end in 600 s"):
        first.on_host()
    assert 600 < clock.now - began < 601
    went_to = device.current
    assert went_to is not device.callers  # whose work waits for the rank
    began = clock.now
    with pytest.raises(RankLostError):
        second.on_host()
    assert clock.now == began
    assert device.current is went_to
    before = learner.state_dict()
    learner.start_step(episodes)  # as those go on that were started, if the rank comes after all
    torch.testing.assert_close(learner.state_dict(), before, rtol=0, atol=0)


def test_one_process_waits_as_long_as_it_takes(clock: Time) -> None:
    learner, episodes = shared(timedelta(0))
    learner._ranks = ALONE
    learner._captured = learner._captured_step(Rerun(warm_ups=1))
    assert waiting_for(learner, episodes, 10**9).result().loss.isfinite()
    assert clock.now == 0


# --- on a device ---


@GPU
def test_after_a_failed_capture_on_cuda_steps_go_on() -> None:
    config = config_of(run__device="cuda", inner__steps=1)
    graphs, x = CudaGraphs(torch.device("cuda")), torch.ones(3, device="cuda")
    learner, plain = Learner(config), Learner(config)
    with pytest.raises(CaptureError, match="_local_scalar_dense reads a value"):
        Captured(lambda x: [x * x.sum().item()], [x], graphs)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    for seed in range(2):
        episodes = random_episodes(config, 2, seed).to("cuda")
        assert torch.equal(learner.meta_step(episodes).loss, plain.meta_step(episodes).loss)
    torch.testing.assert_close(Captured(lambda x: [2 * x], [x], graphs)(3 * x)[0], 6 * x, rtol=0, atol=0)


@GPU
def test_a_step_on_cuda_is_captured_beside_a_graph_that_a_caller_keeps() -> None:
    config = config_of(run__device="cuda", inner__steps=1)
    captured, plain = Learner(config.override({"run.compile": True})), Learner(config)
    episodes = random_episodes(config).to("cuda")
    out = captured.meta_loss(episodes)
    step_both(captured, plain, episodes)
    assert captured._captured is not None
    assert out.loss.requires_grad


@GPU
@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch is built without NCCL")
def test_an_all_reduce_on_cuda_is_captured(tmp_path: Path) -> None:
    """One rank: two need two devices."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:

        def function(x: Tensor) -> list[Tensor]:
            total = 2 * x
            dist.all_reduce(total)
            return [total]

        x = torch.arange(3.0, device="cuda")
        captured = Captured(function, [x], CudaGraphs(torch.device("cuda")))
        for factor in (1, 5):
            assert torch.equal(captured(factor * x)[0], 2 * factor * x)
    finally:
        dist.destroy_process_group()
