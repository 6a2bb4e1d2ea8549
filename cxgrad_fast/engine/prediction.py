"""Query logits of batches of tasks: validation and testing, compiled with ``run.compile``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cxgrad_fast.config import Config
from cxgrad_fast.engine.captured import Captured, CudaGraphs, Graphs
from cxgrad_fast.engine.flat import Flat
from cxgrad_fast.engine.meta_loss import Engine
from cxgrad_fast.engine.static import Function, Static
from cxgrad_fast.episodes import Episodes
from cxgrad_fast.models import LayerStatistics

PATIENCE = 12  # batches: the last one of a validation is smaller than the others, and alone of its size


class Predictions:
    """Logits of adapted networks, as programs of parameters and images: for all learners of one Config.

    Args:
        engine: the Config's.
        compiler: None for no programs; else as for :class:`cxgrad_fast.engine.static.Static`.
        trials, patience: the same.
    """

    def __init__(
        self,
        engine: Engine,
        compiler: Callable[[Function, Sequence[Tensor]], Function] | None,
        trials: int | None = None,
        patience: int | None = None,
    ) -> None:
        self._engine, self._compiler, self._trials = engine, compiler, trials
        self._patience = PATIENCE if patience is None else patience
        self._programs: dict[tuple[str, ...], Function] = {}

    def __call__(
        self,
        parameters: Mapping[str, Tensor],
        episodes: Episodes,
        statistics: str,
        running: Mapping[str, LayerStatistics],
    ) -> Tensor:
        """Logits ``[T, N*Q, N]``; the arguments are those of :meth:`Engine.adapted`."""
        running = running if statistics == "running" else {}
        images = episodes.tensors()
        del images["query_y"]
        key = (statistics, *running, *images)
        if key not in self._programs:
            function = self._function(statistics, list(parameters), list(running), list(images))
            self._programs[key] = function if self._compiler is None else self._compiled(function)
        given = [tensor for pair in running.values() for tensor in pair]
        (logits,) = self._programs[key](*parameters.values(), *given, *images.values())
        return logits

    def _compiled(self, function: Function) -> Function:
        assert self._compiler is not None
        return Static("prediction", function, self._compiler, trials=self._trials, patience=self._patience)

    def _function(self, statistics: str, names: Sequence[str], layers: Sequence[str], sets: Sequence[str]) -> Function:
        def function(*tensors: Tensor) -> list[Tensor]:
            given, images = tensors[: -len(sets)], dict(zip(sets, tensors[-len(sets) :], strict=True))
            parameters = dict(zip(names, given, strict=False))
            pairs = zip(given[len(names) :: 2], given[len(names) + 1 :: 2], strict=True)
            running = dict(zip(layers, pairs, strict=True))
            query_x = images.pop("query_x")
            adaptation = self._engine.adapted(parameters, **images, statistics=statistics, running=running)
            return [self._engine.answer(adaptation, query_x)]

        return function


_shared: WeakValueDictionary[tuple[Config, torch.device], Predictions] = WeakValueDictionary()


def predictions_of(config: Config, engine: Engine, device: torch.device) -> Predictions:
    """The predictions of a Config on a device; an ensemble's learners compile them once."""
    if not config.run.compile:
        return Predictions(engine, None)
    key = (config, device)
    found = _shared.get(key)
    if found is None:
        found = Predictions(engine, Flat) if device.type != "cuda" else captured_predictions(engine, CudaGraphs(device))
        _shared[key] = found
    return found


def captured_predictions(engine: Engine, graphs: Graphs, patience: int | None = None) -> Predictions:
    """As replays of what ``graphs`` record."""

    def compiler(function: Function, inputs: Sequence[Tensor]) -> Function:
        captured = Captured(function, inputs, graphs)
        return lambda *tensors: [result.clone() for result in captured(*tensors)]

    return Predictions(engine, compiler, trials=0, patience=patience)
