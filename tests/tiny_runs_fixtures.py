"""The fixtures of the commands' tests: ``pytest_plugins = ("tiny_runs_fixtures",)``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import train, words, write_images

from cxgrad_fast.cache_folder import cache_folder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of decoded images for one test file, here and in children, which find the operators in it."""
    folder = tmp_path_factory.mktemp("cache")
    if (usual := cache_folder()) and (usual / "operators").exists():  # not where the installed package has them
        (folder / "operators").symlink_to(usual / "operators")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXGRAD_CACHE", str(folder))
        yield


@pytest.fixture(scope="module")
def images(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up image folder."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 iterations; validated after 4, 8 and 9. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train("--out", folder, *words(images)) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")
