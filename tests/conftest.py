from __future__ import annotations

import os

import pytest
import torch

from cxgrad_fast.kernels import backends

# what a person has set in his shell must not decide what is tested
for name in ("CXGRAD_BACKEND", "CXGRAD_CACHE", "CXGRAD_CONVOLUTION", "CXGRAD_LAUNCH"):
    os.environ.pop(name, None)
# models this small spend their time in the barriers between two threads (docs/traps.md); children inherit it
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _built_operators() -> None:
    """Built and loaded once, before a test names a cache of its own."""
    backends.availability()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
