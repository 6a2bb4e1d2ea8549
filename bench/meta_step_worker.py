"""A process that times meta-steps on demand, for bench/compare.py: which package it times is its environment's matter.

    python bench/meta_step_worker.py '{"preset": "glyphs-5w1s", "overrides": {}, "steps": 5}'

It uses the public contract of the package alone, so that any commit can be on the other end. After a warm-up it prints
one JSON line, loss and gradient norms of the first meta-step; then, for every line on stdin, the seconds of ``steps``
meta-steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields

import torch

from cxgrad_fast import Config, Episodes, Learner, preset


def episodes_of(config: Config, images: Callable[[tuple[int, ...]], torch.Tensor]) -> Episodes:
    """A meta-batch of the config's shape, from what makes images of a shape."""
    task, model, tasks = config.task, config.model, config.outer.meta_batch
    task = task.of_training() if hasattr(task, "of_training") else task

    def part(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(task.ways).repeat(per_class).expand(tasks, -1)
        return images((tasks, task.ways * per_class, model.channels, model.image_size, model.image_size)), labels

    # nobody has to read the labels then: on a device that would wait for it, four times a step
    known = {"ways": task.ways} if any(field.name == "ways" for field in fields(Episodes)) else {}
    return Episodes(*part(task.shots), *part(task.queries), **known)


def random_episodes(learner: Learner) -> Episodes:
    """A meta-batch of random images, drawn on the CPU: the same numbers for everybody."""
    generator = torch.Generator().manual_seed(0)
    drawn = episodes_of(learner.config, lambda shape: torch.rand(shape, generator=generator))
    return drawn.to(learner.device, learner.dtype)


def main() -> None:
    job = json.loads(sys.argv[1])
    learner = Learner(preset(job["preset"], job["overrides"]))
    episodes = random_episodes(learner)
    out = learner.meta_loss(episodes)
    parameters = learner.meta_parameters
    gradients = torch.autograd.grad(out.loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    norms = {name: gradient.norm().item() for name, gradient in zip(parameters, gradients, strict=True)}
    learner.meta_step(episodes)
    print(json.dumps({"loss": out.loss.item(), **norms}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        for _ in range(job["steps"]):
            learner.meta_step(episodes)
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
