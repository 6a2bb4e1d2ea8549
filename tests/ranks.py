"""Functions run as ranks: processes with torchrun's variables, forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed import TCPStore

_DEADLINE = 600.0  # of a machine that is very busy

_context = mp.get_context("forkserver")
# Adam imports dynamo, which takes longer than a small test
_context.set_forkserver_preload(["torch._dynamo", "cxgrad_fast.train", "tiny_runs", "helpers"])


class Launched:
    """``size`` processes that run ``target(*arguments)``; what they print is in ``folder``.

    As under torchrun, this process keeps the ranks' notes; it does not end the others when one dies.

    Args:
        folder: for what they print.
        size: how many.
        target: of a module; what it returns is the exit code.
        arguments: for it.
    """

    def __init__(self, folder: Path, size: int, target: Callable[..., int | None], *arguments: object) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = dict(os.environ) | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
        }
        self.ranks = []
        for rank in range(size):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_be, args=(variables, str(folder / str(rank)), target, arguments))
            process.start()
            self.ranks.append(process)

    def wait(self) -> list[int]:
        """The exit codes."""
        for process in self.ranks:
            process.join(_DEADLINE)
            if process.exitcode is None:
                process.kill()
                raise AssertionError(f"a rank hangs\n{self.err()}")
        return [process.exitcode for process in self.ranks]

    def out(self, rank: int) -> str:
        """What a rank printed."""
        return (self.folder / f"{rank}.out").read_text()

    def err(self) -> str:
        """What the ranks complained of, one after the other."""
        return "".join((self.folder / f"{rank}.err").read_text() for rank in range(len(self.ranks)))


def _be(variables: dict[str, str], prefix: str, target: Callable[..., int | None], arguments: tuple[object]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    os.environ.update(variables)
    torch.set_num_threads(1)
    sys.exit(target(*arguments))


def polled() -> Iterator[None]:
    """``for _ in polled(): if there: break``; fails at a deadline."""
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        yield
        time.sleep(0.01)
    raise AssertionError("it does not come")
