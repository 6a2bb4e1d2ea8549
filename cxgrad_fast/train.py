"""``python -m cxgrad_fast.train``: meta-train a few-shot learner, validate it, test the ensemble of its best models."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_atomic, write_checkpoint
from cxgrad_fast.cli import DEFAULT_PRESET, Parser, Progress, add_config_options, build_config, run_command
from cxgrad_fast.config import Config, InputError, preset
from cxgrad_fast.data import open_pool
from cxgrad_fast.episodes import SPLITS, EpisodeSampler
from cxgrad_fast.evaluate import Score, explain_statistics, predict_tasks, score
from cxgrad_fast.learner import Learner, NonFiniteLossError
from cxgrad_fast.runs import LATEST, Run, best_files, check_writable, draw_curves, latest_file, source_version

NON_FINITE = 3  # exit code

# settings that a resumed run may change: they say where and for how long, not what is computed
RESUMABLE = frozenset(
    {
        "outer.iterations",
        "data.root",
        "evaluation.test_tasks",
        "evaluation.tasks_per_batch",
        "run.device",
        "run.backend",
        "run.tasks_per_chunk",
        "run.recompute",
        "run.checkpoint_every",
    }
)


class Interrupted(Exception):
    """SIGINT or SIGTERM came; raised only where the session may be saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Signals:
    """While open, SIGINT and SIGTERM wait for :meth:`check`; after the first, SIGINT kills at once."""

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self._received:
            raise Interrupted(self._received)


@dataclass
class Session:
    """A training run in memory; :meth:`checkpoint` is what of it outlives the process.

    Attributes:
        samplers: by their part in the run: train, val, test, cross-domain.
        iteration: meta-updates done.
        validated: iteration of the last validation.
        best: best models so far, best first.
    """

    config: Config
    learner: Learner
    samplers: dict[str, EpisodeSampler]
    fingerprints: dict[str, str]
    source: str
    iteration: int = 0
    validated: int = 0
    best: list[Best] = field(default_factory=list)

    def checkpoint(self, **episode: Any) -> Checkpoint:
        """The session as it stands."""
        return Checkpoint(
            config=self.config,
            state=self.learner.state_dict(),
            iteration=self.iteration,
            validated=self.validated,
            best=tuple(self.best),
            fingerprints=self.fingerprints,
            rng=_rng_states(self.learner.device),
            source=self.source,
            episode=episode,
        )

    def validation_is_due(self) -> bool:
        """Whether the weights of now are to be validated and have not been."""
        outer = self.config.outer
        is_due = self.iteration % outer.validate_every == 0 or self.iteration >= outer.iterations
        return self.iteration > self.validated and is_due


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises InputError for what :func:`cxgrad_fast.cli.run_command` prints."""
    parser = _parser()
    options, settings = parser.parse(argv)
    if options.compile:
        settings["run.compile"] = True
    session, run = _start(options, settings) if options.resume is None else _resume(options, settings)
    with run, Signals() as signals:
        where = f"{session.learner.device}, {session.config.run.precision}"
        print(
            f"run {run.folder}: {session.config.inner.algorithm} on {where}, from iteration {session.iteration}",
            flush=True,
        )
        return _train_and_test(session, run, signals)


def _parser() -> Parser:
    parser = Parser("train", __doc__ or "", preset(DEFAULT_PRESET))
    add_config_options(parser)
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/<preset>-<date>-<time>)")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder")
    parser.add_argument("--compile", action="store_true", help="the same as --run.compile true")
    return parser


def _start(options: Any, settings: dict[str, object]) -> tuple[Session, Run]:
    """A new session and its folder, which is made only when nothing else can be wrong any more."""
    config = build_config(options.preset, options.config, settings)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(options.out or f"runs/{config.preset}-{now}")
    check_writable(folder)
    session = _open_session(config)
    torch.manual_seed(config.run.seed)
    return session, Run.create(folder, session.checkpoint())


def _resume(options: Any, settings: dict[str, object]) -> tuple[Session, Run]:
    """The session of a run's latest checkpoint, and its folder."""
    for name in ("preset", "config", "out"):
        if getattr(options, name):
            raise InputError(f"--{name} does not go with --resume: the run brings its own settings and folder")
    folder = Path(options.resume)
    latest = latest_file(folder)
    saved = read_checkpoint(latest)
    config = saved.config.override(settings)
    old, new = saved.config.flat(), config.flat()
    for name in new:
        if new[name] != old[name] and name not in RESUMABLE:
            raise InputError(
                f"setting '{name}' (={new[name]}) cannot change in a resumed run (there: {old[name]}): "
                "it would change its numbers, start a new run for it"
            )
    check_writable(folder)
    session = _open_session(config)
    for part, fingerprint in session.fingerprints.items():
        if fingerprint != saved.fingerprints.get(part):
            pool = session.samplers[part].pool
            raise InputError(
                f"the images of {pool.source}, split '{pool.split}', are not those that run '{folder}' was trained "
                "with: bring those back, or start a new run"
            )
    session.learner = saved.learner(latest, config, optimizer=True)
    session.iteration, session.validated, session.best = saved.iteration, saved.validated, list(saved.best)
    _restore_rng(saved.rng, session.learner.device)
    return session, Run(folder, session.checkpoint())


def _open_session(config: Config) -> Session:
    """Learner and data of a Config; everything that can be wrong with either is found here."""
    learner = Learner(config)
    pools = {split: open_pool(config, split) for split in SPLITS}
    if config.data.cross_domain:
        pools["cross-domain"] = open_pool(config, "test", source=config.data.cross_domain)
    fingerprints = {part: pool.fingerprint() for part, pool in pools.items()}
    for part in ("train", "val"):
        pools[part] = pools[part].to(learner.device)  # the others are used once, at the end
    samplers = {part: EpisodeSampler(pool, config, learner.dtype) for part, pool in pools.items()}
    return Session(config, learner, samplers, fingerprints, source_version())


def _train_and_test(session: Session, run: Run, signals: Signals) -> int:
    """All of a run from where the session is; the exit code."""
    try:
        _train(session, run, signals)
        _test(session, run, signals)
    except Interrupted as stop:
        run.save(session.checkpoint())
        draw_curves(run.folder)
        again = f"python -m cxgrad_fast.train --resume {shlex.quote(str(run.folder))}"
        print(f"{stop}: saved after iteration {session.iteration}; go on with: {again}", flush=True)
        return stop.exit_code
    except NonFiniteLossError as error:
        print(f"error: {_save_non_finite(session, run, error)}", file=sys.stderr)
        return NON_FINITE
    return 0


def _train(session: Session, run: Run, signals: Signals) -> None:
    config = session.config
    progress = Progress("training", config.outer.iterations, session.iteration)
    recent: deque[tuple[float, float, float]] = deque(maxlen=50)
    try:
        while True:
            if session.validation_is_due():
                progress.note(_validate(session, run, signals))
            if session.iteration >= config.outer.iterations:
                return
            recent.append(_step(session, run))
            progress.update(session.iteration, _describe(recent, config.outer.meta_batch))
            signals.check()
            if session.iteration % config.run.checkpoint_every == 0:
                run.save(session.checkpoint())
    finally:
        progress.close()


def _step(session: Session, run: Run) -> tuple[float, float, float]:
    """One meta-update and its rows; loss, accuracy and seconds."""
    began = time.perf_counter()
    meta_batch = session.config.outer.meta_batch
    episodes = session.samplers["train"].sample(session.iteration * meta_batch, meta_batch)
    out = session.learner.meta_step(episodes)
    support = out.support_losses.detach().mean(0)
    passes = [support[0], support[-1]] if len(support) else []
    values = torch.stack([value.double() for value in (out.loss, out.accuracy, *passes)]).tolist()
    seconds = time.perf_counter() - began
    session.iteration += 1
    names = ("loss", "accuracy", "first_support_loss", "last_support_loss")
    run.log(session.iteration, "train", **dict(zip(names, values, strict=False)))
    run.log_scalars(session.iteration, {"speed/seconds": seconds, "speed/episodes_per_second": meta_batch / seconds})
    return values[0], values[1], seconds


def _describe(recent: deque[tuple[float, float, float]], meta_batch: int) -> str:
    loss, accuracy, seconds = (sum(column) / len(recent) for column in zip(*recent, strict=True))
    return f"loss {loss:.3f}  accuracy {100 * accuracy:.1f} %  {meta_batch / seconds:.1f} episodes/s"


def _validate(session: Session, run: Run, signals: Signals) -> str:
    """Validate the weights of now, keep them if they are among the best; what to tell about it."""
    evaluation = session.config.evaluation
    logits, labels = predict_tasks(
        [session.learner],
        session.samplers["val"],
        evaluation.validation_tasks,
        tasks_per_batch=evaluation.tasks_per_batch,
        report=lambda done: signals.check(),
    )
    result = score(logits, labels)
    now = Best(session.iteration, result.accuracy)
    session.validated = session.iteration
    session.best = sorted([*session.best, now], key=lambda best: (-best.accuracy, best.iteration))[
        : evaluation.ensemble
    ]
    run.log(session.iteration, "val", loss=result.loss, accuracy=result.accuracy, interval=result.tasks_interval)
    checkpoint = session.checkpoint()
    if now in session.best:
        write_checkpoint(run.folder / now.file, checkpoint)
    run.save(checkpoint)
    rank = f"number {session.best.index(now) + 1} so far" if now in session.best else "not among the best"
    return f"iteration {session.iteration}: validation accuracy {100 * result.accuracy:.2f} %, {rank}"


def _test(session: Session, run: Run, signals: Signals) -> None:
    """The ensemble of the best models on the test tasks of each set: printed, and in result.json."""
    config = session.config
    files = best_files(run.folder, config.evaluation.ensemble)
    learners = [read_checkpoint(file).learner(file, config) for file in files]
    print(
        f"ensemble of {len(files)}: {', '.join(file.name for file in files)}\n{explain_statistics(config)}", flush=True
    )
    results: dict[str, Any] = {"models": [file.name for file in files], "statistics": config.evaluation.statistics}
    for part in ("test", "cross-domain"):
        if part in session.samplers:
            sampler = session.samplers[part]
            result = _test_on(learners, sampler, config, signals)
            print(
                "\n".join([f"{part} on {sampler.pool.source}", *(f"  {line}" for line in result.lines())]), flush=True
            )
            results[part] = {"source": sampler.pool.source} | result.plain()
    write_atomic(run.folder / "result.json", (json.dumps(results, indent=2) + "\n").encode())
    draw_curves(run.folder)


def _test_on(learners: list[Learner], sampler: EpisodeSampler, config: Config, signals: Signals) -> Score:
    tasks = config.evaluation.test_tasks
    progress = Progress(f"test on {sampler.pool.source}", tasks)

    def report(done: int) -> None:
        progress.update(done)
        signals.check()

    try:
        batch = config.evaluation.tasks_per_batch
        return score(*predict_tasks(learners, sampler, tasks, tasks_per_batch=batch, report=report))
    finally:
        progress.close()


def _save_non_finite(session: Session, run: Run, error: NonFiniteLossError) -> str:
    """Save what repeats the failure, the weights before the step and its episodes; the message."""
    step, meta_batch = session.iteration + 1, session.config.outer.meta_batch
    first = session.iteration * meta_batch
    episodes = session.samplers["train"].sample(first, meta_batch)
    file = run.folder / f"nonfinite-{step}.pt"
    tasks = list(range(first, first + meta_batch))
    write_checkpoint(file, session.checkpoint(tasks=tasks, **vars(episodes)))
    return (
        f"{error}: iteration {step}, tasks {tasks[0]} to {tasks[-1]}; the weights before it and its episodes are in "
        f"'{file}', {LATEST} is as it was"
    )


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


if __name__ == "__main__":
    sys.exit(run_command(main))
