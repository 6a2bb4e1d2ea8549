"""What can run the operators here, why the rest cannot, and the choice.

An explicit choice (``CXGRAD_BACKEND`` or :func:`use_backend`, which is where the config field ends) must be able to run
here; ``auto`` takes the best that can. An operator that a backend does not have runs on the reference.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.config import InputError
from cxgrad_fast.kernels import registration

NAMES = ("reference", "cpp", "triton")

_DEVICES = {"cpp": "cpu", "triton": "cuda"}  # of the fast backends, the best for each device
_PRECISIONS = (torch.float32, torch.float64)  # that they are chosen for
_DTYPES = {"cpp": _PRECISIONS, "triton": (*_PRECISIONS, torch.bfloat16)}  # and that they have, if they are named

_LEAST_CAPABILITY = 8
_PRODUCTS = ("float32", "tf32", "bfloat16")

ROUND_IN_SOFTWARE = "CXGRAD_ROUND_IN_SOFTWARE"

_configured: ContextVar[str] = ContextVar("cxgrad_backend", default="auto")
_products: ContextVar[str] = ContextVar("cxgrad_precision", default="float32")


def availability() -> dict[str, str]:
    """Every backend's name with the reason why it cannot run here, empty where it can.

    Asking builds the C++ operators where they have not been built yet.
    """
    return {name: why_not(name) for name in NAMES}


def details() -> dict[str, str]:
    """More about the backends that can run: instruction set and file of the C++ operators."""
    reason, path = registration.load()
    found = {} if reason else {"cpp": f"{torch.ops.cxgrad_fast.instruction_set()}, {path}"}
    if not _why_not_triton():
        found["triton"] = "in the interpreter, for tests" if interpreting() else torch.cuda.get_device_name()
    return found


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


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Multiply float32 values in this block, and in this thread, as ``float32``, ``tf32`` or ``bfloat16``.

    The factors of the convolutions, that is: sums, statistics and everything elementwise stay float32, and so does the
    reference. Where no unit of the machine multiplies so, the C++ operators round the factors and are no faster.
    Derivatives of what was computed here are taken in the same precision, wherever they are taken.

    Raises:
        InputError: unknown name.
    """
    if name not in _PRODUCTS:
        raise InputError(f"precision takes one of {', '.join(_PRODUCTS)}, got '{name}'")
    token = _products.set(name)
    try:
        yield
    finally:
        _products.reset(token)


def precision() -> str:
    """The precision of products, :func:`use_precision`'s."""
    return _products.get()


def why_not_precision(name: str, backend: str, device: torch.device) -> str:
    """Why ``tf32`` or ``bfloat16`` products cannot be had here from a backend (or ``auto``); empty where they can.

    On CPUs bfloat16 needs AMX, unless ``CXGRAD_ROUND_IN_SOFTWARE`` is 1.
    """
    backend = os.environ.get("CXGRAD_BACKEND", "") or backend
    if backend == "reference":
        return "the reference operators have no such products"
    if device.type == "cuda" or backend == "triton" or (backend == "auto" and interpreting()):
        if device.type != "cuda" and not interpreting():
            return f"the Triton operators run on CUDA devices, not on {device.type}"
        return why_not("triton")
    if reason := why_not("cpp"):
        return f"it needs the C++ operators ({reason})"
    if os.environ.get(ROUND_IN_SOFTWARE, "") == "1":
        return ""
    if name == "tf32":
        return "it needs the Triton operators on a CUDA device"
    if torch.ops.cxgrad_fast.has_tiles():
        return ""
    return "it needs a CUDA device or a CPU with AMX, and this CPU has none"


def rounds_in_software(name: str, device: torch.device) -> bool:
    """Whether products in that precision are float32's on rounded factors on a device, and no faster."""
    if name not in ("tf32", "bfloat16") or device.type != "cpu" or interpreting():
        return False
    return name == "tf32" or not torch.ops.cxgrad_fast.has_tiles()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU: for tests (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "True")


def lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported at its first call: Triton is not everywhere, and slow to import."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def release_buffers() -> int:
    """Give back to the system what the operators keep for their next results; the bytes that this was."""
    if registration.loaded():
        return int(torch.ops.cxgrad_fast.release_buffers())
    return 0


def choose(implementations: Collection[str], tensor: Tensor) -> str:
    """The backend for one operator call: ``CXGRAD_BACKEND``, else :func:`use_backend`'s, else the best available.

    Args:
        implementations: the backends that have the operator; the reference has all.
        tensor: one of the arguments.

    Raises:
        InputError: ``CXGRAD_BACKEND`` names a backend that is unknown or cannot run here, or a named one does not run
            on the tensor's device or does not have its dtype.
    """
    name, setting = os.environ.get("CXGRAD_BACKEND", ""), "CXGRAD_BACKEND"
    if name:
        _require(name, setting)
    else:
        name, setting = _configured.get(), "backend"
    device = tensor.device.type
    if name == "auto":
        return _best(implementations, tensor)
    if _DEVICES.get(name, device) != device and not (name == "triton" and interpreting()):
        raise InputError(f"{setting} = {name} runs on {_DEVICES[name]}, got a tensor on {tensor.device}")
    if name not in implementations:
        return "reference"
    if tensor.dtype not in (has := _DTYPES.get(name, (tensor.dtype,))):
        kinds = ", ".join(str(dtype) for dtype in has)
        raise InputError(f"{setting} = {name} computes in {kinds}, got {tensor.dtype}; the reference has any")
    return name


def _best(implementations: Collection[str], tensor: Tensor) -> str:
    for name, device in _DEVICES.items():
        if name in implementations and device == tensor.device.type and tensor.dtype in _PRECISIONS:
            reason = why_not(name)
            if not reason:
                return name
            _warn_once(name, reason)
    return "reference"


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    message = f"{name} operators cannot run here, the slower PyTorch reference takes over: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=5)  # at the operator's caller


def why_not(name: str) -> str:
    """Why a backend cannot run here; empty where it can."""
    if name == "cpp":
        return registration.load()[0]
    return _why_not_triton() if name == "triton" else ""


@functools.cache
def _why_not_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (Linux: pip install triton; torch for CUDA brings it)"
    if interpreting():
        return ""
    needed = "a CUDA device of compute capability 8.0 (Ampere) or newer"
    if torch.version.cuda is None:
        return f"needs {needed}, and torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"needs {needed}; torch, built for CUDA {torch.version.cuda}, finds no driver or no device"
    major, minor = torch.cuda.get_device_capability()
    if major < _LEAST_CAPABILITY:
        return f"needs {needed}; {torch.cuda.get_device_name()} has {major}.{minor}"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "triton compiles its launchers with a C compiler, and there is neither gcc nor clang (CC names another)"
    return ""


def _require(name: str, setting: str) -> None:
    if name == "auto":
        return
    if name not in NAMES:
        raise InputError(f"{setting} takes one of auto, {', '.join(NAMES)}, got '{name}'")
    reason = why_not(name)
    if reason:
        raise InputError(f"{setting} = {name} cannot run here: {reason}")
