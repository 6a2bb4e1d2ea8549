"""What a setting may hold: the bounds beside each field, and how a word from a person becomes its value."""

from __future__ import annotations

import dataclasses
import math
import re
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from cxgrad_fast.printable import one_line, shown

LARGEST_INTEGER, LARGEST_NUMBER = 10**9, 1e300  # of settings that name no bound of their own


class InputError(ValueError):
    """Bad input from a person: the message is one line that names the file or setting and says what to do.

    The commands print it and exit with code 2. Whatever text from outside the message holds, it is one printable line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def choice(*options: object) -> dict[str, object]:
    return {"choices": options}


def at_least(bound: float, at_most: float | None = None) -> dict[str, object]:
    return {"minimum": bound, "maximum": at_most}


def above(bound: float, at_most: float | None = None) -> dict[str, object]:
    return {"above": bound, "maximum": at_most}


def like(pattern: str, meaning: str) -> dict[str, object]:
    return {"pattern": pattern, "meaning": meaning}


def constant(value: Any) -> Any:
    """A field that is always ``value``: what reads it finds it, no person can set it."""
    return dataclasses.field(default=value, metadata={"constant": True})


def settings_of(group: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a group of settings that a person can set."""
    return [spec for spec in dataclasses.fields(group) if "constant" not in spec.metadata]


def coerced(name: str, spec: dataclasses.Field[Any], wanted: Any, value: object) -> object:
    """``value`` as the type of its field, in range; InputError otherwise."""
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
        text = value.strip("[]() ")
        value = text.split(",") if text else []
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
