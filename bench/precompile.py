"""Fill Triton's cache with the kernels of meta-steps, on many processes and without a GPU.

    python bench/precompile.py I N [PRECISIONS] [BACKBONE] [--architecture sm_90] [--size full|small|tiny]
    for i in $(seq 0 15); do python bench/precompile.py $i 16 float32,tf32,bfloat16 conv4 & done; wait

The first step of a process compiles every kernel that Triton's cache does not have, one after the other, about a second
each: minutes in all. Here the launches of whole meta-steps are written down on tensors without memory
(:mod:`cxgrad_fast.kernels.machine_code`), and worker I of N compiles its share of them into ``TRITON_CACHE_DIR``,
where a launch on a device of that architecture finds them. The steps are those of bench/gpu_table.py (of its --size) in
every one of PRECISIONS (float32,tf32,bfloat16) and, of Conv-4, the small copies that bench/episodes.py compares first;
with our own convolutions, and with the framework's, which other sums follow.

A kernel that does not compile is named, and the exit code is then 1; the others are there.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
from equal_work import small_copy
from gpu_table import ROWS
from meta_step_worker import episodes_of
from peaks import DTYPES

from cxgrad_fast import Config, Episodes, InputError, Learner, preset
from cxgrad_fast.cli import run_command
from cxgrad_fast.kernels import backends, launch, machine_code, use_precision
from cxgrad_fast.kernels.conv_block import choice

BACKBONES = ("conv4", "resnet12")
PRECISIONS = "float32,tf32,bfloat16"
WAYS = ("triton", "grouped")  # the framework's ways are followed by the same kernels
STEPS = {"inner.steps": 2}  # those after the second launch what the second does


def cases(size: str, backbone: str, precisions: Sequence[str]) -> Iterator[tuple[Config, str]]:
    """Configs with a precision of their products."""
    rows = [row for row in ROWS[size] if dict(row.overrides).get("model.backbone", "conv4") == backbone]
    configs = [preset(row.preset, {**STEPS, **dict(row.overrides), "outer.meta_batch": row.tasks}) for row in rows]
    for precision in precisions:
        yield from ((config, precision) for config in configs)
    if backbone == "conv4":
        copied = {config.preset: config for config in configs}.values()
        yield from ((small_copy(config, each), each) for config in copied for each in ("float64", "float32"))


def launches(config: Config, precision: str, architecture: str) -> list[machine_code.Launch]:
    """What a meta-step launches on a device, the meta-gradient included, in the order of its launches."""
    stored = "float64" if precision == "float64" else "float32"
    plain = {"run.device": "cpu", "run.backend": "reference", "run.precision": stored, "run.compile": False}
    learner = Learner(config.override(plain))
    leaves = {
        name: torch.empty_like(tensor, device="meta").requires_grad_()
        for name, tensor in learner.meta_parameters.items()
    }
    episodes = _without_memory(episodes_of(config, lambda shape: torch.empty(shape, dtype=learner.dtype)))
    with (
        mock.patch.object(backends, "choose", _choose),
        machine_code.recording(architecture) as found,
        use_precision("float32" if precision == "float64" else precision),
    ):
        loss = learner.engine.meta_loss(leaves, episodes).loss
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return found


def _without_memory(episodes: Episodes) -> Episodes:
    """The same on the meta device, which Episodes refuses to those who would read a value."""
    found = copy.copy(episodes)
    vars(found).update({name: x.to("meta") for name, x in vars(found).items() if isinstance(x, torch.Tensor)})
    return found


def _choose(implementations: Sequence[str], tensor: torch.Tensor) -> str:
    """As on a device, for tensors that are on none."""
    return "triton" if "triton" in implementations else "reference"


def kernels(chosen: Iterable[tuple[Config, str]], architecture: str) -> dict[tuple[str, str, str], machine_code.Launch]:
    """A launch of every kernel, by what its code depends on."""
    found: dict[tuple[str, str, str], machine_code.Launch] = {}
    for config, precision in chosen:
        for way in WAYS:
            with mock.patch.dict(os.environ, {choice.VARIABLE: way}):
                found |= {one.key: one for one in launches(config, precision, architecture)}
    return found


def share(found: dict[tuple[str, str, str], machine_code.Launch], worker: int, of: int) -> list[machine_code.Launch]:
    """A worker's part of the kernels: by the hashes in their keys, so that each gets quick and slow ones."""
    return [found[key] for key in sorted(found)[worker::of]]


def make_launcher(compiled: Any) -> str:
    """Compile the C function that launches a kernel, which Triton keeps in the same cache; why it cannot be had here.

    It is linked with the device's driver.
    """
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    try:
        CudaUtils()
        CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # no driver, no compiler; a first launch makes it, or says why not
        return " ".join(f"{type(error).__name__}: {error}".split())[:80]
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a kernel does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worker", type=int, metavar="I", help="this process, from 0 on")
    parser.add_argument("of", type=int, metavar="N", help="how many are started")
    parser.add_argument("precisions", nargs="?", default=PRECISIONS)
    parser.add_argument("backbone", nargs="?", default=BACKBONES[0], choices=BACKBONES)
    parser.add_argument("--size", choices=tuple(ROWS), default="full")
    parser.add_argument("--architecture", choices=launch.ARCHITECTURES, default="sm_90")
    options = parser.parse_args(argv)
    precisions = options.precisions.split(",")
    if not 0 <= options.worker < options.of:
        raise InputError(f"the worker I must be in 0 to N - 1 (= {options.of - 1}), got {options.worker}")
    if unknown := [name for name in precisions if name not in DTYPES]:
        raise InputError(f"PRECISIONS takes some of {', '.join(DTYPES)}, got '{unknown[0]}'")
    began, hits, failed, no_launchers = time.perf_counter(), list[bool](), 0, ""
    found = kernels(cases(options.size, options.backbone, precisions), options.architecture)
    traced = time.perf_counter()
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    own = share(found, options.worker, options.of)
    for one in own:
        try:
            compiled = one.store()
        except Exception as error:  # Triton's many kinds
            failed += 1
            print(f"{one.name} does not compile: {str(error).partition(chr(10))[0]}", file=sys.stderr, flush=True)
            continue
        no_launchers = no_launchers or make_launcher(compiled)
    print(
        f"worker {options.worker} of {options.of}: {len(own)} of {len(found)} kernels for {options.architecture}, "
        f"{hits.count(True)} were there, {failed} failed; {traced - began:.1f} s to find them, "
        f"{time.perf_counter() - traced:.1f} s to compile"
        + (f"; their launchers are made at first use ({no_launchers})" if no_launchers else ""),
        flush=True,
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
