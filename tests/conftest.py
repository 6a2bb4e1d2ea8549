from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.kernels import backends

# what a person has set in his shell must not decide what is tested
for name in ("CXGRAD_BACKEND", "CXGRAD_CACHE", "CXGRAD_CONVOLUTION", "CXGRAD_LAUNCH", "CXGRAD_ROUND_IN_SOFTWARE"):
    os.environ.pop(name, None)
os.umask(0o022)
# models this small spend their time in the barriers between two threads (docs/traps.md); children inherit it
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


# what takes longest, first: of several processes none is left with it at the end
_LONGEST = (
    "test_conv_block_triton",
    "test_distributed",
    "test_train",
    "test_first_layer_triton",
    "test_triton_engine",
    "test_memory",
    "test_gpu_script",
    "test_registration",
    "test_ways",
    "test_compare",
    "test_building",
    "test_static",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of ``_LONGEST`` in its order, then the others in theirs."""
    place = {name: index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is decoded, drawn or measured here stays out of the user's cache; children find the operators in it."""
    backends.availability()  # which builds the operators into the user's, once for all sessions, and loads them
    folder = tmp_path_factory.mktemp("cache")
    if (usual := cache_folder()) and (usual / "operators").exists():  # not where the installed package has them
        (folder / "operators").symlink_to(usual / "operators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXGRAD_CACHE", str(folder))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
