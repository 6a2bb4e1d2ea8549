"""What a precision knows of the inner loop's gradients: errors of dL/dnu and dL/dw against float64, over random cases.

    python bench/context_gradient.py [--cases 12] [--json]

dL/dnu is the gradient that first moves the context parameters (Algorithm 1, line 9), dL/dw that of MAML's first step by
the convolutions' weights; both are taken by the engine itself on random images and weights, at the start of a task. The
truth is the exact form's in float64. tf32 and bfloat16 round the factors of the convolutions as tensor cores and AMX
do: on CPUs without them, in software.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cxgrad_fast import Learner, preset
from cxgrad_fast.algorithms import State

PRECISIONS = ("float32", "tf32", "bfloat16")
_RATE = 1024.0  # so large that weights are lost in their updates, not the other way round


@dataclass(frozen=True)
class Case:
    """Settings, meta-parameters and a support set."""

    overrides: dict[str, object]
    parameters: dict[str, Tensor]
    x: Tensor
    y: Tensor


def make_case(case: int) -> Case:
    """The random case of that number."""
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
    return Case(overrides, {name: tensor.detach() for name, tensor in parameters.items()}, x, y)


def context_gradient(case: Case, **settings: str) -> Tensor:
    """dL/dnu at nu = 0, ``[T, D]`` float64: without inner steps nu ends at ``-beta * dL/dnu``."""
    context = _adapted(case, {"inner.steps": 0, "inner.context_learning_rate": 1.0}, settings).carried["context"]
    return -context.double()


def weight_gradient(case: Case, **settings: str) -> Tensor:
    """dL/dw of all convolutions, ``[T, ...]`` float64: after one step ``w' = w - alpha * dL/dw``."""
    overrides = {"inner.algorithm": "maml", "inner.steps": 1, "inner.learning_rate": _RATE}
    weights = _adapted(case, overrides, settings).fast
    convolutions = [name for name, tensor in case.parameters.items() if tensor.dim() == 4]
    moved = [case.parameters[name].double() - weights[name].double() for name in convolutions]
    return torch.cat([(difference / _RATE).flatten(1) for difference in moved], 1)  # [T, ...]


def _adapted(case: Case, overrides: dict[str, object], settings: dict[str, str]) -> State:
    given = {name.replace("__", "."): value for name, value in settings.items()}
    learner = Learner(preset("released-mini-5w1s", case.overrides, overrides, given))
    parameters = {name: tensor.to(learner.dtype) for name, tensor in case.parameters.items()}
    with learner._operators():
        return learner.engine.adapted(parameters, case.x.to(learner.dtype), case.y, "transductive", {}).state


def errors(number: int) -> dict[str, float]:
    """Relative errors of dL/dnu in float32 in one random case, by form."""
    case = make_case(number)
    truth = context_gradient(case, run__precision="float64", inner__form="exact")
    return {form: _error(context_gradient(case, inner__form=form), truth) for form in ("exact", "scaled")}


def precision_errors(number: int) -> dict[str, dict[str, float]]:
    """Relative errors of both gradients in one random case, by precision."""
    case = make_case(number)
    gradients = {"dL/dnu": context_gradient, "dL/dw": weight_gradient}
    truths = {name: gradient(case, run__precision="float64") for name, gradient in gradients.items()}
    return {
        precision: {
            name: _error(gradient(case, run__precision=precision), truths[name]) for name, gradient in gradients.items()
        }
        for precision in PRECISIONS
    }


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["CXGRAD_ROUND_IN_SOFTWARE"] = "1"
    rows = [errors(case) for case in range(options.cases)]
    ratios = [row["scaled"] / row["exact"] for row in rows]
    precisions = [precision_errors(case) for case in range(options.cases)]
    if options.json:
        print(json.dumps({"cases": rows, "median_ratio": median(ratios), "precisions": precisions}))
        return
    print("relative error of dL/dnu in float32, against float64\ncase   scaled form   exact form   ratio")
    for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        print(f"{number:4}   {row['scaled']:11.1e}   {row['exact']:10.1e}   {ratio:5.0f}")
    print(f"median ratio {median(ratios):.0f}\n")
    print("| precision | error of dL/dw, median (least to most) | error of dL/dν |\n|---|---|---|")
    for precision in PRECISIONS:
        cells = []
        for name in ("dL/dw", "dL/dnu"):
            found = sorted(row[precision][name] for row in precisions)
            cells.append(f"{median(found):.1e} ({found[0]:.1e} to {found[-1]:.1e})")
        print(f"| {precision} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
