"""The whole engine on Triton kernels, without a GPU: in the interpreter, with the definitions' numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

CHILD = Path(__file__).parent / "triton_engine_child.py"


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton's interpreter needs numpy < 2.4")
def test_a_tiny_cxgrad_trains_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "CXGRAD_BACKEND"}
    command = [sys.executable, "-W", "ignore", str(CHILD)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len({tuple(step) for step in found["reference"]}) == 3  # three different steps: it does train
    np.testing.assert_allclose(found["triton"], found["reference"], rtol=1e-12)
    # operands of 24, 11 and 8 significant bits, in the pass before anything is adapted
    for precision, least, most in (("float32", 0, 1e-6), ("tf32", 1e-6, 3e-3), ("bfloat16", 1e-5, 3e-2)):
        error = abs(found[precision][0][1] / found["reference"][0][1] - 1)
        assert least < error < most, precision
