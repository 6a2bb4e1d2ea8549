"""What can run the operators here, why the rest cannot, and the choice.

An explicit choice (``CXGRAD_BACKEND`` or :func:`use_backend`, which is where the config field ends) must succeed;
``auto`` takes the best that can run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cxgrad_fast.config import InputError

NAMES = ("reference", "cpp", "triton")

_configured: ContextVar[str] = ContextVar("cxgrad_backend", default="auto")


def availability() -> dict[str, str]:
    """Every backend's name with the reason why it cannot run here, empty where it can."""
    return {
        "reference": "",
        "cpp": "this version has no C++ operators",
        "triton": "this version has no Triton operators",
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called in this block, and in this thread, on the named backend (or ``auto``).

    ``CXGRAD_BACKEND`` wins over it.

    Raises:
        InputError: unknown name, or a backend that cannot run here (with the reason).
    """
    _require(name, "backend")
    token = _configured.set(name)
    try:
        yield
    finally:
        _configured.reset(token)


def choose() -> str:
    """The backend for an operator call: ``CXGRAD_BACKEND``, else :func:`use_backend`'s, else the best available.

    Raises:
        InputError: ``CXGRAD_BACKEND`` names a backend that is unknown or cannot run here.
    """
    name = os.environ.get("CXGRAD_BACKEND", "")
    if name:
        _require(name, "CXGRAD_BACKEND")
    else:
        name = _configured.get()
    return "reference" if name == "auto" else name


def _require(name: str, setting: str) -> None:
    if name == "auto":
        return
    if name not in NAMES:
        raise InputError(f"{setting} takes one of auto, {', '.join(NAMES)}, got '{name}'")
    reason = availability()[name]
    if reason:
        raise InputError(f"{setting} = {name} cannot run here: {reason}")
