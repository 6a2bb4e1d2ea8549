"""Checkpoints: all that a run is, in one file that is replaced atomically and checked when it is read."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cxgrad_fast.config import Config, InputError
from cxgrad_fast.config.fields import LARGEST_INTEGER
from cxgrad_fast.engine import ALONE, Ranks
from cxgrad_fast.learner import Learner
from cxgrad_fast.learner_state import check_state
from cxgrad_fast.printable import shown
from cxgrad_fast.schema import FLOATING, anything, items, number, one_of, record, refuse, table, tensor, text, whole
from cxgrad_fast.torch_files import read_torch_file

FORMAT, VERSION = "cxgrad_fast checkpoint", 1

_PLAIN = (str, int, float, bool, type(None))


class Best(NamedTuple):
    """One of the best models so far: after ``iteration`` steps, ``accuracy`` on the validation tasks."""

    iteration: int
    accuracy: float

    @property
    def file(self) -> str:
        """The checkpoint's name in the run's folder."""
        return f"best-{self.iteration}.pt"


@dataclass(frozen=True)
class Checkpoint:
    """All that a run is after ``iteration`` steps.

    Attributes:
        config: the settings.
        state: ``Learner.state_dict()``: parameters, statistics, optimizer.
        iteration: meta-updates done; the next task to draw is ``iteration * outer.meta_batch``.
        validated: iteration of the last validation, 0 before the first.
        best: the ``evaluation.ensemble`` best validated models, best first.
        fingerprints: of the image pools, by their part in the run (train, val, test, cross-domain).
        rng: torch's generator states.
        source: commit (or version) that wrote it.
        episode: of a run that a non-finite loss stopped: ``tasks`` (indices) and the episode tensors of that step.
    """

    config: Config
    state: dict[str, Any]
    iteration: int = 0
    validated: int = 0
    best: tuple[Best, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict)
    rng: dict[str, Tensor] = field(default_factory=dict)
    source: str = ""
    episode: dict[str, Any] = field(default_factory=dict)

    def learner(
        self, file: Path, config: Config | None = None, optimizer: bool = False, ranks: Ranks = ALONE
    ) -> Learner:
        """A Learner in this state, under ``config`` if given, on one of ``ranks``.

        Raises:
            InputError: the state does not fit the settings (``file`` is named).
        """
        try:
            check_state(config or self.config, self.state, optimizer)  # before a learner takes the memory
        except ValueError as error:
            raise InputError(f"checkpoint '{file}' does not fit the settings: {error}") from error
        learner = Learner(config or self.config, ranks)
        learner.load_state_dict(self.state, optimizer=optimizer)
        return learner


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replace ``path`` atomically: whatever happens, the old file or the new one stands there, whole.

    Raises:
        OSError: the disk refuses; the old file or the new one stands.
    """
    plain = {spec.name: getattr(checkpoint, spec.name) for spec in dataclasses.fields(checkpoint)}
    plain |= {
        "format": FORMAT,
        "version": VERSION,
        "config": checkpoint.config.flat(),
        "preset": checkpoint.config.preset,
        "best": [list(best) for best in checkpoint.best],
        "next_task": checkpoint.iteration * checkpoint.config.outer.meta_batch,
    }
    content = _portable(plain)
    content["sha256"] = _digest(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path``, with all tensors on the CPU: whole, and one that a Learner can be made of.

    Raises:
        InputError: missing, truncated, not a checkpoint of this program, altered, of a newer program, or with content
            that no run has.
    """
    content = read_torch_file(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"'{path}' is not a checkpoint of cxgrad_fast (evaluate reads the paper's with --released)")
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"checkpoint '{path}' has format version {shown(version)}, this program reads {VERSION}: update it"
        )
    if content.pop("sha256", None) != _digest(content):
        raise InputError(f"checkpoint '{path}' is damaged: its content does not match its SHA-256, use another one")
    try:
        return _checkpoint(content)
    except ValueError as error:
        raise InputError(f"checkpoint '{path}' does not hold a run: {error}") from error


# What a checkpoint holds. Other keys may be there; settings and state are checked where they are used.
_CONTENT = record(
    version=whole(VERSION, VERSION),
    config=table(anything),
    preset=text(),
    state=table(anything),
    iteration=whole(0, LARGEST_INTEGER),
    validated=whole(0, LARGEST_INTEGER),
    best=items(items(anything, 2)),
    fingerprints=table(text()),
    rng=table(tensor(torch.uint8, dimensions=1)),
    source=text(),
    episode=table(one_of(whole(), items(whole()), tensor(*FLOATING, torch.int64))),
    next_task=whole(),
)


def _generator_state(value: Any, where: str) -> None:
    try:
        torch.Generator().set_state(value.contiguous())
    except RuntimeError:
        raise refuse(where, "a state of torch's generator", value) from None


def _checkpoint(content: dict[str, Any]) -> Checkpoint:
    """The checkpoint of a file's content; ValueError (InputError is one) for content that no run has."""
    _CONTENT(content, "")
    stated = content["config"]
    # a checkpoint of before each algorithm had its own settings holds those of all
    config = Config().override(stated, {"inner.algorithm": stated.get("inner.algorithm", "cxgrad")})
    config = dataclasses.replace(config, preset=content["preset"])
    iteration, validated = content["iteration"], content["validated"]
    whole(0, iteration)(validated, "validated")
    for index, (done, accuracy) in enumerate(content["best"]):
        whole(1, validated)(done, f"best[{index}][0]")
        number(0, 1)(accuracy, f"best[{index}][1]")
    best = tuple(Best(*pair) for pair in content["best"])
    if list(best) != sorted(best, key=lambda model: (-model.accuracy, model.iteration)) or len(set(best)) < len(best):
        raise refuse("best", "different models, best first", content["best"])
    whole(*[iteration * config.outer.meta_batch] * 2)(content["next_task"], "next_task")
    record(cpu=_generator_state)(content["rng"], "rng")
    check_state(config, content["state"])
    values = {spec.name: content[spec.name] for spec in dataclasses.fields(Checkpoint)}
    return Checkpoint(**values | {"config": config, "best": best})


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Put ``data`` into ``path`` so that a kill or a power cut leaves the old content or the new, never a part.

    Raises:
        OSError: with ``path`` as its file name; the old file or the new one stands, and nothing lies beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # what it was before is the error to tell
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk, where its file system has a way to."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def _portable(value: Any) -> Any:
    """``value`` with tensors copied to the CPU; only what ``weights_only`` can read back."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _portable(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(part) for part in value)
    if type(value) in _PLAIN:
        return value
    raise TypeError(f"a checkpoint holds tensors and plain values only, got {type(value).__name__}")


def _digest(value: Any) -> str:
    """SHA-256 of names, types, shapes and bytes: independent of how torch lays out its file."""
    digest = hashlib.sha256()

    def feed(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype} {list(part.shape)}\n".encode())
            # a file may hold any strides; a clone has those of its shape
            whole = part.clone(memory_format=torch.contiguous_format)
            digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(part, dict):
            digest.update(f"dict {len(part)}\n".encode())
            for key in sorted(part, key=repr):
                digest.update(f"{key!r}\n".encode())
                feed(part[key])
        elif isinstance(part, list | tuple):
            digest.update(f"list {len(part)}\n".encode())
            for item in part:
                feed(item)
        else:
            digest.update(f"{type(part).__name__} {part if type(part) in _PLAIN else ''!r}\n".encode())

    feed(value)
    return digest.hexdigest()
