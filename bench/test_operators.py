"""Time, GFLOP/s, GB/s and memory of every operator, derivative and backend over the large cases of the table.

    python -m pytest bench/test_operators.py [-k quick] [--benchmark-json FILE]

``-k quick`` keeps the 28x28 cases, minutes on two cores. A case is timed only after its float32 results, to the second
derivative, agreed with float64 of the reference. Backends that cannot run here are skipped with their reason.

- ``forward``: the call, its graph recorded. ``backward``: first gradients from a recorded graph. ``double_backward``:
  gradients of those, which includes the forward operator's own backward pass (MATH.md 1: six convolution units).
- GFLOP/s counts the products that the *definition* needs, dense, so that the same number compares backends; GB/s counts
  arguments read and results written once.
- ``saved_mb``: what the recorded graph holds for later passes; ``peak_mb`` (CUDA): the most that was allocated.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cxgrad_fast.kernels import backends, use_backend
from cxgrad_fast.kernels.case_calls import call, derivatives, like
from cxgrad_fast.kernels.cases import CASES, Case, Inputs, inputs

STAGES = ("forward", "backward", "double_backward")
DEVICES = {"reference": ("cpu", "cuda"), "cpp": ("cpu",), "triton": ("cuda",)}
# of float32 against float64: sums over up to a million positions, and arg-max positions that rounding moves
TOLERANCE = {"output": 1e-4, "d": 2e-2, "dd": 5e-2}
CHECKED_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # of a convolution output: what float64 has memory for
LARGE = [case for case in CASES if case.large]


def name_of(value: object) -> str:
    if isinstance(value, Case):
        return f"{value.operator}-{value.name}{'-quick' if value.name.startswith('glyphs') else ''}"
    return str(value)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    flags: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", LARGE, ids=name_of)
@pytest.mark.parametrize(("backend", "device"), [(b, d) for b, devices in DEVICES.items() for d in devices])
def test_operator(benchmark: Any, backend: str, device: str, case: Case, stage: str) -> None:
    skip_unless_it_runs(backend, device)
    given = inputs(case, torch.float32, device, seed=zlib.crc32(case.name.encode()))
    if stage != "forward" and not given.tensors:
        pytest.skip("constants of an image set: no derivative")
    with use_backend(backend):
        check(case, backend, device)
        timed, saved, moved = stage_of(case, given, stage)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        benchmark.pedantic(synchronised(timed, device), rounds=7, iterations=1, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info.update(
        backend=backend,
        device=device,
        operator=case.operator,
        case=case.name,
        stage=stage,
        gflops=flops(case, stage) / seconds / 1e9,
        gbytes=moved / seconds / 1e9,
        saved_mb=saved / 1e6,
    )
    if device == "cuda":
        benchmark.extra_info["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6


def skip_unless_it_runs(backend: str, device: str) -> None:
    reason = backends.availability()[backend]
    if reason:
        pytest.skip(f"{backend}: {reason}")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


_checked: set[tuple[Case, str, str]] = set()


def check(case: Case, backend: str, device: str) -> None:
    """Outputs and derivatives in float32 against float64 of the reference, once a case and backend.

    Where float64 would not fit, fewer images stand in for all.
    """
    if (case, backend, device) in _checked:
        return
    a_pair = max(1, case.tasks * case.out * case.height * case.width)
    small = replace(case, images=max(1, min(case.images, CHECKED_ELEMENTS[device] // a_pair)))
    single = inputs(small, torch.float32, device, seed=7)
    with use_backend(backend):
        found = derivatives(small, single)
    with use_backend("reference"):
        wanted = derivatives(small, single.to(torch.float64))
    for name, expected in wanted.items():
        assert found[name].isfinite().all(), f"{name} is not finite"
        error = (found[name].double() - expected.double()).norm()
        allowed = TOLERANCE[name.partition(".")[0]] * expected.norm()
        assert error <= allowed, f"{name} of {case.name} is wrong: {error:.2e} > {allowed:.2e}"
    _checked.add((case, backend, device))


def stage_of(case: Case, given: Inputs, stage: str) -> tuple[Callable[[], Sequence[Tensor]], int, int]:
    """What is timed, the bytes its recorded graph saved, and the bytes of its arguments and results."""
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = torch.Generator().manual_seed(1)
    leaves = list(given.tensors.values())
    constants = [value for value in given.constants.values() if isinstance(value, Tensor)]
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        outputs = call(case, given)
        if stage == "forward":
            return lambda: call(case, given), sum(saved.values()), size(leaves, constants, outputs)
        cotangents = [cotangent.requires_grad_() for cotangent in like(outputs, generator)]
        second = stage == "double_backward"
        first = torch.autograd.grad(outputs, leaves, cotangents, create_graph=second, retain_graph=True)
    if not second:
        run = lambda: torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)  # noqa: E731
        return run, sum(saved.values()), size(leaves, constants, cotangents, first)
    theirs, wanted = like(first, generator), [*leaves, *cotangents]

    def again() -> Sequence[Tensor]:
        return torch.autograd.grad(first, wanted, theirs, retain_graph=True, allow_unused=True)

    return again, sum(saved.values()), size(leaves, constants, cotangents, theirs, wanted)


def size(*groups: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group)


def flops(case: Case, stage: str) -> int:
    """Products of the definition: 1, 2 and 6 convolution units, one less or four for images; nothing elementwise."""
    if case.operator == "patch_statistics":
        return 2 * case.tasks * case.images * case.height * case.width * (9 * case.channels) ** 2
    if case.operator != "conv_block":
        return 0
    unit = 2 * case.kernel**2 * case.channels * case.out * case.height * case.width * case.images * case.tasks
    return unit * ((1, 1, 2) if case.first_layer else (1, 2, 6))[STAGES.index(stage)]


def synchronised(run: Callable[[], object], device: str) -> Callable[[], None]:
    def timed() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return timed
