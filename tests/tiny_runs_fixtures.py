"""The fixtures of the commands' tests: ``pytest_plugins = ("tiny_runs_fixtures",)``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_runs import train, words, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
