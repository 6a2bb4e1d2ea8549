"""A side in a process of its own: its time limit can be enforced, its memory is its own, its threads disturb nobody.

All such processes are children of the bench and wait on their pipes; only the one that was asked works.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from measure import Dropped, count_operators, peak_memory, synchronize
from side import Parameters, Side, Unavailable, device_of
from sides import SIDES
from torch import Tensor

from cxgrad_fast import Config, Episodes

Arrays = dict[str, np.ndarray]
STARTING_S = 120.0  # to import everything
TURN_S = 2.0  # seconds of steps in a row that a turn should time, where a step is short
TURN_STEPS = (2, 10)  # the fewest and the most of them


class Turn(NamedTuple):
    """Seconds of meta-training steps that followed each other in one process.

    Attributes:
        cold: of the first, behind the turns of other processes: its data were no longer in the caches.
        steps: of each step after it, as in training.
    """

    cold: float
    steps: list[float]

    @property
    def mean(self) -> float:
        return sum(self.steps) / len(self.steps)


class Host(Protocol):
    """Builds a side and runs it; raises Dropped where it cannot go on, Unavailable where it never can."""

    def build(self, config: Config, episodes: Episodes, parameters: Parameters) -> None: ...
    def load(self, parameters: Parameters) -> None: ...
    def step(self) -> float:
        """Seconds that one meta-training step took."""
        ...

    def turn(self, seconds: float = TURN_S) -> Turn:
        """One step, and as many after it as take about so many seconds, within TURN_STEPS."""
        ...

    def gradients(self) -> tuple[float, dict[str, Tensor]]: ...
    def parameters(self) -> dict[str, Tensor]: ...
    def peak_memory(self) -> int | None: ...
    def operators(self) -> int: ...
    def close(self) -> None: ...


class Direct:
    """The side in this process, without a limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._side: Side

    def build(self, config: Config, episodes: Episodes, parameters: Parameters) -> None:
        self._device = device_of(config)
        self._side = SIDES[self._name](config, episodes, parameters)

    def load(self, parameters: Parameters) -> None:
        self._side.load(parameters)

    def step(self) -> float:
        synchronize(self._device)
        begin = time.perf_counter()
        self._side.step()
        synchronize(self._device)
        return time.perf_counter() - begin

    def turn(self, seconds: float = TURN_S) -> Turn:
        cold = self.step()
        fewest, most = TURN_STEPS
        count = max(fewest, min(most, round(seconds / max(cold, 1e-9))))
        return Turn(cold, [self.step() for _ in range(count)])

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        return self._side.gradients()

    def parameters(self) -> dict[str, Tensor]:
        return self._side.parameters()

    def peak_memory(self) -> int | None:
        return peak_memory(self._side.step, self._device)

    def operators(self) -> int:
        return count_operators(self._side.step, self._device)

    def close(self) -> None:
        pass


class Isolated:
    """The side in a child process, which is ended when it has used up its seconds.

    Args:
        name: of the side.
        limit_s: seconds for everything that is asked of it together; starting the process is not counted.
    """

    def __init__(self, name: str, limit_s: float) -> None:
        self._limit, self._left, self._stepped = limit_s, limit_s, False
        self._pipe, theirs = Pipe()
        command = [sys.executable, str(Path(__file__)), name, str(theirs.fileno()), str(torch.get_num_threads())]
        # a session of its own: what it starts itself (compilers) can be ended with it
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self._answer(STARTING_S)

    def build(self, config: Config, episodes: Episodes, parameters: Parameters) -> None:
        sets = {part: tensor.numpy() for part, tensor in vars(episodes).items() if isinstance(tensor, Tensor)}
        self._ask("build", config, sets, _arrays(parameters))

    def load(self, parameters: Parameters) -> None:
        self._ask("load", _arrays(parameters))

    def step(self) -> float:
        seconds = self._ask("step")
        self._stepped = True
        return seconds

    def turn(self, seconds: float = TURN_S) -> Turn:
        cold, steps = self._ask("turn", seconds)
        return Turn(cold, steps)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, found = self._ask("gradients")
        return loss, _tensors(found)

    def parameters(self) -> dict[str, Tensor]:
        return _tensors(self._ask("parameters"))

    def peak_memory(self) -> int | None:
        return self._ask("peak_memory")

    def operators(self) -> int:
        return self._ask("operators")

    def close(self) -> None:
        """End the process, and those that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe.close()

    def _ask(self, *request: Any) -> Any:
        begin = time.monotonic()
        try:
            self._pipe.send(request)
            return self._answer(self._left)
        except TimeoutError:
            self.close()
            raise Dropped(f"over its limit of {self._limit:g} s in its {self._phase(request[0])}") from None
        except (EOFError, OSError):
            raise Dropped(f"its process ended with code {self._process.wait()}") from None
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - begin))

    def _phase(self, method: str) -> str:
        if method == "step" and not self._stepped:
            return "first meta-step"
        return {"step": "meta-steps", "turn": "meta-steps", "gradients": "equal-work check"}.get(
            method, method.replace("_", " ")
        )

    def _answer(self, timeout: float) -> Any:
        if not self._pipe.poll(timeout):
            raise TimeoutError
        kind, value = self._pipe.recv()
        if kind == "unavailable":
            raise Unavailable(value)
        if kind == "failed":
            raise Dropped(value)
        return value


def _serve(name: str, pipe: Connection) -> None:
    """The child: answers until its pipe closes."""
    side = Direct(name)
    pipe.send(("done", None))
    while True:
        try:
            method, *arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", _perform(side, method, arguments)))
        except Unavailable as reason:
            pipe.send(("unavailable", str(reason)))
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            pipe.send(("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def _perform(side: Direct, method: str, arguments: list[Any]) -> Any:
    if method == "build":
        config, sets, parameters = arguments
        return side.build(config, Episodes(**_tensors(sets), ways=config.task.of_training().ways), _tensors(parameters))
    if method == "load":
        return side.load(_tensors(arguments[0]))
    found = getattr(side, method)(*arguments)
    if method == "turn":
        return tuple(found)  # the child's own classes are not the parent's
    if method == "gradients":
        return found[0], _arrays(found[1])
    return _arrays(found) if method == "parameters" else found


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    _serve(sys.argv[1], Connection(int(sys.argv[2])))
