"""``python -m cxgrad_fast.train``: meta-train a few-shot learner, validate it, test the ensemble of its best models."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from cxgrad_fast import endings
from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_atomic, write_checkpoint
from cxgrad_fast.cli import DEFAULT_PRESET, Parser, Progress, add_config_options, build_config, run_command
from cxgrad_fast.config import Config, InputError, preset
from cxgrad_fast.data import open_pool
from cxgrad_fast.engine import RankLostError, Ranks
from cxgrad_fast.engine.memory import measured_peak, megabytes
from cxgrad_fast.episodes import SPLITS, EpisodeSampler
from cxgrad_fast.evaluate import Score, explain_statistics, predict_tasks, score
from cxgrad_fast.folder_lock import FolderLock
from cxgrad_fast.launched import NON_FINITE, on_ranks
from cxgrad_fast.learner import Learner, NonFiniteError, NonFiniteLossError
from cxgrad_fast.pipeline import StepNumbers, Steps
from cxgrad_fast.runs import (
    LATEST,
    FollowedRun,
    Run,
    best_models,
    check_writable,
    draw_curves,
    latest_file,
    not_deleted,
    source_version,
)
from cxgrad_fast.session import Session, restore_rng
from cxgrad_fast.signals import Interrupted, Signals

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises InputError for what :func:`cxgrad_fast.cli.run_command` prints."""
    return on_ranks(_main, argv)


def _main(argv: Sequence[str] | None, ranks: Ranks, signals: Signals) -> int:
    options, settings = ranks.together(lambda: _parser().parse(argv))
    if options.compile:
        settings["run.compile"] = True
    with ExitStack() as stack:
        session, run = (_start if options.resume is None else _resume)(options, settings, ranks, signals, stack)
        stack.enter_context(
            signals.guarding(lambda signum: run_command(lambda _: endings.step_left(session, run, signum)))
        )
        where = f"{session.learner.device}, {session.config.run.precision}"
        if ranks.size > 1:
            where += f", {ranks.size} ranks"
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


def _start(
    options: Any, settings: dict[str, object], ranks: Ranks, signals: Signals, stack: ExitStack
) -> tuple[Session, Run]:
    """A new session and its folder, which is made only when nothing else can be wrong any more."""

    def planned() -> tuple[Config, Path]:
        config = build_config(options.preset, options.config, settings)
        now = datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = Path(options.out or f"runs/{config.preset}-{now}")
        check_writable(folder)
        return config, folder

    config, folder = ranks.from_first(planned)
    session = ranks.in_turn(lambda: _open_session(config, ranks))
    torch.manual_seed(config.run.seed)
    run = _open_run(ranks, signals, folder, lambda: Run.create(folder, session.checkpoint()))
    return session, stack.enter_context(run)


def _resume(
    options: Any, settings: dict[str, object], ranks: Ranks, signals: Signals, stack: ExitStack
) -> tuple[Session, Run]:
    """The session of a run's latest checkpoint, and its folder; any number of ranks may have written it."""
    folder = Path(options.resume)
    locks: list[FolderLock] = []

    def planned() -> tuple[Checkpoint, Config]:
        for name in ("preset", "config", "out"):
            if getattr(options, name):
                raise InputError(f"--{name} does not go with --resume: the run brings its own settings and folder")
        latest = latest_file(folder)
        locks.append(stack.enter_context(FolderLock(folder)))  # what is read now is what the run goes on from
        saved = read_checkpoint(latest)
        config = saved.config.override(settings)
        old, new = saved.config.flat(), config.flat()
        # a schedule that ends with the run goes by its length
        fixed = {"outer.iterations"} if new["outer.schedule"] in ("linear", "cosine") else set()
        for name in new:
            if new[name] != old[name] and name not in RESUMABLE - fixed:
                raise InputError(
                    f"setting '{name}' (={new[name]}) cannot change in a resumed run (there: {old[name]}): "
                    "it would change its numbers, start a new run for it"
                )
        check_writable(folder)
        best, lines = not_deleted(folder, saved.best, len(saved.best))
        _note(lines)
        return replace(saved, best=best), config

    saved, config = ranks.from_first(planned)

    def opened() -> Session:
        session = _open_session(config, ranks)
        for part, fingerprint in session.fingerprints.items():
            if fingerprint != saved.fingerprints.get(part):
                pool = session.samplers[part].pool
                raise InputError(
                    f"the images of {pool.source}, split '{pool.split}', are not those that run '{folder}' was trained "
                    "with: bring those back, or start a new run"
                )
        session.learner = saved.learner(folder / LATEST, config, optimizer=True, ranks=ranks)
        session.iteration, session.validated, session.best = saved.iteration, saved.validated, list(saved.best)
        return session

    session = ranks.in_turn(opened)
    session.learner.check_finite(f"'{folder / LATEST}'")
    restore_rng(saved.rng, session.learner.device)
    run = _open_run(ranks, signals, folder, lambda: Run(folder, session.checkpoint(), locks[0]))
    return session, stack.enter_context(run)


def _note(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _open_run(ranks: Ranks, signals: Signals, folder: Path, open_it: Callable[[], Run]) -> Run:
    """The run's folder, which rank 0 alone writes."""
    opened: list[Run] = []

    def open_here() -> Run:
        opened.append(open_it() if ranks.is_first else FollowedRun(folder))
        return opened[0]

    with signals.hold():
        try:
            return ranks.together(open_here)
        except RankLostError:  # which is told as: there is nothing to save
            for run in opened:
                run.discard()
            raise


def _open_session(config: Config, ranks: Ranks) -> Session:
    """Learner and data of a Config; everything that can be wrong with either is found here."""
    learner = Learner(config, ranks)
    pools = {split: open_pool(config, split) for split in SPLITS}
    if config.data.cross_domain:
        pools["cross-domain"] = open_pool(config, "test", source=config.data.cross_domain)
    fingerprints = {part: pool.fingerprint() for part, pool in pools.items()}
    for part in ("train", "val"):
        pools[part] = pools[part].to(learner.device)  # the others are used once, at the end
    samplers = {
        part: EpisodeSampler(pool, config, learner.dtype, training=part == "train") for part, pool in pools.items()
    }
    return Session(config, learner, samplers, fingerprints, source_version(), ranks)


def _train_and_test(session: Session, run: Run, signals: Signals) -> int:
    """All of a run from where the session is; the exit code."""
    try:
        if session.iteration < session.config.outer.iterations:
            print(session.learner.plan_memory(session.config.outer.meta_batch), flush=True)
            if session.learner.rounds_in_software:
                print(f"{session.config.run.precision}: rounded in software, no faster than float32", flush=True)
        before = measured_peak(session.learner.device)
        _train(session, run, signals)
        peak = measured_peak(session.learner.device)
        print(f"memory: measured peak {megabytes(peak)}, {megabytes(before)} before the first step", flush=True)
        _test(session, run, signals)
    except Interrupted as stop:
        return endings.interrupted(session, run, stop)
    except NonFiniteError as error:
        signals.stop_watching()
        if session.ranks.is_first:
            print(f"error: {_explain_non_finite(session, run, error)}", file=sys.stderr)
        return NON_FINITE
    except RankLostError as error:
        return endings.rank_lost(session, run, signals, error)
    return 0


def _train(session: Session, run: Run, signals: Signals) -> None:
    config, meta_batch = session.config, session.config.outer.meta_batch
    progress = Progress("training", config.outer.iterations, session.iteration, is_shown=session.ranks.is_first)
    recent: deque[StepNumbers] = deque(maxlen=50)
    own = session.ranks.shard(meta_batch)
    steps = Steps(session.learner, session.samplers["train"], meta_batch, own, session.iteration)
    try:
        while True:
            if session.validation_is_due():
                progress.note(_validate(session, run, signals))
            if session.iteration >= config.outer.iterations:
                return
            steps.advance(_next_stop(session))
            recent.append(_finish_step(session, run, signals, steps))
            progress.update(session.iteration, _describe(recent, meta_batch))
            signals.check()
            if session.iteration % config.run.checkpoint_every == 0:
                with signals.hold():
                    run.save(session.checkpoint())
    except (Interrupted, RankLostError):
        while steps.is_next_done():  # its update is in the weights that will be saved
            _finish_step(session, run, signals, steps)
        raise
    finally:
        progress.close()


def _next_stop(session: Session) -> int:
    """The iteration after which the weights are wanted next: to be validated or saved."""
    outer, every = session.config.outer, session.config.run.checkpoint_every
    ahead = [done * (session.iteration // done + 1) for done in (outer.validate_every, every)]
    return min(*ahead, outer.iterations)


def _finish_step(session: Session, run: Run, signals: Signals, steps: Steps) -> StepNumbers:
    """Take over the next step's update, count it, write its rows: at no time is the session between two steps."""
    with signals.hold():
        numbers = steps.finish()
        _log(session, run, numbers)
    return numbers


def _log(session: Session, run: Run, step: StepNumbers) -> None:
    session.iteration += 1
    names = ("loss", "accuracy", "first_support_loss", "last_support_loss")
    values = (step.loss, step.accuracy, *step.support_losses)
    run.log(session.iteration, "train", **dict(zip(names, values, strict=False)))
    rate = session.config.outer.meta_batch / step.seconds
    run.log_scalars(session.iteration, {"speed/seconds": step.seconds, "speed/episodes_per_second": rate})


def _describe(recent: deque[StepNumbers], meta_batch: int) -> str:
    loss, accuracy, seconds = (
        sum(getattr(step, name) for step in recent) / len(recent) for name in ("loss", "accuracy", "seconds")
    )
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
        ranks=session.ranks,
    )
    result = score(logits, labels)
    now = Best(session.iteration, result.accuracy)
    with signals.hold():
        session.validated = session.iteration
        session.best = sorted([*session.best, now], key=lambda best: (-best.accuracy, best.iteration))[
            : evaluation.ensemble
        ]
        run.log(session.iteration, "val", loss=result.loss, accuracy=result.accuracy, interval=result.tasks_interval)
        checkpoint = session.checkpoint()
        if now in session.best:
            run.save_best(now, checkpoint)
        run.save(checkpoint)
    rank = f"number {session.best.index(now) + 1} so far" if now in session.best else "not among the best"
    return f"iteration {session.iteration}: validation accuracy {100 * result.accuracy:.2f} %, {rank}"


def _test(session: Session, run: Run, signals: Signals) -> None:
    """The ensemble of the best models on the test tasks of each set: printed, and in result.json."""
    config, ranks = session.config, session.ranks

    def models() -> list[tuple[Path, Checkpoint]]:
        found, lines = best_models(run.folder, session.best, config.evaluation.ensemble)
        _note(lines)
        return found

    saved = ranks.from_first(models)
    learners = [checkpoint.learner(file, config, ranks=ranks) for file, checkpoint in saved]
    for learner, (file, _) in zip(learners, saved, strict=True):
        learner.check_finite(f"'{file.name}'")
    names = [file.name for file, _ in saved]
    print(f"ensemble of {len(names)}: {', '.join(names)}\n{explain_statistics(config)}", flush=True)
    results: dict[str, Any] = {"models": names, "statistics": config.evaluation.statistics}
    for part in ("test", "cross-domain"):
        if part in session.samplers:
            sampler = session.samplers[part]
            result = _test_on(learners, sampler, session, signals)
            print(
                "\n".join([f"{part} on {sampler.pool.source}", *(f"  {line}" for line in result.lines())]), flush=True
            )
            results[part] = {"source": sampler.pool.source} | result.plain()
    signals.stop_watching()  # all is done that could be repeated
    if ranks.is_first:
        write_atomic(run.folder / "result.json", (json.dumps(results, indent=2) + "\n").encode())
        draw_curves(run.folder)


def _test_on(learners: list[Learner], sampler: EpisodeSampler, session: Session, signals: Signals) -> Score:
    evaluation, ranks = session.config.evaluation, session.ranks
    tasks = evaluation.test_tasks
    progress = Progress(f"test on {sampler.pool.source}", tasks, is_shown=ranks.is_first)

    def report(done: int) -> None:
        progress.update(done)
        signals.check()

    try:
        batch = evaluation.tasks_per_batch
        return score(*predict_tasks(learners, sampler, tasks, tasks_per_batch=batch, report=report, ranks=ranks))
    finally:
        progress.close()


def _explain_non_finite(session: Session, run: Run, error: NonFiniteError) -> str:
    if isinstance(error, NonFiniteLossError):
        try:
            return _save_non_finite(session, run, error)
        except NonFiniteError as cause:  # the weights before the step
            error = cause
    return (
        f"{error} (after iteration {session.iteration}); {LATEST} is as it was: "
        "start a new run with a lower outer.learning_rate"
    )


def _save_non_finite(session: Session, run: Run, error: NonFiniteLossError) -> str:
    """Save what repeats the failure, the weights before the step and its episodes; the message."""
    step, meta_batch = session.iteration + 1, session.config.outer.meta_batch
    first = session.iteration * meta_batch
    episodes = session.samplers["train"].sample(first, meta_batch)
    file = run.folder / f"nonfinite-{step}.pt"
    tasks = list(range(first, first + meta_batch))
    write_checkpoint(file, session.checkpoint(tasks=tasks, **episodes.tensors(), ways=episodes.ways))
    return (
        f"{error}: iteration {step}, tasks {tasks[0]} to {tasks[-1]}; the weights before it and its episodes are in "
        f"'{file}', {LATEST} is as it was"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
