"""How well float32 knows dL/dnu: error against float64 of the exact and the scaled form, over random cases.

    python bench/context_gradient.py [--cases 12] [--json]

The gradient is the one that first moves the context parameters (Algorithm 1, line 9), taken by the engine itself on
random images and weights; the truth is the exact form's in float64.
"""

from __future__ import annotations

import argparse
import json
import random
from statistics import median

import torch
from torch import Tensor

from cxgrad_fast import Learner, preset


def context_gradient(overrides: dict[str, object], parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """dL/dnu at nu = 0, ``[T, D]`` float64: without inner steps nu ends at ``-beta * dL/dnu``."""
    config = preset("released-mini-5w1s", {"inner.steps": 0, "inner.context_learning_rate": 1.0, **overrides})
    learner = Learner(config)
    cast = {name: tensor.to(learner.dtype) for name, tensor in parameters.items()}
    context = learner.engine.adapt(cast, x.to(learner.dtype), y, graph=False).context
    assert context is not None
    return -context.detach().double()


def errors(case: int) -> dict[str, float]:
    """Relative errors of float32 in one random case, by form."""
    draw, g = random.Random(case), torch.Generator().manual_seed(case)
    shots = draw.choice([1, 5])
    size = draw.choice([20, 28, 42])
    overrides: dict[str, object] = {
        "run.device": "cpu",
        "task.shots": shots,
        "model.filters": draw.choice([8, 16, 32, 48]),
        "model.image_size": size,
        "model.slope": draw.choice([0.0, 0.01]),
        "run.seed": case,
    }
    x = torch.rand(2, 5 * shots, 3, size, size, generator=g)
    y = torch.arange(5).repeat(shots).expand(2, -1)
    start = Learner(preset("released-mini-5w1s", overrides)).meta_parameters
    parameters = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=g) for name, tensor in start.items()}
    parameters = {name: tensor.detach() for name, tensor in parameters.items()}
    truth = context_gradient(overrides | {"run.precision": "float64", "inner.form": "exact"}, parameters, x, y)
    found = {}
    for form in ("exact", "scaled"):
        single = context_gradient(overrides | {"inner.form": form}, parameters, x, y)
        found[form] = float((single - truth).norm() / truth.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [errors(case) for case in range(options.cases)]
    ratios = [row["scaled"] / row["exact"] for row in rows]
    if options.json:
        print(json.dumps({"cases": rows, "median_ratio": median(ratios)}))
        return
    print("relative error of dL/dnu in float32, against float64\ncase   scaled form   exact form   ratio")
    for case, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        print(f"{case:4}   {row['scaled']:11.1e}   {row['exact']:10.1e}   {ratio:5.0f}")
    print(f"median ratio {median(ratios):.0f}")


if __name__ == "__main__":
    main()
