"""What float32 knows of dL/dnu, by the command that the README names."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import median


def test_exact_form_is_fifty_times_as_good() -> None:
    command = runpy.run_path(str(Path(__file__).parent.parent / "bench" / "context_gradient.py"))
    rows = [command["errors"](case) for case in range(12)]
    assert median(row["scaled"] / row["exact"] for row in rows) >= 50
    assert max(row["exact"] for row in rows) < 1e-4
