"""The whole engine on Triton kernels, without a GPU: in the interpreter, with the definitions' numbers."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import run_interpreted


@pytest.mark.slow
def test_a_tiny_cxgrad_trains_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    found = run_interpreted("triton_engine_child.py")
    assert len({tuple(step) for step in found["reference"]}) == 3  # three different steps: it does train
    np.testing.assert_allclose(found["triton"], found["reference"], rtol=1e-12)
    # operands of 24, 11 and 8 significant bits, in the pass before anything is adapted
    for precision, least, most in (("float32", 0, 1e-6), ("tf32", 1e-6, 3e-3), ("bfloat16", 1e-5, 3e-2)):
        error = abs(found[precision][0][1] / found["reference"][0][1] - 1)
        assert least < error < most, precision
