"""A result file that is written case by case, and taken up where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import machine, write_result

from cxgrad_fast import Config

# what makes two machines one: figures of both may stand in one file
_SAME = ("cpu", "cores", "threads", "gpu", "torch", "commit")


class ResultFile:
    """The cases of one command. An unfinished file of the same command, machine and commit is continued.

    Args:
        name: of the files, and of what is in them.
        request: what the command was asked besides its cases.
        configs: of the cases.
        folder: of the files; None: nothing is written, nothing taken up.

    Attributes:
        machine: where the figures are from.
        cases: what is in the file, in order.
        path: the file, once there is one.
    """

    def __init__(self, name: str, request: Mapping[str, Any], configs: Sequence[Config], folder: Path | None) -> None:
        self._name, self._folder = name, folder
        self._configs = [_as_read(config.flat()) for config in configs]
        asked = json.dumps([_as_read(request), self._configs], sort_keys=True)
        self._request = {**request, "request": hashlib.sha256(asked.encode()).hexdigest()}
        self.machine, self.cases = machine(), list[dict[str, Any]]()
        self.path: Path | None = None
        for path in sorted(folder.glob(f"*-{name}.json")) if folder else []:
            self._take_up(path)

    def has(self, config: Config) -> bool:
        """Whether a case has been measured."""
        return _as_read(config.flat()) in self._measured

    def add(self, case: dict[str, Any]) -> None:
        """Append a case and write the file."""
        self.cases.append(case)
        if self._folder:
            self.path = write_result(self._name, self.content, self._folder, self.machine)

    @property
    def content(self) -> dict[str, Any]:
        """All but the machine and the command."""
        is_complete = all(config in self._measured for config in self._configs)
        return {"machine": self.machine, **self._request, "complete": is_complete, "cases": self.cases}

    @property
    def _measured(self) -> list[Any]:
        return [_as_read(case["config"]) for case in self.cases]

    def _take_up(self, path: Path) -> None:
        try:
            found = json.loads(path.read_text())
            is_same = all(found["machine"][part] == self.machine[part] for part in _SAME)
            if is_same and not found["complete"] and found["request"] == self._request["request"]:
                self.machine, self.cases, self.path = found["machine"], found["cases"], path
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # no file of ours


def _as_read(value: Any) -> Any:
    """As it comes back from a file: tuples are lists there."""
    return json.loads(json.dumps(value))
