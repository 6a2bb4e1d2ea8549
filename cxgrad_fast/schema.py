"""What data from outside must look like: every kind of value is a function that raises a ValueError for any other.

check = record(steps=whole(), weights=table(tensor(torch.float32)))
check(content, "content")  # ValueError: content.steps must be a whole number from 0 to ..., got 'many'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.printable import one_line, shown

Check = Callable[[Any, str], None]  # (value, its place in words); raises ValueError

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def odd_kind(tensor: Tensor) -> str:
    """Why a tensor's values do not lie in memory as they are: ``nested``, ``sparse_coo``, ``meta``, ...; else empty."""
    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "meta" if tensor.device.type == "meta" else ""


def refuse(where: str, wanted: str, value: Any) -> ValueError:
    """The error of a value that is not what was wanted."""
    if isinstance(value, Tensor):
        kind = odd_kind(value)
        got = f"a {kind} one" if kind else f"a tensor {list(value.shape)} of {value.dtype}"
    else:
        got = shown(value)
    return ValueError(f"{one_line(where, 200)} must be {wanted}, got {got}")


def whole(low: int = 0, high: int = 2**53) -> Check:
    """A whole number from ``low`` to ``high``; True and False are none."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise refuse(where, f"a whole number from {low} to {high}", value)

    return check


def number(low: float, high: float) -> Check:
    """A number from ``low`` to ``high``."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise refuse(where, f"a number from {low} to {high}", value)

    return check


def text(longest: int = 200) -> Check:
    """Printable text."""

    def check(value: Any, where: str) -> None:
        if type(value) is not str or len(value) > longest or not value.isprintable():
            raise refuse(where, f"printable text of at most {longest} characters", value)

    return check


def tensor(*dtypes: torch.dtype, shape: Sequence[int] | None = None, dimensions: int | None = None) -> Check:
    """A tensor of one of the types, of one shape or number of dimensions if given."""
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    wanted = "a tensor" + (f" {list(shape)}" if shape is not None else "") + f" of {names}"

    def check(value: Any, where: str) -> None:
        is_such = isinstance(value, Tensor) and value.dtype in dtypes and not odd_kind(value)
        if not is_such or (shape is not None and list(value.shape) != list(shape)):
            raise refuse(where, wanted, value)
        if dimensions is not None and value.ndim != dimensions:
            raise refuse(where, f"a tensor of {names} with {dimensions} dimensions", value)

    return check


def anything(value: Any, where: str) -> None:
    """Whatever there is."""


def items(each: Check, count: int | None = None) -> Check:
    """A list or tuple, of so many things if ``count`` is given."""

    def check(value: Any, where: str) -> None:
        if type(value) not in (list, tuple) or (count is not None and len(value) != count):
            raise refuse(where, "a list" if count is None else f"a list of {count}", value)
        for index, item in enumerate(value):
            each(item, f"{where}[{index}]")

    return check


def table(each: Check, key: Check | None = None) -> Check:
    """A dictionary whose keys are text, or what ``key`` says."""
    check_key = key or text()

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refuse(where, "a dictionary", value)
        for name, item in value.items():
            check_key(name, f"a key of {where}")
            each(item, f"{where}[{shown(name)}]")

    return check


def record(**fields: Check) -> Check:
    """A dictionary that has these keys; others may be there."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise refuse(where, "a dictionary", value)
        for name, field in fields.items():
            if name not in value:
                raise ValueError(f"{one_line(where, 200)} has no '{name}'")
            field(value[name], f"{where}.{name}" if where else name)

    return check


def one_of(*checks: Check) -> Check:
    """What one of the checks takes; the last says what is wrong."""

    def check(value: Any, where: str) -> None:
        for attempt in checks[:-1]:
            try:
                return attempt(value, where)
            except ValueError:
                continue
        return checks[-1](value, where)

    return check
