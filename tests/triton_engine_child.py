"""A tiny CxGrad in meta-training on Triton's interpreter and on the definitions: JSON of the losses of both.

Run by tests/test_triton_engine.py, in a process of its own: kernels are made for the interpreter at their import.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

from helpers import config_of, random_episodes

from cxgrad_fast import Learner

STEPS, TASKS = 3, 1
SETTINGS = {"inner__steps": 1, "model__image_size": 16, "task__queries": 1, "task__ways": 3, "inner__context_dim": 4}


def losses(backend: str, precision: str = "float64", count: int = STEPS) -> list[list[float]]:
    """Query and support losses of every meta-step."""
    os.environ["CXGRAD_BACKEND"] = backend
    config = config_of(**SETTINGS, run__precision=precision)
    learner = Learner(config)
    steps = [learner.meta_step(random_episodes(config, TASKS, seed=seed)) for seed in range(count)]
    return [[out.loss.item(), *out.support_losses.flatten().tolist()] for out in steps]


if __name__ == "__main__":
    found = {backend: losses(backend) for backend in ("triton", "reference")}
    print(json.dumps(found | {name: losses("triton", name, 1) for name in ("float32", "tf32", "bfloat16")}))
