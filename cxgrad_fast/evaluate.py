"""``python -m cxgrad_fast.evaluate RUN``: the accuracy of a trained model on any source, split and number of tasks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.cli import Parser, Progress, add_config_options, build_config, run_command
from cxgrad_fast.config import Config, InputError, MetricConfig, preset
from cxgrad_fast.data import open_pool
from cxgrad_fast.engine import ALONE, Ranks
from cxgrad_fast.episodes import SPLITS, EpisodeSampler
from cxgrad_fast.launched import on_ranks
from cxgrad_fast.learner import Learner, NonFiniteError
from cxgrad_fast.runs import best_models, latest_file
from cxgrad_fast.signals import Signals
from cxgrad_fast.torch_files import read_torch_file

_RELEASED_PRESET = "released-mini-5w1s"

_MEANING = {
    "transductive": "the query images of a task are normalised together, as the released program does: "
    "an answer depends on the other queries of its task (transductive)",
    "support": "query images are normalised with the statistics of their task's support images: "
    "each is answered by itself (inductive)",
    "running": "query images are normalised with averages that meta-training gathered over its query passes: "
    "each is answered by itself (inductive)",
}
_MEANING_WITHOUT_INNER_LOOP = _MEANING | {
    "transductive": "the images of a task are normalised as in meta-training, its query images together: "
    "an answer depends on the other queries of its task (transductive)",
    "running": "support and query images are normalised with averages that meta-training gathered over its passes: "
    "each query is answered by itself (inductive)",
}


@dataclass(frozen=True)
class Score:
    """How well query images were classified.

    Attributes:
        accuracy: share of images, all tasks together.
        loss: mean cross-entropy over images.
        tasks_interval: half of the 95 % interval over tasks, ``1.96 * std(ddof=1) / sqrt(tasks)`` of the tasks'
            accuracies; NaN for one task.
        images_interval: half of the released program's binomial interval, ``1.96 * sqrt(err * (1 - err) / images)``:
            it takes the images for independent, so it is the smaller one.
        tasks: number of tasks.
        images: number of query images, all tasks together.
    """

    accuracy: float
    loss: float
    tasks_interval: float
    images_interval: float
    tasks: int
    images: int

    def lines(self) -> list[str]:
        """The accuracy and its two intervals in percent, each under its own name."""
        over_tasks = "needs two tasks" if math.isnan(self.tasks_interval) else f"± {100 * self.tasks_interval:.2f} %"
        return [
            f"accuracy                       {100 * self.accuracy:.2f} %",
            f"95 % interval over tasks       {over_tasks}   ({self.tasks} tasks)",
            f"binomial interval over images  ± {100 * self.images_interval:.2f} %   "
            f"({self.images} images; the released program's)",
        ]

    def plain(self) -> dict[str, Any]:
        """The fields as JSON takes them: NaN is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


def score(logits: Tensor, labels: Tensor) -> Score:
    """Score of ``logits [tasks, images, ways]`` against ``labels [tasks, images]``."""
    by_task = (logits.argmax(-1) == labels).double().mean(1)
    tasks, images = labels.shape[0], labels.numel()
    accuracy = by_task.mean().item()
    spread = by_task.std(correction=1).item() if tasks > 1 else math.nan
    return Score(
        accuracy=accuracy,
        loss=F.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item(),
        tasks_interval=1.96 * spread / math.sqrt(tasks),
        images_interval=1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0) / images),
        tasks=tasks,
        images=images,
    )


def predict_tasks(
    learners: Sequence[Learner],
    sampler: EpisodeSampler,
    tasks: int,
    *,
    tasks_per_batch: int,
    statistics: str | None = None,
    report: Callable[[int], None] = lambda done: None,
    ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor]:
    """The ensemble's answers to tasks ``0 .. tasks - 1`` of a sampler.

    Args:
        learners: the models of the ensemble.
        sampler: on any device.
        tasks: how many.
        tasks_per_batch: adapted at once.
        statistics: as for :meth:`Learner.predict`.
        report: called with the number of tasks done after each batch, or each round of a batch a rank; what it raises
            ends the job.
        ranks: who shares the batches; all get all answers, one process's to the bit.

    Returns:
        logits ``[tasks, N*Q, N]``, the mean over the models of their raw logits (not of their probabilities), and
        labels ``[tasks, N*Q]``, both on the CPU.

    Raises:
        NonFiniteError: a parameter of a model or an answer is not finite; on all ranks.
        RankLostError: a rank did not take part.
    """
    for learner in learners:  # on a rank without tasks too
        learner.check_finite()
    logits, labels = [], []
    for start in range(0, tasks, tasks_per_batch * ranks.size):
        count = min(tasks_per_batch * ranks.size, tasks - start)
        own = slice(*(min(tasks_per_batch * rank, count) for rank in (ranks.rank, ranks.rank + 1)))
        episodes = sampler.sample(start + own.start, own.stop - own.start)
        if len(episodes):
            outputs = torch.stack([learner.predict(episodes, statistics).cpu() for learner in learners]).mean(0)
        else:
            outputs = torch.zeros(*episodes.query_y.shape, learners[0].config.task.ways, dtype=learners[0].dtype)
        found = [outputs, episodes.query_y.cpu()]
        if ranks.size > 1:
            found = ranks.total(ranks.rows([outputs.double(), found[1]], own, count))
        finite = found[0].flatten(1).isfinite().all(1)
        if not finite.all():
            task = start + finite.tolist().index(False)
            raise NonFiniteError(
                f"the logits of task {task} of {sampler.pool.source}, split '{sampler.pool.split}', are not finite"
            )
        logits.append(found[0])
        labels.append(found[1])
        report(start + count)
    return torch.cat(logits), torch.cat(labels)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; raises InputError for what :func:`cxgrad_fast.cli.run_command` prints."""
    return on_ranks(_main, argv)


def _main(argv: Sequence[str] | None, ranks: Ranks, signals: Signals) -> int:
    options, settings = ranks.together(lambda: _parser().parse(argv))
    settings |= _shortcuts(options)
    config, learners, models, sampler = ranks.in_turn(lambda: _opened(options, settings, ranks))
    for learner, name in zip(learners, models, strict=True):
        learner.check_finite(f"'{name}'")
    tasks = config.evaluation.test_tasks
    progress = Progress("test tasks", tasks, is_shown=ranks.is_first)

    def report(done: int) -> None:
        progress.update(done)
        signals.check()

    try:
        logits, labels = predict_tasks(
            learners,
            sampler,
            tasks,
            tasks_per_batch=config.evaluation.tasks_per_batch,
            report=report,
            ranks=ranks,
        )
    finally:
        progress.close()
    _print(options.json, score(logits, labels), config, sampler.pool.source, options.split, models)
    return 0


def _opened(
    options: Any, settings: dict[str, object], ranks: Ranks
) -> tuple[Config, list[Learner], list[str], EpisodeSampler]:
    """Settings, learners, their names and the tasks."""
    given = [name for name in ("run", "checkpoint", "released") if getattr(options, name)]
    if len(given) != 1:
        raise InputError("evaluate one thing: a run's folder, --checkpoint FILE or --released FILE")
    if options.released:
        config = build_config(options.preset, options.config, settings, _RELEASED_PRESET)
        learners, models = [_open_released(Path(options.released), config, ranks)], [Path(options.released).name]
        fingerprints: dict[str, str] = {}
    elif options.preset or options.config:
        raise InputError("--preset and --config go with --released: a run brings its own settings")
    else:
        config, learners, models, fingerprints = _open_run(Path(options.run or options.checkpoint), settings, ranks)
    pool = open_pool(config, options.split)
    if ranks.is_first and fingerprints.get(options.split, pool.fingerprint()) != pool.fingerprint():
        note = "if classes moved between splits, the model may have been trained on what it is tested on"
        print(f"note: {pool.source}, split '{pool.split}', has changed since the run was made; {note}", file=sys.stderr)
    return config, learners, models, EpisodeSampler(pool, config, learners[0].dtype)


def explain_statistics(config: Config) -> str:
    """One line: where the normalisation of the query pass has its statistics from."""
    if config.model.norm != "batch":
        return f"{config.model.norm} norm: every image is normalised by itself"
    meaning = _MEANING_WITHOUT_INNER_LOOP if isinstance(config.inner, MetricConfig) else _MEANING
    return f"BatchNorm, {config.evaluation.statistics}: {meaning[config.evaluation.statistics]}"


def _print(as_json: bool, result: Score, config: Config, source: str, split: str, models: Sequence[str]) -> None:
    task = config.task
    if as_json:
        facts = {
            "source": source,
            "split": split,
            "ways": task.ways,
            "shots": task.shots,
            "queries": task.queries,
            "models": list(models),
            "statistics": config.evaluation.statistics if config.model.norm == "batch" else config.model.norm,
        }
        print(json.dumps(facts | result.plain()))
        return
    print(f"{source}, split '{split}': {task.ways}-way {task.shots}-shot, {task.queries} queries a class")
    print(f"models                         {len(models)}: {', '.join(models)}")
    print("\n".join([*result.lines(), explain_statistics(config)]))


def _parser() -> Parser:
    parser = Parser("evaluate", __doc__ or "", preset(_RELEASED_PRESET))
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, or a checkpoint of one")
    parser.add_argument("--checkpoint", metavar="FILE", help="one checkpoint instead of a run's best")
    parser.add_argument("--released", metavar="FILE", help="a checkpoint of the paper's released program")
    parser.add_argument("--source", help="glyphs, digits or folder (default: the run's)")
    parser.add_argument("--root", metavar="DIR", help="of source folder (default: the run's)")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--tasks", metavar="N", help="number of tasks (default: the run's evaluation.test_tasks)")
    parser.add_argument("--queries", metavar="N", help="query images a class (default: the run's task.queries)")
    parser.add_argument("--ensemble", metavar="N", help="best models whose logits are averaged (default: the run's)")
    parser.add_argument("--eval-bn", metavar="KIND", help=f"{', '.join(_MEANING)} (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    add_config_options(parser, _RELEASED_PRESET)
    return parser


def _shortcuts(options: Any) -> dict[str, object]:
    names = {
        "source": "data.source",
        "root": "data.root",
        "tasks": "evaluation.test_tasks",
        "queries": "task.queries",
        "ensemble": "evaluation.ensemble",
        "eval_bn": "evaluation.statistics",
    }
    return {name: getattr(options, key) for key, name in names.items() if getattr(options, key) is not None}


def _open_run(
    path: Path, settings: dict[str, object], ranks: Ranks
) -> tuple[Config, list[Learner], list[str], dict[str, str]]:
    """Settings, learners, their names and the pools' fingerprints of a run's folder or of one checkpoint."""
    first = path if path.is_file() else latest_file(path)
    saved = read_checkpoint(first)
    config = saved.config.override(settings)
    old, new = saved.config.flat(), config.flat()
    for name in new:
        if name.startswith(("model.", "outer.")) and new[name] != old[name]:
            raise InputError(f"setting '{name}' (={new[name]}) is fixed by the checkpoint '{first}' (={old[name]})")
    models = [(path, saved)]
    if not path.is_file():
        models, lines = best_models(path, saved.best, config.evaluation.ensemble)
        for line in lines if ranks.is_first else []:
            print(line, file=sys.stderr)
    learners = [checkpoint.learner(file, config, ranks=ranks) for file, checkpoint in models]
    is_same_data = all(new[name] == old[name] for name in ("data.source", "data.variant"))
    return config, learners, [file.name for file, _ in models], saved.fingerprints if is_same_data else {}


def _open_released(file: Path, config: Config, ranks: Ranks) -> Learner:
    """A Learner with the parameters of a released checkpoint: ``{"network": state dict, ...}`` or a state dict."""
    content = read_torch_file(file)
    state = content.get("network", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"'{file}' is not a released checkpoint: it holds neither 'network' nor a state dict")
    learner = Learner(config, ranks)
    try:
        learner.load_released(state)
    except (TypeError, ValueError) as error:
        raise InputError(f"cannot use '{file}' with preset {config.preset}: {error}") from error
    return learner


if __name__ == "__main__":
    sys.exit(run_command(main))
