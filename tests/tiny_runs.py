"""A made-up image folder and settings so small that a run takes a second; for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cxgrad_fast.cli import run_command
from cxgrad_fast.config import ALGORITHMS
from cxgrad_fast.config.fields import settings_of
from cxgrad_fast.train import main

CLASSES = {"train": 8, "val": 5, "test": 5}
IMAGES_PER_CLASS = 6


def write_images(root: Path, seed: int = 0) -> Path:
    """``root/{train,val,test}/<class>/*.png`` of 16 x 16 coloured patterns, one pattern a class, with noise."""
    rng = np.random.default_rng(seed)
    for split, classes in CLASSES.items():
        for label in range(classes):
            pattern = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1)))
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(IMAGES_PER_CLASS):
                pixels = pattern + rng.normal(0, 20, pattern.shape)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def words(images: Path, **changes: object) -> list[str]:
    """A tiny run's command line; ``changes`` name settings with ``__`` for the dot: ``task__shots=2``."""
    settings: dict[str, object] = {
        "task.ways": 3,
        "task.queries": 3,
        "model.filters": 4,
        "model.image_size": 16,
        "inner.steps": 2,
        "inner.context_dim": 4,
        "outer.meta_batch": 2,
        "outer.iterations": 9,
        "outer.validate_every": 4,
        "data.source": "folder",
        "data.root": images,
        "data.cross_domain": "",
        "evaluation.ensemble": 2,
        "evaluation.validation_tasks": 5,
        "evaluation.test_tasks": 6,
        "run.device": "cpu",
        "run.precision": "float64",
        "run.checkpoint_every": 3,
    }
    settings |= {name.replace("__", "."): value for name, value in changes.items()}
    kind = ALGORITHMS.get(str(settings.get("inner.algorithm", "cxgrad")))
    if kind is not None:
        known = {spec.name for spec in settings_of(kind)}
        for name in ("steps", "context_dim"):
            if f"inner__{name}" not in changes and name not in known:
                del settings[f"inner.{name}"]
    return [f"--{name}={value}" for name, value in settings.items()]


def train(*arguments: object) -> int:
    """The train command's exit code, in this process."""
    return run_command(main, [str(argument) for argument in arguments])
