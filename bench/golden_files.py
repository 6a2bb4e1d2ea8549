"""Golden files (tests/golden/README.md): reading and checking one.

Sizes come from the arrays, settings from ``config``, names by the table of the program (``cxgrad_fast/released.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxgrad_fast import Episodes, InputError, released
from cxgrad_fast.printable import shown

Arrays = dict[str, Tensor]
_SETS = ("x_support", "y_support", "x_query", "y_query")
_REQUIRED = object()
LARGEST_SETTING = 1e9
# the first word of an algorithm's name -> the tables of the programs that have it
_TABLES: dict[str, tuple[released.Table, ...]] = {
    "cxgrad": (released.CXGRAD,),
    "maml": (released.FAMILY,),
    "fomaml": (released.FAMILY,),
    "anil": (released.ANIL,),
    "boil": (released.BOIL,),
    "metasgd": (released.METASGD,),
    "mamlpp": (released.MAMLPP,),
    "cavia": (released.CAVIA,),
    "l2f": (released.L2F, released.ALFA),
    "alfa": (released.ALFA,),
    "modgrad": (released.MODGRAD,),
    "reptile": (released.REPTILE,),
    "protonet": (released.PROTONET, released.EASYFSL, released.CLOSERLOOK_MATCHINGNET),
    "matchingnet": (released.CLOSERLOOK_MATCHINGNET, released.EASYFSL),
    "relationnet": (released.RELATIONNET, released.CLOSERLOOK_RELATIONNET),
}


@dataclass(frozen=True)
class Golden:
    """A golden file.

    Attributes:
        path: of the file.
        algorithm: the name in its config; ``cxgrad`` or ``maml`` in files that have none.
        config: its settings, as the file says them.
        arrays: what is to be compared, by the file's keys, in float64.
        parameters: by our names, requiring no gradients; the adapted ones in the order of ``config``.
        constants: by our names, what is no meta-parameter: running statistics, L2F's fixed rates.
        table: our names -> those of the file's program.
        episodes: its tasks.
        batches: Reptile's ``[T, iterations, batch]``; else empty.
    """

    path: Path
    algorithm: str
    config: Mapping[str, Any]
    arrays: Arrays
    parameters: Arrays
    constants: Arrays
    table: Mapping[str, str]
    episodes: Episodes
    batches: Tensor

    @property
    def family(self) -> str:
        """The first word of the algorithm's name; the others, and the config, say which form of it."""
        return self.algorithm.split("_")[0]

    def number(self, *keys: str, default: Any = _REQUIRED) -> float:
        """The first of the settings ``keys`` that the file has.

        Raises:
            InputError: there is none, or it is no number.
        """
        found = self._said(keys, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not abs(found) < LARGEST_SETTING:
            raise InputError(f"{self.path}: '{keys[0]}' of its config must be a number, got {shown(found)}")
        return found

    def whole(self, *keys: str, default: Any = _REQUIRED) -> int:
        """As :meth:`number`: a whole number from 0 on."""
        found = self.number(*keys, default=default)
        if found < 0 or found != int(found):
            raise InputError(f"{self.path}: '{keys[0]}' of its config must be a whole number from 0 on, got {found}")
        return int(found)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """As :meth:`number`: true or false."""
        found = self._said((key,), default)
        if not isinstance(found, bool):
            raise InputError(f"{self.path}: '{key}' of its config must be true or false, got {shown(found)}")
        return found

    def flags(self, key: str, count: int) -> list[bool]:
        """As :meth:`number`: so many of true or false."""
        found = self._said((key,), _REQUIRED)
        if not isinstance(found, list) or [type(each) for each in found] != [bool] * count:
            raise InputError(f"{self.path}: '{key}' of its config must be {count} of true or false, got {shown(found)}")
        return found

    def texts(self, key: str) -> list[str]:
        """As :meth:`number`: a list of words."""
        found = self._said((key,), _REQUIRED)
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise InputError(f"{self.path}: '{key}' of its config must be a list of words, got {shown(found)}")
        return found

    def text(self, key: str, default: str) -> str:
        """The setting ``key``, in small letters."""
        return str(self._said((key,), default)).lower()

    def _said(self, keys: Sequence[str], default: Any) -> Any:
        found = next((self.config[key] for key in keys if self.config.get(key) is not None), default)
        if found is _REQUIRED:
            raise InputError(f"{self.path}: its config has no '{keys[0]}', which {self.algorithm} needs")
        return found

    def under(self, prefix: str, values: Mapping[str, Tensor]) -> Arrays:
        """``values``, by our names, under the file's keys: ``prefix/NAME``."""
        return {f"{prefix}/{self.table[name]}": value for name, value in values.items()}


def read(path: str | Path) -> Golden:
    """A golden file.

    Raises:
        InputError: it is none, or its arrays do not fit each other.
    """
    path = Path(path)
    stored = _stored(path)
    missing = [key for key in ("config", *_SETS, "trace_loss") if key not in stored]
    if missing:
        raise InputError(f"{path}: not a golden file: it holds no '{missing[0]}'")
    config = _config(path, stored.pop("config"))
    for key, array in stored.items():
        if array.dtype.kind not in "fiu":
            raise InputError(f"{path}: '{key}' must hold numbers, got {array.dtype}")
    algorithm = str(config.get("algorithm") or ("cxgrad" if config.get("contextual") else "maml"))
    if algorithm.split("_")[0] not in _TABLES:
        raise InputError(f"{path}: unknown algorithm {shown(algorithm)}: known are {', '.join(_TABLES)}")
    episodes = _episodes(path, stored)
    batches = _batches(path, stored.pop("batches", np.zeros((len(episodes), 0, 0), np.int64)), episodes)

    theirs = {key.removeprefix("param/"): stored.pop(key) for key in list(stored) if key.startswith("param/")}
    theirs = {name: array for name, array in theirs.items() if not name.endswith("num_batches_tracked")}
    table = _table(path, algorithm, config, theirs)
    names = released.ours(table)
    order = config.get("inner_parameters")
    first = [name for name in order if isinstance(name, str) and name in theirs] if isinstance(order, list) else []
    given = {names[name]: _tensor(theirs[name]) for name in dict.fromkeys([*first, *theirs])}
    constants = {name: tensor for name, tensor in given.items() if name == "fixed_rates" or ".running_" in name}
    return Golden(
        path=path,
        algorithm=algorithm,
        config=config,
        arrays={key: _tensor(array) for key, array in stored.items()},
        parameters={name: tensor for name, tensor in given.items() if name not in constants},
        constants=constants,
        table=table,
        episodes=episodes,
        batches=batches,
    )


def _stored(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            if file.read(2) != b"PK":  # an .npz is a zip archive; numpy takes other files for pickles
                raise InputError(f"{path}: not a golden file: no .npz")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                stored = {key: archive[key] for key in archive.files}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except InputError:
        raise
    except Exception as error:  # of a damaged archive: whatever zipfile, zlib or numpy met first
        raise InputError(f"{path}: not a golden file: a damaged .npz ({error})") from None
    if not all(isinstance(array, np.ndarray) for array in stored.values()):
        raise InputError(f"{path}: not a golden file: it holds other things than arrays")
    return stored


def _config(path: Path, array: np.ndarray) -> dict[str, Any]:
    try:
        config = json.loads(str(array))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path}: not a golden file: its 'config' is no JSON object")
    return config


def _episodes(path: Path, stored: dict[str, np.ndarray]) -> Episodes:
    """Takes them out of ``stored``."""
    support_x, support_y, query_x, query_y = (stored.pop(key) for key in _SETS)
    for name, x, y in (("support", support_x, support_y), ("query", query_x, query_y)):
        if x.ndim != 5 or x.shape[:2] != y.shape or len(x) != len(support_x):
            raise InputError(
                f"{path}: x_{name} must be [T, S, C, H, W] and y_{name} [T, S], of as many tasks in both sets, "
                f"got {list(x.shape)} and {list(y.shape)}"
            )
        if y.dtype.kind not in "iu" or (y.size and y.min() < 0):
            raise InputError(f"{path}: y_{name} must hold labels from 0 on")
    if not support_x.size:
        raise InputError(f"{path}: x_support holds no image")
    labels = (torch.from_numpy(y.astype(np.int64)) for y in (support_y, query_y))
    return Episodes(_tensor(support_x), next(labels), _tensor(query_x), next(labels))


def _batches(path: Path, array: np.ndarray, episodes: Episodes) -> Tensor:
    images = episodes.support_x.shape[1]
    if array.ndim != 3 or len(array) != len(episodes) or array.dtype.kind not in "iu":
        raise InputError(f"{path}: 'batches' must be whole numbers [T, iterations, batch], got {list(array.shape)}")
    if array.size and not 0 <= array.min() <= array.max() < images:
        raise InputError(f"{path}: 'batches' must hold places in x_support, 0 to {images - 1}")
    return torch.from_numpy(array.astype(np.int64))


def _table(path: Path, algorithm: str, config: Mapping[str, Any], theirs: Mapping[str, object]) -> Mapping[str, str]:
    """Our names -> those of the program that has all of ``theirs``."""
    tables: list[Mapping[str, str]] = list(_TABLES[algorithm.split("_")[0]])
    numbered = config.get("lr_of")  # learn2learn numbers its rates; the file says of which parameters they are
    if isinstance(numbered, dict):
        names = released.ours(tables[0])
        tables = [tables[0] | {f"rates.{names.get(str(of), of)}": rate for rate, of in numbered.items()}]
    for table in tables:
        if set(theirs) <= set(table.values()):
            return table
    odd = next(name for name in theirs if name not in tables[0].values())
    raise InputError(f"{path}: no program of {algorithm} has a parameter '{odd}'")


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))
