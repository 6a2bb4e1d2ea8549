"""A run's folder: checkpoints, metrics, TensorBoard events, curves, and what made it.

    config.toml  source.txt  metrics.csv  curves.png  tensorboard/  latest.pt  best-<iteration>.pt  result.json

``tensorboard/`` holds the events of training, ``tensorboard/val/`` those of validations: TensorBoard forgets all events
of a folder from a step on, and a resumed run may repeat its last validation but not the training step before it.

``metrics.csv`` holds one row an iteration and one a validation, and no times: two runs with one seed write the same
bytes.
"""

from __future__ import annotations

import csv
import io
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType

from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_atomic, write_checkpoint
from cxgrad_fast.config import InputError
from cxgrad_fast.folder_lock import FolderLock
from cxgrad_fast.learner import Learner

LATEST = "latest.pt"
COLUMNS = ("loss", "accuracy", "interval", "first_support_loss", "last_support_loss")
_FIRST_FILES = frozenset({LATEST, "config.toml", "source.txt", "metrics.csv", "tensorboard"})
_HEADER = ",".join(("iteration", "split", *COLUMNS)) + "\n"


def load(run: str | Path, checkpoint: str = "best", overrides: Mapping[str, object] | None = None) -> Learner:
    """The learner of a run, to be used: ``load(RUN).adapt(support_x, support_y)(query_x)``.

    Args:
        run: a run's folder, or a checkpoint file.
        checkpoint: ``best`` by validation (the latest before the first validation) or ``latest``; for a folder.
        overrides: settings to change, e.g. ``{"run.device": "cpu"}``.

    Raises:
        InputError: no such run, a file that cannot be used, or a setting that does not fit it.
    """
    if checkpoint not in ("best", "latest"):
        raise InputError(f"checkpoint must be 'best' or 'latest', got '{checkpoint}'")
    path = Path(run)
    if not path.is_file():
        path = _best_file(path) if checkpoint == "best" else latest_file(path)
    saved = read_checkpoint(path)
    return saved.learner(path, saved.config.override(overrides or {}))


def _best_file(folder: Path) -> Path:
    """The checkpoint of a run's best model; its latest before the first validation.

    Raises:
        InputError: there is no run in ``folder``, or the file is gone.
    """
    latest = latest_file(folder)
    best = read_checkpoint(latest).best
    if not best:
        return latest
    file = folder / best[0].file
    if not file.exists():
        raise InputError(f"'{file}', the best model of the run, was deleted: name another file, or {LATEST}")
    return file


def not_deleted(folder: Path, best: Sequence[Best], count: int) -> tuple[tuple[Best, ...], list[str]]:
    """The first ``count`` of a run's best models whose files are there, and a line for each that was deleted."""
    kept: list[Best] = []
    lines = []
    for model in best:
        if len(kept) == count:
            break
        if (folder / model.file).exists():
            kept.append(model)
        else:
            lines.append(f"note: '{folder / model.file}', one of the best models, was deleted: going on without it")
    return tuple(kept), lines


def best_models(folder: Path, best: Sequence[Best], count: int) -> tuple[list[tuple[Path, Checkpoint]], list[str]]:
    """Files and checkpoints of :func:`not_deleted`'s models, and its lines; without any model, of the latest.

    Raises:
        InputError: a file that is there cannot be used.
    """
    kept, lines = not_deleted(folder, best, count)
    found = []
    for file in (folder / model.file for model in kept):
        try:
            found.append((file, read_checkpoint(file)))
        except InputError as error:
            raise InputError(f"{error} (if it cannot be brought back, delete it: the others are then used)") from error
    if not found:
        latest = latest_file(folder)
        found.append((latest, read_checkpoint(latest)))
    return found, lines


def latest_file(folder: Path) -> Path:
    """A run's latest checkpoint.

    Raises:
        InputError: there is no run in ``folder``.
    """
    latest = folder / LATEST
    if not folder.exists():
        raise InputError(f"no run at '{folder}': there is no such file or folder")
    if not latest.exists():
        raise InputError(f"'{folder}' holds no run: there is no {LATEST} in it")
    return latest


def source_version() -> str:
    """``<commit>`` or ``<commit>-dirty`` of the source tree; ``unknown`` where the package is not in one."""
    here = Path(__file__).resolve()
    commands = (
        # a virtual environment inside somebody else's repository is not our tree
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    answer = ""
    for command in commands:
        try:
            done = subprocess.run(["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        if done.returncode:
            return "unknown"
        answer = done.stdout.strip()
    return answer


def check_writable(folder: Path) -> None:
    """That ``folder`` can be made or written, by doing it in the nearest folder that exists; leaves nothing behind.

    Raises:
        InputError: it cannot.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    probe = existing / f".cxgrad-fast-{os.getpid()}.tmp"
    try:
        probe.touch()
        probe.unlink(missing_ok=True)  # who opens a run there removes what looks left behind
    except OSError as error:
        raise InputError(f"cannot write the run folder '{folder}': {error.strerror} ('{existing}')") from error


class Run:
    """The folder of a run that is being trained, opened by one process at a time.

    :meth:`create` starts one, the constructor continues one; use it as a context manager.

    Args:
        folder: of the run.
        start: its latest checkpoint.
        lock: on the folder, taken over; None takes it here.
    """

    def __init__(self, folder: Path, start: Checkpoint, lock: FolderLock | None = None) -> None:
        self.folder = folder
        self.saved: tuple[int, int] | None = None  # iteration and last validation in latest.pt, if written from here
        self._undo: Callable[[], None] = lambda: None
        self._lock = lock or FolderLock(folder)
        with ExitStack() as opened:
            if lock is None:
                opened.enter_context(self._lock)
            self._open(start, opened)
            self._opened = opened.pop_all()

    def _open(self, start: Checkpoint, opened: ExitStack) -> None:
        """Bring the folder to where ``start`` stands; what is opened for writing is closed with ``opened``."""
        folder = self.folder
        for stale in folder.glob(".*.tmp"):
            stale.unlink(missing_ok=True)  # another process may be checking whether it can write
        self._remove_evicted(start)
        write_atomic(folder / "config.toml", start.config.to_toml().encode())
        write_atomic(folder / "source.txt", _describe_source(start.source).encode())
        write_atomic(folder / "metrics.csv", _rows_until(folder / "metrics.csv", start).encode())
        self._metrics = _Appender(folder / "metrics.csv", opened)
        self._events = _Events(folder / "tensorboard", start.iteration + 1, opened)
        self._validations = _Events(folder / "tensorboard" / "val", start.validated + 1, opened)

    @classmethod
    def create(cls, folder: Path, start: Checkpoint) -> Run:
        """A new run's folder, with ``start`` as its first checkpoint.

        Raises:
            InputError: it holds a run already, or another process is making one there at this moment.
            OSError: it cannot be written; what was made of it is removed.
        """
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            lock = FolderLock.of_made(folder)
        except OSError:
            _remove_empty(made)
            raise
        try:
            if any(any(folder.glob(name)) for name in (LATEST, "best-*.pt", "config.toml", "metrics.csv")):
                raise InputError(
                    f"'{folder}' holds a run already: continue it with --resume {folder}, or choose another --out"
                )
            before = frozenset(os.listdir(folder))
            try:
                write_checkpoint(folder / LATEST, start)
                run = cls(folder, start, lock)
            except BaseException:
                _remove_new(folder, before, made)
                raise
        except BaseException:
            lock.close()
            raise
        run.saved = start.iteration, start.validated
        run._undo = lambda: _remove_new(folder, before, made)
        return run

    def discard(self) -> None:
        """Close it; one that was created is removed."""
        with self._lock:
            self._opened.close()
            self._undo()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._opened.close()

    def log(self, iteration: int, split: str, **values: float) -> None:
        """A row of metrics.csv (loss, accuracy, interval, ...) and the same as TensorBoard scalars."""
        cells = [repr(values[name]) if name in values else "" for name in COLUMNS]
        self._metrics.write((",".join([str(iteration), split, *cells]) + "\n").encode())
        events = self._validations if split == "val" else self._events
        events.write(iteration, {f"{split}/{name}": value for name, value in values.items()})

    def log_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """TensorBoard scalars alone: what differs between equal runs, such as times."""
        self._events.write(iteration, scalars)

    def save_best(self, best: Best, checkpoint: Checkpoint) -> None:
        """One of the best models, before :meth:`save` names it in latest.pt."""
        write_checkpoint(self.folder / best.file, checkpoint)

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace latest.pt; then the best models it no longer names can go."""
        write_checkpoint(self.folder / LATEST, checkpoint)
        self.saved = checkpoint.iteration, checkpoint.validated
        self._remove_evicted(checkpoint)

    def _remove_evicted(self, checkpoint: Checkpoint) -> None:
        kept = {best.file for best in checkpoint.best}
        for file in self.folder.glob("best-*.pt"):
            if file.name not in kept:
                file.unlink()


class FollowedRun(Run):
    """The run on the ranks that do not write: the same calls, and nothing happens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, None

    def discard(self) -> None:
        """Nothing is open."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def log(self, iteration: int, split: str, **values: float) -> None:
        """Rank 0 does."""

    def log_scalars(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Rank 0 does."""

    def save_best(self, best: Best, checkpoint: Checkpoint) -> None:
        """Rank 0 does."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Rank 0 does."""


class _Appender:
    """A file that is only added to, closed with ``opened``; every write reaches it at once."""

    def __init__(self, path: Path, opened: ExitStack) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        opened.callback(os.close, self._descriptor)

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def flush(self) -> None:
        """Nothing waits."""


class _Events:
    """A TensorBoard event file, written in step: torch's SummaryWriter fails in a thread of its own on a full disk.

    Args:
        folder: for the file; made where it is missing.
        first_step: TensorBoard forgets this step and those after it, which an interrupted run wrote.
        opened: closes the file.
    """

    def __init__(self, folder: Path, first_step: int, opened: ExitStack) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        folder.mkdir(exist_ok=True)
        self._writer = RecordWriter(_Appender(folder / name, opened))
        self._put(file_version="brain.Event:2")
        self._put(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._put(step=step, summary=self._summary(value=values))

    def _put(self, **fields: object) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _remove_new(folder: Path, before: Set[str], made: Sequence[Path]) -> None:
    """Remove what a run wrote into a folder that held ``before``; then the folders ``made`` for it, innermost first."""
    for path in folder.iterdir():
        if path.name not in before and (path.name in _FIRST_FILES or path.match(".*.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # not there, or somebody else uses it
        for folder in folders:
            folder.rmdir()


def _rows_until(metrics: Path, start: Checkpoint) -> str:
    """metrics.csv up to a checkpoint: without the rows, whole or half, that were written after it."""
    limits = {"train": start.iteration, "val": start.validated}
    kept = [_HEADER]
    for line in metrics.read_text(errors="replace").splitlines(keepends=True)[1:] if metrics.exists() else []:
        iteration, _, rest = line.partition(",")
        split = rest.partition(",")[0]
        if line.endswith("\n") and iteration.isdecimal() and int(iteration) <= limits.get(split, -1):
            kept.append(line)
    return "".join(kept)


def _describe_source(source: str) -> str:
    packages = ("cxgrad-fast", "torch", "numpy")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    return "\n".join([f"commit {source}", f"python {platform.python_version()}", *versions]) + "\n"


def read_metrics(folder: Path) -> dict[str, dict[str, list[float]]]:
    """metrics.csv as ``{split: {column: values}}``, with NaN where a cell is empty."""
    table: dict[str, dict[str, list[float]]] = {}
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            columns = table.setdefault(row.pop("split"), {name: [] for name in ("iteration", *COLUMNS)})
            for name, cell in row.items():
                columns[name].append(float(cell or "nan"))
    return table


def draw_curves(folder: Path) -> None:
    """curves.png: loss and accuracy of training (smoothed) and validation (with its interval) over iterations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = read_metrics(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        if train := table.get("train"):
            axes.plot(train["iteration"], train[name], color="tab:blue", alpha=0.2)
            axes.plot(train["iteration"], _smooth(train[name]), color="tab:blue", label="training (smoothed)")
        if val := table.get("val"):
            errors = val["interval"] if name == "accuracy" else None
            axes.errorbar(val["iteration"], val[name], errors, color="tab:orange", marker="o", label="validation")
        axes.set(xlabel="iteration", ylabel=f"{name} on the query set")
        axes.grid(alpha=0.3)
        if train or val:
            axes.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomic(folder / "curves.png", image.getbuffer())


def _smooth(values: list[float]) -> list[float]:
    """Running mean over a fiftieth of the values, at least 10."""
    window = max(10, len(values) // 50)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
