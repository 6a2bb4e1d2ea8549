"""Whether two runs are the same but for rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.runs import read_metrics


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, statistics and metrics agree but for rounding; the same models were chosen."""
    left, right = read_checkpoint(one / "latest.pt"), read_checkpoint(other / "latest.pt")
    assert left.iteration == right.iteration
    assert [tuple(best) for best in left.best] == [pytest.approx(tuple(best)) for best in right.best]
    torch.testing.assert_close(left.state, right.state, rtol=1e-10, atol=1e-10)
    expected = read_metrics(other)
    for split, table in read_metrics(one).items():
        for column, values in table.items():
            assert values == pytest.approx(expected[split][column], rel=1e-10, nan_ok=True), (split, column)
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    assert results[0].pop("test") == pytest.approx(results[1].pop("test"))
    assert results[0] == results[1]
