"""Every setting of the project, once: frozen dataclasses, their presets, and how words become values.

A setting is named ``group.field`` (``task.shots``); the same words are used in :func:`preset`, on the command line
(``--task.shots 5``) and in TOML files. An unknown word is an :class:`InputError` that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from cxgrad_fast.near_words import advice, nearest
from cxgrad_fast.printable import one_line, shown

LARGEST_INTEGER, LARGEST_NUMBER = 10**9, 1e38  # of settings that name no bound of their own; 1e38 is a float32
LARGEST_FILE = 1 << 20  # bytes of a settings file
_LARGEST_BATCH = 2**50  # numbers in a layer's output for all tasks at once: petabytes
_RELEASED_TASKS = 2**32 - 10**6  # numpy's RandomState takes 32 bits, and the first task's seed is below a million


class InputError(ValueError):
    """Bad input from a person: the message is one line that names the file or setting and says what to do.

    The commands print it and exit with code 2. Whatever text from outside the message holds, it is one printable line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def _choice(*options: object) -> dict[str, object]:
    return {"choices": options}


def _at_least(bound: float, at_most: float | None = None) -> dict[str, object]:
    return {"minimum": bound, "maximum": at_most}


def _above(bound: float) -> dict[str, object]:
    return {"above": bound}


def _like(pattern: str, meaning: str) -> dict[str, object]:
    return {"pattern": pattern, "meaning": meaning}


@dataclass(frozen=True)
class TaskConfig:
    """The shape of one task (episode)."""

    ways: int = field(default=5, metadata=_at_least(2, 100_000))
    shots: int = field(default=1, metadata=_at_least(1, 100_000))
    queries: int = field(default=15, metadata=_at_least(1, 100_000))  # per class


@dataclass(frozen=True)
class ModelConfig:
    """The network that is meta-learned."""

    backbone: str = field(default="conv4", metadata=_choice("conv4", "resnet12"))
    # conv4: of each layer; resnet12: of the first block, doubled by each of the three that follow
    filters: int = field(default=48, metadata=_at_least(1, 100_000))
    norm: str = field(default="batch", metadata=_choice("batch", "group", "layer"))
    norm_groups: int = field(default=8, metadata=_at_least(1))  # of norm = group
    norm_eps: float = field(default=1e-5, metadata=_at_least(1e-30))
    slope: float = field(default=0.01, metadata=_at_least(0))  # of LeakyReLU; 0 is ReLU
    image_size: int = field(default=84, metadata=_at_least(1, 10_000))
    channels: int = field(default=3, metadata=_choice(1, 3))
    conv_bias: bool = False  # of every convolution; the norm behind it removes it from all outputs
    pool_last: bool = True  # resnet12: pool after the fourth block too (paper) or not (released ALFA program)
    pool_padding: tuple[int, ...] = (0, 0, 0, 0)  # resnet12: of each block's pool; the released program has 0,0,1,1


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop (adaptation)."""

    algorithm: str = field(default="cxgrad", metadata=_choice("cxgrad", "maml"))
    steps: int = field(default=5, metadata=_at_least(0, 100_000))
    order: int = field(default=2, metadata=_choice(1, 2))  # of the meta-gradient
    learning_rate: float = field(default=0.01, metadata=_at_least(0))  # alpha
    context_dim: int = field(default=100, metadata=_at_least(1, 100_000))  # of nu, and of the scaler's hidden layer
    context_learning_rate: float = field(default=1.0, metadata=_at_least(0))  # beta
    # task: nu accumulates over the steps; step: nu starts from zero, with its own first pass, in every step
    context_update: str = field(default="task", metadata=_choice("task", "step"))
    # of the gradient that moves nu away from zero: 1 is what the released program does, 2 how one may read the paper
    initial_context_order: int = field(default=1, metadata=_choice(1, 2))
    # exact: unit-norm weight and epsilon / gamma^2 (docs/math.md); scaled: the weight gamma * w / |w| itself
    form: str = field(default="exact", metadata=_choice("exact", "scaled"))


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop (meta-update, Adam)."""

    learning_rate: float = field(default=1e-3, metadata=_above(0))
    meta_batch: int = field(default=4, metadata=_at_least(1))
    iterations: int = field(default=50_000, metadata=_at_least(1))
    validate_every: int = field(default=500, metadata=_at_least(1))
    # of the query losses over the tasks: the paper's Eq. 3 sums, the released program averages
    reduction: str = field(default="mean", metadata=_choice("mean", "sum"))


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how episodes are drawn from them."""

    source: str = field(default="glyphs", metadata=_choice("glyphs", "digits", "folder"))
    root: str = ""  # folder: root/{train,val,test}/<class>/*; glyphs: a folder of fonts instead of matplotlib's
    variant: str = field(default="default", metadata=_choice("default", "hard"))  # of glyphs
    cross_domain: str = field(default="", metadata=_choice("", "digits", "glyphs"))  # also tested on, at the end
    normalize: str = field(default="none", metadata=_choice("none", "imagenet", "cifar"))
    # counter: our own stable stream; released: the classes and images that the released program would draw
    sampler: str = field(default="counter", metadata=_choice("counter", "released"))


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation and test."""

    # of the BatchNorm layers in the query pass: its own batch (as released), the support set's, or training's average
    statistics: str = field(default="transductive", metadata=_choice("transductive", "support", "running"))
    ensemble: int = field(default=5, metadata=_at_least(1))  # best checkpoints kept and averaged
    validation_tasks: int = field(default=100, metadata=_at_least(1))
    test_tasks: int = field(default=600, metadata=_at_least(1))
    tasks_per_batch: int = field(default=4, metadata=_at_least(1))  # adapted at once; no effect on the numbers


@dataclass(frozen=True)
class RunConfig:
    """How a run is executed."""

    device: str = field(default="auto", metadata=_like(r"auto|cpu|cuda(:[0-9]{1,4})?", "auto, cpu or cuda[:index]"))
    precision: str = field(default="float32", metadata=_choice("float64", "float32", "tf32", "bfloat16"))
    backend: str = field(default="auto", metadata=_choice("auto", "reference", "cpp", "triton"))
    compile: bool = False
    tasks_per_chunk: int = field(default=0, metadata=_at_least(0))  # of the meta-batch; 0: all at once
    recompute: bool = False  # inner steps in the backward pass: less memory, one more forward pass
    checkpoint_every: int = field(default=100, metadata=_at_least(1))  # iterations
    # of the initial weights and of all episodes; numpy's RandomState, which gets 104 more, takes no larger one
    seed: int = field(default=0, metadata=_at_least(0, 2**32 - 1 - 104))


@dataclass(frozen=True)
class Config:
    """All settings of a run. Build one with :func:`preset`; ``config.task.shots`` reads a setting."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    preset: str = ""  # the name it was built from

    def override(self, overrides: Mapping[str, object]) -> Config:
        """A copy with settings replaced, given by their dotted names.

        Values may be of the setting's type or the text of one (``"5"``, ``"true"``, ``"0,0,1,1"``).

        Raises:
            InputError: unknown name (with the nearest known one), or a value that the setting does not take.
        """
        groups: dict[str, dict[str, object]] = {}
        for name, value in overrides.items():
            known = _FIELDS.get(_ALIASES.get(name, name))
            if known is None:
                raise InputError(f"unknown setting {shown(name)}: {advice(str(name), _FIELDS)}")
            group, spec = known
            groups.setdefault(group, {})[spec.name] = _coerce(name, spec, group, value)
        replaced = {group: dataclasses.replace(getattr(self, group), **fields) for group, fields in groups.items()}
        config = dataclasses.replace(self, **replaced)
        _check_together(config)
        return config

    def flat(self) -> dict[str, Any]:
        """All settings as ``{dotted name: value}``, tuples as lists: what checkpoints and TOML files hold."""
        values = {name: getattr(getattr(self, group), spec.name) for name, (group, spec) in _FIELDS.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_toml(self) -> str:
        """The settings as a TOML file that ``--config`` reads back to an equal Config."""
        lines = [f"preset = {_toml_value(self.preset)}"] if self.preset in PRESETS else []
        last = ""
        for name, value in self.flat().items():
            group, key = name.split(".")
            if group != last:
                lines += ["", f"[{group}]"]
                last = group
            lines.append(f"{key} = {_toml_value(value)}")
        return "\n".join(lines).lstrip("\n") + "\n"


def preset(name: str, overrides: Mapping[str, object] | None = None) -> Config:
    """The Config of a preset, e.g. ``preset("released-mini-5w1s", {"model.filters": 8, "task.shots": 5})``.

    Raises:
        InputError: unknown preset or setting (the message names the nearest), or a value out of its range.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"unknown preset {shown(name)}: did you mean '{nearest(str(name), PRESETS)}'?")
    return dataclasses.replace(Config(), preset=name).override({**PRESETS[name], **(overrides or {})})


def from_toml(path: str | Path) -> dict[str, object]:
    """The settings of a TOML file as ``{dotted name: value}``; ``preset`` may stand among them.

    Raises:
        InputError: the file is missing, is larger than 1 MiB, or is not TOML.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"cannot read the settings file '{path}': {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise InputError(f"'{path}' is not a settings file: it is larger than 1 MiB")
    try:
        tables = tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"the settings file '{path}' is not UTF-8 text: byte {error.start} is no character") from None
    except RecursionError:
        raise InputError(f"the settings file '{path}' nests too deep: settings are group.field = value") from None
    except ValueError as error:  # TOMLDecodeError, and numbers of thousands of digits
        raise InputError(f"the settings file '{path}' is not TOML: {error}") from None
    settings: dict[str, object] = {}
    for group, table in tables.items():
        if isinstance(table, dict):
            settings |= {f"{group}.{key}": value for key, value in table.items()}
        else:
            settings[group] = table
    return settings


def _fields() -> dict[str, tuple[str, dataclasses.Field[Any]]]:
    known = {}
    for group in dataclasses.fields(Config):
        if group.name != "preset":
            for spec in dataclasses.fields(group.default_factory):  # type: ignore[arg-type]  # a dataclass each
                known[f"{group.name}.{spec.name}"] = (group.name, spec)
    return known


_FIELDS = _fields()
_ALIASES = {"data.seed": "run.seed"}  # one seed serves weights and episodes


def _coerce(name: str, spec: dataclasses.Field[Any], group: str, value: object) -> object:
    """``value`` as the type of its field, in range; InputError otherwise."""
    wanted = typing.get_type_hints(type(getattr(Config(), group)))[spec.name]
    result = _convert(wanted, value)
    if result is None:
        kind = "list of whole numbers" if wanted == tuple[int, ...] else wanted.__name__
        raise InputError(f"setting '{name}' takes a value of type {kind}, got {shown(value)}")
    choices, minimum, above = (spec.metadata.get(key) for key in ("choices", "minimum", "above"))
    if choices is not None and result not in choices:
        raise InputError(f"setting '{name}' takes one of {', '.join(map(repr, choices))}, got {shown(result)}")
    if minimum is not None and not result >= minimum:
        raise InputError(f"setting '{name}' must be at least {minimum}, got {shown(result)}")
    if above is not None and not result > above:
        raise InputError(f"setting '{name}' must be greater than {above}, got {shown(result)}")
    if wanted in (int, float):
        maximum = spec.metadata.get("maximum") or (LARGEST_INTEGER if wanted is int else LARGEST_NUMBER)
        if not result <= maximum:
            raise InputError(f"setting '{name}' must be at most {maximum}, got {shown(result)}")
    if wanted is str:
        _check_text(name, spec, result)
    return result


def _check_text(name: str, spec: dataclasses.Field[Any], text: str) -> None:
    pattern = spec.metadata.get("pattern")
    if pattern is not None and not re.fullmatch(pattern, text):
        raise InputError(f"setting '{name}' takes {spec.metadata['meaning']}, got {shown(text)}")
    try:
        text.encode()  # as in config.toml
        is_text = "\0" not in text
    except UnicodeEncodeError:
        is_text = False
    if not is_text:
        raise InputError(f"setting '{name}' must be UTF-8 text without NUL, got {shown(text)}: rename the folder")


def _convert(wanted: Any, value: Any) -> Any:
    """``value`` as ``wanted``, from its own type or from text; None where it is neither."""
    if wanted is bool:
        if isinstance(value, str):
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower())
        return value if isinstance(value, bool) else None
    if wanted is str:
        return value if isinstance(value, str) else str(value) if isinstance(value, Path) else None
    if wanted is int:
        return _whole(value)
    if wanted is float:
        return _number(value)
    if isinstance(value, str):
        value = value.strip("[]()").split(",")
    parts = [_whole(part) for part in value] if isinstance(value, list | tuple) else [None]
    return None if None in parts else tuple(parts)


def _whole(value: object) -> int | None:
    """A whole number, also as a float or as text; None for anything else."""
    try:
        if isinstance(value, str):
            return int(value) if value.isascii() else None  # int() takes the digits of all scripts
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        return None
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _number(value: object) -> float | None:
    """A finite number, also as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | Real) or (isinstance(value, str) and not value.isascii()):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_together(config: Config) -> None:
    _check_sizes(config)
    model = config.model
    if len(model.pool_padding) != 4 or not set(model.pool_padding) <= {0, 1}:
        raise InputError(
            f"setting 'model.pool_padding' takes four of 0 or 1, one a block, got {shown(model.pool_padding)}"
        )
    if model.norm == "group" and model.filters % model.norm_groups:
        raise InputError(
            f"setting 'model.norm_groups' (={model.norm_groups}) must divide 'model.filters' (={model.filters})"
        )
    size = model.image_size
    for block in range(4):
        if model.backbone == "conv4":
            size //= 2
        elif block < 3 or model.pool_last:
            size = (size + 2 * model.pool_padding[block]) // 2
    if size < 1:
        raise InputError(
            f"setting 'model.image_size' (={model.image_size}) pools to nothing in {model.backbone}: use at least 16"
        )
    if config.data.source == "folder" and not config.data.root:
        raise InputError(
            "setting 'data.root' is needed with data.source = folder: the folder that holds train/ val/ test/"
        )
    if config.evaluation.statistics != "transductive" and model.norm != "batch":
        raise InputError(
            f"setting 'evaluation.statistics' (={config.evaluation.statistics}) needs model.norm = batch: "
            f"norm = {model.norm} takes its statistics from each image alone"
        )


def _check_sizes(config: Config) -> None:
    """That a batch of tasks can be counted, and that the released program's seeds last for all tasks."""
    task, model, outer, evaluation = config.task, config.model, config.outer, config.evaluation
    evaluated = max(evaluation.validation_tasks, evaluation.test_tasks)
    tasks = max(outer.meta_batch, min(evaluation.tasks_per_batch, evaluated))
    images = tasks * task.ways * (task.shots + task.queries)
    if images * model.image_size**2 * max(model.channels, model.filters) > _LARGEST_BATCH:
        raise InputError(
            f"{tasks} tasks at once (outer.meta_batch, evaluation.tasks_per_batch) of {task.ways} ways, {task.shots} "
            f"shots and {task.queries} queries, {model.image_size} pixels wide, need more memory than any machine has"
        )
    drawn = max(outer.iterations * outer.meta_batch, evaluated)
    if config.data.sampler == "released" and drawn > _RELEASED_TASKS:
        raise InputError(
            f"data.sampler = released has seeds for {_RELEASED_TASKS} tasks, outer.iterations (={outer.iterations}) x "
            f"outer.meta_batch (={outer.meta_batch}) are more: use data.sampler = counter"
        )


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)


def _presets() -> dict[str, dict[str, object]]:
    """glyphs: calibrated for two cores and ten minutes; the rest: what the released program does and the paper says."""
    glyphs: dict[str, object] = {
        "model.filters": 32,
        "model.image_size": 28,
        "outer.learning_rate": 3e-3,
        "outer.meta_batch": 2,
        "outer.iterations": 900,
        "outer.validate_every": 100,
        "data.source": "glyphs",
        "data.cross_domain": "digits",
        "evaluation.tasks_per_batch": 8,
    }
    table: dict[str, dict[str, object]] = {
        "glyphs-5w1s": {**glyphs, "task.shots": 1},
        "glyphs-5w5s": {**glyphs, "task.shots": 5, "outer.iterations": 450, "outer.validate_every": 50},
    }
    for dataset, root, iterations in (
        ("mini", "datasets/mini_imagenet", 50_000),
        ("tiered", "datasets/tiered_imagenet", 125_000),
    ):
        for shots, meta_batch in ((1, 4), (5, 2)):
            released: dict[str, object] = {
                "task.shots": shots,
                "outer.meta_batch": meta_batch,
                "outer.iterations": iterations,
                "data.source": "folder",
                "data.root": root,
                "data.sampler": "released",
                "evaluation.validation_tasks": 600,
                "run.checkpoint_every": 500,
            }
            table[f"released-{dataset}-5w{shots}s"] = released
            table[f"paper-{dataset}-5w{shots}s"] = released | {
                "data.sampler": "counter",
                "model.slope": 0.0,
                "outer.reduction": "sum",
                "inner.initial_context_order": 2,
            }
    return table


PRESETS = _presets()
