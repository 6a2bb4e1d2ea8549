"""Every setting of the project, once: frozen dataclasses, their presets, and how words become values.

A setting is named ``group.field`` (``task.shots``); the same words are used in :func:`preset`, on the command line
(``--task.shots 5``) and in TOML files. An unknown word is an :class:`InputError` that names the nearest known one. The
words of the group ``inner`` are those of the algorithm that ``inner.algorithm`` names.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cxgrad_fast.config.checks import check_together
from cxgrad_fast.config.fields import InputError, coerced, settings_of
from cxgrad_fast.config.groups import DataConfig, EvaluationConfig, ModelConfig, OuterConfig, RunConfig, TaskConfig
from cxgrad_fast.config.inner import (
    ALGORITHMS,
    ALFAConfig,
    ANILConfig,
    BOILConfig,
    CAVIAConfig,
    CxGradConfig,
    FOMAMLConfig,
    InnerConfig,
    L2FConfig,
    MAMLConfig,
    MAMLPPConfig,
    MatchingNetConfig,
    MetaSGDConfig,
    MetricConfig,
    ModGradConfig,
    ProtoMAMLConfig,
    ProtoNetConfig,
    RelationNetConfig,
    ReptileConfig,
    carried,
    owners,
)
from cxgrad_fast.config.presets import PRESETS, from_toml, preset_layers, toml_value
from cxgrad_fast.near_words import advice, nearest
from cxgrad_fast.printable import shown

__all__ = [
    "ALGORITHMS",
    "PRESETS",
    "ALFAConfig",
    "ANILConfig",
    "BOILConfig",
    "CAVIAConfig",
    "Config",
    "CxGradConfig",
    "FOMAMLConfig",
    "InnerConfig",
    "InputError",
    "L2FConfig",
    "MAMLConfig",
    "MAMLPPConfig",
    "MatchingNetConfig",
    "MetaSGDConfig",
    "MetricConfig",
    "ModGradConfig",
    "ModelConfig",
    "ProtoMAMLConfig",
    "ProtoNetConfig",
    "RelationNetConfig",
    "ReptileConfig",
    "all_settings",
    "from_toml",
    "preset",
]

_ALIASES = {"data.seed": "run.seed"}  # one seed serves weights and episodes


@dataclass(frozen=True)
class Config:
    """All settings. Build one with :func:`preset`, change it with :meth:`override`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    inner: InnerConfig = field(default_factory=lambda: CxGradConfig("cxgrad"))
    outer: OuterConfig = field(default_factory=OuterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    preset: str = ""  # the name it was built from

    def override(self, *layers: Mapping[str, object]) -> Config:
        """A copy with settings replaced, given by their dotted names.

        Values may be of the setting's type or the text of one (``"5"``, ``"true"``, ``"0,0,1,1"``). Of several layers
        each wins over the one before it. Where a layer names another ``inner.algorithm``, the words of the layers
        before it that this algorithm does not have are dropped.

        Raises:
            InputError: unknown name (with the nearest known one), a word of another algorithm, or a value that the
                setting does not take.
        """
        chooser, algorithm = -1, self.inner.algorithm
        for index, layer in enumerate(layers):
            if "inner.algorithm" in layer:
                chooser, algorithm = index, _algorithm(layer["inner.algorithm"])
        inner = self.inner if algorithm == self.inner.algorithm else carried(self.inner, algorithm)
        known = _known(algorithm)
        groups: dict[str, dict[str, object]] = {"inner": {}}
        for index, layer in enumerate(layers):
            for name, value in layer.items():
                spec = known.get(_ALIASES.get(name, name))
                if spec is not None:
                    group, field_, kind = spec
                    groups.setdefault(group, {})[field_.name] = coerced(name, field_, kind, value)
                elif index >= chooser or name not in all_settings():
                    raise InputError(_unknown(name, algorithm))
        groups["inner"]["algorithm"] = algorithm
        replaced: dict[str, Any] = {
            group: dataclasses.replace(inner if group == "inner" else getattr(self, group), **values)
            for group, values in groups.items()
        }
        config = dataclasses.replace(self, **replaced)
        check_together(config)
        return config

    def inner_steps(self, training: bool) -> int:
        """Of the inner loop: in meta-training, or in evaluation."""
        return self.inner.steps if training else self.evaluation.steps or self.inner.steps

    def flat(self) -> dict[str, Any]:
        """All settings as ``{dotted name: value}``, tuples as lists: what checkpoints and TOML files hold."""
        values = {
            name: getattr(getattr(self, spec[0]), spec[1].name) for name, spec in _known(self.inner.algorithm).items()
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_toml(self) -> str:
        """The settings as a TOML file that ``--config`` reads back to an equal Config."""
        lines = [f"preset = {toml_value(self.preset)}"] if self.preset in PRESETS else []
        last = ""
        for name, value in self.flat().items():
            group, key = name.split(".")
            if group != last:
                lines += ["", f"[{group}]"]
                last = group
            lines.append(f"{key} = {toml_value(value)}")
        return "\n".join(lines).lstrip("\n") + "\n"


def preset(name: str, *layers: Mapping[str, object] | None) -> Config:
    """The Config of a preset, e.g. ``preset("released-mini-5w1s", {"model.filters": 8, "task.shots": 5})``.

    Args:
        name: of the preset, see :data:`PRESETS`.
        layers: settings to change, as for :meth:`Config.override`.

    Raises:
        InputError: unknown preset or setting (the message names the nearest), or a value out of its range.
    """
    base = dataclasses.replace(Config(), preset=name)
    return base.override(*preset_layers(name), *(layer or {} for layer in layers))


@functools.cache
def all_settings() -> tuple[str, ...]:
    """The dotted names of all settings of all algorithms."""
    return tuple(dict.fromkeys(name for algorithm in ALGORITHMS for name in _known(algorithm)))


@functools.cache
def _known(algorithm: str) -> dict[str, tuple[str, dataclasses.Field[Any], Any]]:
    """The settings under one algorithm: dotted name -> group, field, type."""
    known = {}
    for group in dataclasses.fields(Config):
        if group.name == "preset":
            continue
        kind: Any = ALGORITHMS[algorithm] if group.name == "inner" else group.default_factory
        types = typing.get_type_hints(kind)
        for spec in settings_of(kind):
            known[f"{group.name}.{spec.name}"] = (group.name, spec, types[spec.name])
    return known


def _algorithm(value: object) -> str:
    if not isinstance(value, str) or value not in ALGORITHMS:
        names = ", ".join(map(repr, ALGORITHMS))
        near = f": did you mean '{nearest(value, ALGORITHMS)}'?" if isinstance(value, str) else ""
        raise InputError(f"setting 'inner.algorithm' takes one of {names}, got {shown(value)}{near}")
    return value


def _unknown(name: object, algorithm: str) -> str:
    known = _known(algorithm)
    if name in all_settings():
        whose = ", ".join(owners(str(name).partition(".")[2]))
        near = nearest(str(name), [other for other in known if other.startswith("inner.")])
        return f"setting '{name}' belongs to {whose}, not to {algorithm} (inner.algorithm), which has '{near}'"
    return f"unknown setting {shown(name)}: {advice(str(name), known)}"
