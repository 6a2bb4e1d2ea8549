"""What several test files need: made-up episodes, errors, golden files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cxgrad_fast import Config, Episodes, Learner, files, preset
from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.case_calls import derivatives
from cxgrad_fast.kernels.cases import Case, Inputs

GOLDEN = Path(__file__).parent / "golden"


def config_of(**overrides: Any) -> Config:
    """A small float64 Config; double underscores are dots: ``config_of(inner__steps=2)``."""
    small: dict[str, object] = {
        "task.queries": 3,
        "model.filters": 4,
        "model.image_size": 21,
        "inner.context_dim": 6,
        "run.precision": "float64",
        "run.device": "cpu",
    }
    if overrides.get("inner__algorithm") == "relationnet":  # whose maps of smaller images are nothing
        small["model.image_size"] = 46
    return preset("released-mini-5w1s", small, {name.replace("__", "."): v for name, v in overrides.items()})


def random_episodes(config: Config, tasks: int = 2, seed: int = 0) -> Episodes:
    """Smooth-free random images in [0, 1], float64, labels in a shuffled order that differs between tasks."""
    g = torch.Generator().manual_seed(seed)
    task, model = config.task, config.model

    def part(per_class: int) -> tuple[Tensor, Tensor]:
        count = task.ways * per_class
        x = torch.rand(tasks, count, model.channels, model.image_size, model.image_size, generator=g).double()
        y = torch.arange(task.ways).repeat(per_class)
        return x, torch.stack([y[torch.randperm(count, generator=g)] for _ in range(tasks)])

    size, batches = config.inner.minibatch(training=True), None
    sets = (*part(task.shots), *part(task.queries))
    if size is not None:
        batches = torch.randint(task.ways * task.shots, (tasks, config.inner.steps, size or 1), generator=g)
    return Episodes(*sets, batches=batches)


def spread_parameters(learner: Learner, seed: int = 1) -> None:
    """Move all meta-parameters away from their special initial values (identity norms, zero biases).

    What an inner optimizer carries stays something that it can have: not negative.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in learner.meta_parameters.items():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=g).to(tensor.dtype))
            if learner.algorithm.declared[name].carried:
                tensor.abs_()


def lengthen_weights(learner: Learner) -> None:
    """Make inner steps turn the convolutions little, so that rounding is not amplified (bench/equal_work.py)."""
    with torch.no_grad():
        for name, tensor in learner.meta_parameters.items():
            if tensor.dim() == 4 and name.startswith("features."):
                tensor.mul_(10 / tensor.norm())
            if name == "scaler.2.bias":
                tensor.add_(10)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; NaN on either side is an infinite error."""
    actual, expected = actual.detach().double(), expected.detach().double()
    if not (actual.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


def gradients(loss: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def require_cpp() -> None:
    """Skip where there is no compiler; where there is one, operators that cannot be had are a failure."""
    reason = backends.availability()["cpp"]
    if reason.startswith("no C++ compiler"):
        pytest.skip(reason)
    assert not reason


def run_interpreted(program: str) -> dict[str, Any]:
    """The JSON that a program of this folder prints under Triton's interpreter, which is chosen before triton loads."""
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    if old and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton before 3.7 does not take the bounds of loops from numpy 2.4 on")
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name(program)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def assert_bits_repeat(case: Case, given: Inputs) -> None:
    """Outputs and derivatives of a call are the same to the bit again, and on other numbers of threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(derivatives(case, given))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(result[name], expected), name


def opcheck(operator: Any, args: Any) -> None:
    """``torch.library.opcheck``; from torch 2.15 on it reads ``.grad`` of copies that are no leaves.

    It keeps the warning about that from being shown, but not from being raised as an error.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
        torch.library.opcheck(operator, args)


class OperatorCalls(TorchDispatchMode):
    """Records the calls of our C++ operators: the operator and its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "cxgrad_fast":
            self.calls.append((func, args))
        return func(*args, **kwargs or {})

    def names(self) -> list[str]:
        """The operators called, in order."""
        return [func._schema.name.partition("::")[2] for func, _ in self.calls]

    @property
    def last(self) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """The last call of each operator, by its name."""
        return dict(zip(self.names(), self.calls, strict=True))


def golden(name: str) -> tuple[dict[str, np.ndarray], Config, Episodes]:
    """The arrays of a golden file, the Config that repeats it, and its episodes."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    said = json.loads(str(arrays.pop("config")))
    contextual = {
        "inner__context_learning_rate": said["beta"],
        "inner__context_dim": said["context_dim"],
    }
    config = config_of(
        **(contextual if said["contextual"] else {}),
        task__ways=said["ways"],
        task__shots=said["shots"],
        task__queries=said["queries_per_class"],
        model__filters=said["filters"],
        model__image_size=said["image_size"],
        model__slope=said["leaky_relu_slope"],
        model__norm_eps=said["bn_eps"],
        inner__algorithm="cxgrad" if said["contextual"] else "maml",
        inner__steps=said["steps"],
        inner__learning_rate=said["alpha"],
        inner__order=2 if said["second_order"] else 1,
    )
    keys = ("x_support", "y_support", "x_query", "y_query")
    return arrays, config, Episodes(*(torch.from_numpy(arrays[key]) for key in keys))


def give_away(path: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a file, folder or link another user's: truly where root tests, else in the eyes of ``cxgrad_fast.files``."""
    if os.geteuid() == 0:
        os.chown(path, 65534, -1, follow_symlinks=False)
        return
    given, usual = os.lstat(path), files._check_owner

    def check_owner(path: Path, status: os.stat_result, name: str = "it") -> None:
        if os.path.samestat(status, given):
            status = os.stat_result((*status[:4], 65534, *status[5:]))
        usual(path, status, name)

    patch.setattr(files, "_check_owner", check_owner)
