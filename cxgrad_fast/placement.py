"""Where a Learner's tensors are and what type they have, by the settings of its Config."""

from __future__ import annotations

import torch

from cxgrad_fast.config import Config, InputError
from cxgrad_fast.kernels import backends


def device_of(config: Config) -> torch.device:
    """The device that ``run.device`` names.

    Raises:
        InputError: torch sees no such device.
    """
    name = config.run.device
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise InputError(f"setting 'run.device' (={name}) needs a CUDA device, and torch sees none: use cpu")
        if (device.index or 0) >= count:
            raise InputError(f"setting 'run.device' (={name}): torch sees {count} CUDA devices, counted from cuda:0")
    return device


def dtype_of(config: Config, device: torch.device) -> torch.dtype:
    """Of parameters and all that is stored; tf32 and bfloat16 are how the fast operators multiply.

    Raises:
        InputError: ``run.precision`` is not for this machine.
    """
    run = config.run
    if run.precision in ("tf32", "bfloat16"):
        why_not = backends.why_not_precision(run.precision, run.backend, device)
        if why_not:
            raise InputError(
                f"setting 'run.precision' (={run.precision}) is not for this machine: {why_not}; "
                f"use float32 or float64 ({backends.ROUND_IN_SOFTWARE}=1 allows it on any CPU, "
                "to study its accuracy: no faster than float32)"
            )
    return torch.float64 if run.precision == "float64" else torch.float32
