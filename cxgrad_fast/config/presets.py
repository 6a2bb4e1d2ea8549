"""Settings files: what ``--config`` reads, and the presets, which are such files that come with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cxgrad_fast.config.fields import InputError
from cxgrad_fast.near_words import nearest
from cxgrad_fast.printable import shown

LARGEST_FILE = 1 << 20  # bytes of a settings file

# name -> file; beside each value stands where it is from
PRESETS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "presets").glob("*.toml"))}


def preset_layers(name: str) -> list[dict[str, object]]:
    """The settings of a preset as ``{dotted name: value}``, those of the presets it is based on before its own.

    Raises:
        InputError: there is no such preset (the nearest is named).
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"unknown preset {shown(name)}: did you mean '{nearest(str(name), PRESETS)}'?")
    settings = from_toml(PRESETS[name])
    base = settings.pop("preset", None)
    return [*([] if base is None else preset_layers(str(base))), settings]


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


def toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(value)
