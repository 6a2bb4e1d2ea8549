"""A NaN spreads through products of every precision: the finite check and Adam's of a step live on that."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from helpers import require_cpp, run_interpreted
from not_numbers import BITS, PRECISIONS, lost

from cxgrad_fast.kernels.conv_block import cpp


@pytest.mark.parametrize("bits", BITS, ids=hex)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_none_is_lost_in_cpp(precision: str, bits: int) -> None:
    require_cpp()
    assert lost(cpp._chain(precision), bits) == []


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What is lost in Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return run_interpreted("not_numbers.py")


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS, ids=hex)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_none_is_lost_in_triton(precision: str, bits: int, interpreted: dict[str, Any]) -> None:
    assert interpreted[precision][str(bits)] == []
