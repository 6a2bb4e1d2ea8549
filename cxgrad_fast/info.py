"""``python -m cxgrad_fast.info``: versions, devices, backends and why one is missing; for reports and questions."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.cli import Parser, run_command
from cxgrad_fast.config import InputError
from cxgrad_fast.files import check_folder
from cxgrad_fast.kernels import backends
from cxgrad_fast.kernels.conv_block import choice
from cxgrad_fast.printable import one_line

_PACKAGES = (
    "cxgrad-fast",
    "torch",
    "triton",
    "numpy",
    "pillow",
    "torchvision",
    "scikit-learn",
    "matplotlib",
    "tensorboard",
    "tqdm",
    "ninja",
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    _, settings = Parser("info", __doc__ or "").parse(argv)
    if settings:
        raise InputError(f"info takes no settings, got '--{next(iter(settings))}'")
    print("\n".join(map(one_line, report())))
    return 0


def report() -> list[str]:
    """The lines that the command prints."""
    lines = ["versions", _line("python", platform.python_version())]
    lines += [_line(name, package_version(name)) for name in _PACKAGES]
    lines += ["", "devices", _line("cpu", f"{_cpu_name()}, {_usable_cores()} cores, {torch.get_num_threads()} threads")]
    lines += [_line("cuda", cuda_state()), "", "backends"]
    details = backends.details()
    for name, reason in backends.availability().items():
        able = f"yes, {details[name]}" if name in details else "yes"
        lines.append(_line(name, f"no: {reason}" if reason else able))
    lines += ["", "precisions of products beside float32 and float64"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tf32", "bfloat16"):
        reason = backends.why_not_precision(name, "auto", device)
        if reason:
            lines.append(_line(name, f"no: {reason}"))
        else:  # which the operators tell, where they are
            by_software = backends.rounds_in_software(name, device)
            lines.append(_line(name, "yes, rounded in software" if by_software else "yes"))
    lines += ["", "ways to convolve", *(f"  {line}" for line in choice.report())]
    lines += ["", "cache of decoded and rendered images, and of built operators"]
    return [*lines, f"  {cache_state()}"]


def package_version(name: str) -> str:
    """The version of an installed package, found without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def cuda_state() -> str:
    """The CUDA devices, or why there is none."""
    if torch.version.cuda is None:
        return "no: torch is built without it"
    if not torch.cuda.is_available():
        return f"no: torch is built for CUDA {torch.version.cuda}, but finds no driver or no device"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"CUDA {torch.version.cuda}: {', '.join(names)}"


def cache_state() -> str:
    """The folder of the cache, and why it is not used if it is not."""
    folder = cache_folder()
    if folder is None:
        return "none: set CXGRAD_CACHE to a folder"
    try:
        check_folder(folder)
    except FileNotFoundError:
        return f"{folder}, made at its first use"
    except OSError as error:
        return f"{folder}, not used: {error.strerror}"
    return str(folder)


def _line(name: str, text: str) -> str:
    return f"  {name:<13} {text}"


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(run_command(main))
