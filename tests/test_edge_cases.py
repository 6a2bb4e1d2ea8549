"""What one backend refuses all refuse, in the same words; what they take, they compute alike."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from edge_cases import EDGES, Edge, answer
from helpers import require_cpp, run_interpreted


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Triton's answers."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return run_interpreted("edge_cases.py")


def check(edge: Edge, found: list[Any] | str, device: str = "cpu") -> None:
    """As the table has it; what is computed, as the definition in float64 does."""
    if edge.refused:
        assert found == edge.refused.format(device=device)
        return
    assert not isinstance(found, str), found
    exact = answer(edge, "reference", torch.float64)
    assert len(found) == len(exact)
    for (shape, dtype, numbers), (wanted_shape, _, wanted) in zip(found, exact, strict=True):
        assert shape == wanted_shape
        kind = torch.float64 if edge.name.startswith("patch_statistics") else torch.float32
        assert dtype == str(kind)
        torch.testing.assert_close(
            torch.tensor(numbers, dtype=kind),
            torch.tensor(wanted, dtype=torch.float64).to(kind),
            rtol=1e-5,
            atol=edge.absolute,
            equal_nan=True,
        )


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_one_answer(backend: str, edge: Edge) -> None:
    if backend == "cpp":
        require_cpp()
    check(edge, answer(edge, backend))


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
def test_one_answer_of_triton(edge: Edge, interpreted: dict[str, Any]) -> None:
    check(edge, interpreted[edge.name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: edge.name)
def test_one_answer_on_cuda(edge: Edge) -> None:
    for backend in ("reference", "triton"):
        check(edge, answer(edge, backend, device="cuda"), "cuda:0")


def test_names_are_unique() -> None:
    assert len({edge.name for edge in EDGES}) == len(EDGES)
