"""A row of the episodes bench: what is known of one side in one case; as a line of a table, and in a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from equal_work import TIMED_TOLERANCE, TOLERANCE
from measure import Timing
from side import device_of

from cxgrad_fast import Config

NOTHING = Timing(())


@dataclass(frozen=True)
class Row:
    """What is known of one side in one case.

    Attributes:
        side: its name.
        reason: why it has no figure, or not all of them; empty for most.
        wrong: it does not do the same work.
        errors: of the equal-work check.
        seconds: of a meta-step, the mean of several in a row, one sample a turn.
        cold: of the first step of each turn.
        gain: loop's seconds over this side's, pair by pair.
        share: of the roofline limit, in [0, 1]; None where the limit is not known.
        peak_bytes: memory of a step, as :func:`measure.peak_memory` says.
        operators: calls or launches of a step; None for a side that is one compiled program.
        first_step_s: of the first step in its process.
    """

    side: str
    reason: str = ""
    wrong: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    seconds: Timing = NOTHING
    cold: Timing = NOTHING
    gain: Timing = NOTHING
    share: float | None = None
    peak_bytes: int | None = None
    operators: int | None = None
    first_step_s: float | None = None

    def rate(self, tasks: int) -> Timing:
        """Episodes per second."""
        return Timing(tuple(tasks / seconds for seconds in self.seconds.samples))

    @property
    def once_s(self) -> float | None:
        """Seconds of the first step that later steps do not take: compilation, warm-up."""
        if self.first_step_s is None or not self.seconds.samples:
            return None
        return max(0.0, self.first_step_s - self.seconds.median)


def describe(config: Config) -> str:
    """A case in words."""
    task, model, inner = config.task.of_training(), config.model, config.inner
    return (
        f"{config.preset}, {inner.algorithm}: {task.ways}-way {task.shots}-shot, {config.outer.meta_batch} tasks, "
        f"{model.backbone}/{model.filters} {model.image_size}x{model.image_size}, {inner.steps} steps of order "
        f"{inner.order}, {config.run.precision} on {device_of(config).type}"
    )


COLUMNS = "side, episodes/s (20-80 %), x loop (20-80 %), n, of limit, peak MB, operators, first step s, once s, note"
HEADER = (f"| {COLUMNS.replace(', ', ' | ')} |", "|" + "---|" * len(COLUMNS.split(", ")))


def table(config: Config, rows: Sequence[Row], limit: dict[str, Any]) -> list[str]:
    """Markdown: the case in words, the limit, a row for every side."""
    tasks = config.outer.meta_batch
    words = limit.get("reason") or (
        f"limit {tasks / limit['floor_s']:.2f} episodes/s ({limit['flops'] / 1e9:.2f} GFLOP at "
        f"{limit['peak_flops_per_s'] / 1e9:.0f} GFLOP/s, {limit['bytes'] / 1e6:.0f} MB at "
        f"{limit['peak_bytes_per_s'] / 1e9:.1f} GB/s)"
    )
    return [f"**{describe(config)}**; {words}", "", *HEADER, *(_line(row, tasks) for row in rows)]


def _line(row: Row, tasks: int) -> str:
    cells = [
        row.side,
        _spread(row.rate(tasks)),
        _spread(row.gain),
        _cell(len(row.seconds.samples) or None, str),
        _cell(row.share, lambda share: f"{100 * share:.1f} %"),
        _cell(row.peak_bytes, lambda peak: f"{peak / 1e6:.0f}"),
        _cell(row.operators, str),
        _cell(row.first_step_s, lambda seconds: f"{seconds:.2f}"),
        _cell(row.once_s, lambda seconds: f"{seconds:.2f}"),
        row.reason,
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: Any, shown: Callable[[Any], str]) -> str:
    return "-" if value is None else shown(value)


def _spread(timing: Timing) -> str:
    if not timing.samples:
        return "-"
    return f"{timing.median:.3g} ({timing.p20:.3g}-{timing.p80:.3g})"


def record(config: Config, rows: Sequence[Row], limit: dict[str, Any]) -> dict[str, Any]:
    """A case of a result file."""
    tasks = config.outer.meta_batch
    sides = []
    for row in rows:
        timings = {
            "seconds": row.seconds,
            "cold_s": row.cold,
            "episodes_per_s": row.rate(tasks),
            "ratio_to_loop": row.gain,
        }
        plain = {key: value for key, value in asdict(row).items() if key not in ("seconds", "cold", "gain", "share")}
        figures = {key: timing.as_dict() for key, timing in timings.items() if timing.samples}
        sides.append({**plain, "once_s": row.once_s, "fraction_of_limit": row.share, **figures})
    precision = config.run.precision
    tolerances = {"small": TOLERANCE[precision], "timed": TIMED_TOLERANCE[precision]}
    return {
        "description": describe(config),
        "device": device_of(config).type,
        "config": config.flat(),
        "preset": config.preset,
        "limit": limit,
        "tolerances": tolerances,
        "sides": sides,
    }
