"""What the state of a Learner must look like under a Config, and what released checkpoints call its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxgrad_fast.algorithms import Algorithm, build_algorithm
from cxgrad_fast.config import Config, InputError
from cxgrad_fast.config.fields import LARGEST_NUMBER
from cxgrad_fast.models import NORM, Parameter, build_backbone
from cxgrad_fast.schema import FLOATING, Check, anything, items, number, odd_kind, record, refuse, table, tensor, whole

Shapes = Mapping[str, Sequence[int]]


def names_in(table: Mapping[str, str], parameters: Iterable[str], algorithm: str) -> dict[str, str]:
    """Our names of parameters -> a released program's.

    Raises:
        InputError: that program has no such parameter: it has another backbone.
    """
    names = list(parameters)
    if odd := [name for name in names if name not in table]:
        raise InputError(f"the released program of {algorithm} has no parameter like our '{odd[0]}'")
    return {name: table[name] for name in names}


def program_of(algorithm: Algorithm, state_dict: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Our names -> those of the released program whose checkpoint this is, and those of the running statistics in it.

    Returns:
        the names of all parameters and, where the algorithm has the program's running statistics, of these; by
        convolution our names of mean and variance among them.

    Raises:
        InputError: as :func:`names_in`.
    """
    kind = algorithm.config.algorithm
    names = names_in(algorithm.released, algorithm.declared, kind)
    chosen = algorithm.released
    for other in algorithm.also_released:
        if set(algorithm.declared) <= set(other) and {other[name] for name in algorithm.declared} <= set(state_dict):
            names, chosen = names_in(other, algorithm.declared, kind), other
    running = {
        layer: [f"{layer}.norm.running_{part}" for part in ("mean", "var")]
        for layer in normalised(algorithm.declared)
        if algorithm.running_share(layer) is not None
    }
    moving = {name: chosen[name] for pair in running.values() for name in pair}
    if not moving or not set(moving.values()) <= set(state_dict):
        return names, {}
    return names | moving, running


def arrays_of(state_dict: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a released checkpoint by our names, arrays as tensors.

    Raises:
        ValueError: one is missing (named).
    """
    values: dict[str, Any] = {}
    for name, theirs in names.items():
        if theirs not in state_dict:
            raise ValueError(f"released checkpoint has no '{theirs}' (our {name})")
        value = state_dict[theirs]
        is_array = isinstance(value, np.ndarray) and value.dtype.name in ("float16", "float32", "float64")
        values[name] = torch.tensor(value) if is_array else value
    return values


def normalised(declared: Mapping[str, Parameter]) -> dict[str, Sequence[int]]:
    """The convolutions that a norm follows -> its shape, ``[C]`` or ``[steps, C]``."""
    end = ".norm.weight"
    return {name.removesuffix(end): p.shape for name, p in declared.items() if p.role == NORM and name.endswith(end)}


def check_parameters(values: Mapping[str, Any], shapes: Shapes, where: str) -> None:
    """That ``values`` are floating-point tensors of these names and shapes.

    Raises:
        ValueError: the first that is not (named, after ``where``).
    """
    odd = sorted(set(values) ^ set(shapes))
    if odd:
        raise ValueError(f"{where}: parameter '{odd[0]}' is not on both sides: other algorithm or backbone?")
    for name, shape in shapes.items():
        value = values[name]
        if isinstance(value, Tensor) and not odd_kind(value) and list(value.shape) != list(shape):
            raise ValueError(
                f"{where}: parameter '{name}' must be {list(shape)} by the config, got {list(value.shape)}"
            )
        tensor(*FLOATING)(value, f"{where}: parameter '{name}'")


def check_state(config: Config, state: Any, optimizer: bool = True) -> None:
    """That ``state`` is what ``Learner(config).state_dict()`` could give, but for the numbers in it.

    Args:
        config: the settings.
        state: anything.
        optimizer: False: its part may be missing or be anything.

    Raises:
        ValueError: the first thing that is not (its place, expected, got).
    """
    if not isinstance(state, Mapping):
        raise refuse("state", "a dictionary", state)
    declared = build_algorithm(config, build_backbone(config.model)).declared
    shapes = {name: parameter.shape for name, parameter in declared.items()}
    trained = [parameter.shape for parameter in declared.values() if parameter.trained]
    record(
        parameters=table(anything),
        statistics=table(anything),
        steps_averaged=whole(),
    )(dict(state), "state")
    check_parameters(state["parameters"], shapes, "state")
    _check_statistics(normalised(declared), state["statistics"])
    if optimizer:
        check = check_adam if config.outer.optimizer == "adam" else check_sgd
        record(optimizer=lambda value, where: check(value, trained, where))(dict(state), "state")


def _check_statistics(channels: Shapes, statistics: Mapping[str, Any]) -> None:
    if odd := sorted(set(statistics) ^ set(channels)) if statistics else []:
        raise ValueError(f"state: the statistics of '{odd[0]}' are not on both sides: other backbone?")
    for name, value in statistics.items():
        tensor(*FLOATING, shape=(2, channels[name][-1]))(value, f"state: the statistics of '{name}'")


_RATE = number(0, LARGEST_NUMBER)


def check_sgd(state: Any, shapes: Sequence[Sequence[int]], where: str) -> None:
    """As :func:`check_adam`, of ``torch.optim.SGD`` without momentum, which has nothing to go on from."""
    _check_group(state, len(shapes), where)


def _check_group(state: Any, count: int, where: str, **others: Check) -> list[int]:
    """That an optimizer's state has one group, of so many parameters; their indices."""
    group = record(lr=_RATE, weight_decay=_RATE, params=items(whole()), **others)
    record(state=table(table(anything), whole()), param_groups=items(group, 1))(state, where)
    indices, found = list(range(count)), state["param_groups"][0]["params"]
    if found != indices:
        raise refuse(f"{where}.param_groups[0].params", f"the {count} parameters", found)
    return indices


def check_adam(state: Any, shapes: Sequence[Sequence[int]], where: str) -> None:
    """That ``state`` is the ``state_dict()`` of ``torch.optim.Adam`` over parameters of these shapes, one group."""
    indices = _check_group(state, len(shapes), where, betas=items(number(0, math.nextafter(1, 0)), 2), eps=_RATE)
    if state["state"] and sorted(state["state"]) != indices:
        raise refuse(f"{where}.state", f"empty or of {len(shapes)} parameters", list(state["state"]))
    for index, moments in state["state"].items():
        moment = tensor(*FLOATING, shape=shapes[index])
        check = record(step=tensor(*FLOATING, shape=()), exp_avg=moment, exp_avg_sq=moment)
        check(moments, f"{where}.state[{index}]")
        step = moments["step"].item()
        if not 0 <= step < math.inf:
            raise refuse(f"{where}.state[{index}].step", "a number from 0 on", step)
