"""Two commits against each other on this machine: tests first, the same numbers next, then interleaved timing.

    python bench/compare.py BASE HEAD [--preset NAME] [--group.setting value ...] [--rounds 15] [--steps 3]
    python bench/compare.py BASE HEAD --command "python bench/context_gradient.py --cases 2"
    python bench/compare.py main .            # a dot is the working tree, untracked files included

Each side is checked out into a throw-away git worktree (or copied, for the working tree) and installed into a folder of
its own, which PYTHONPATH puts before the environment's own install: kernels/ becomes cxgrad_fast.kernels there, and a
compiled extension is built. Each side's own tests run first (a quick part; ``--full``: all): if one fails, or if loss
or gradients of the same meta-step differ, nothing is reported. ``--command`` times any shell command instead, in the
side's folder, as a whole process.

The ratio is base over head, pair by pair: 2 means head is twice as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from measure import interleave, machine, machine_line, ratio, write_result

from cxgrad_fast.cli import DEFAULT_PRESET, run_command, split_settings
from cxgrad_fast.config import InputError, preset

ROOT = Path(__file__).resolve().parent.parent
QUICK_TESTS = ("tests/test_conv_block.py", "tests/test_scale_weights.py", "tests/test_meta_loss.py")
QUICK_SELECTION = "not resnet12 and not finite_differences"
# relative, of the loss and of gradient norms; those of the context's network cancel (MATH.md 3)
SAME = {"float64": (1e-9, 1e-6), "float32": (1e-4, 1e-2), "tf32": (1e-2, 0.3), "bfloat16": (3e-2, 0.5)}


class RefusedError(InputError):
    """No figure is printed, and this is why."""


@dataclass(frozen=True)
class Side:
    """One of the two: its source tree, and the environment in which ``cxgrad_fast`` is the one of that tree."""

    name: str
    commit: str
    source: Path
    environment: dict[str, str]

    def run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=self.source, env=self.environment, capture_output=True, text=True)


@contextmanager
def side(name: str, revision: str, folder: Path) -> Iterator[Side]:
    """Revision ``revision`` (``.``: the working tree) under ``folder``, installed; gone afterwards."""
    source, site = folder / f"{name}-source", folder / f"{name}-site"
    if revision == ".":
        commit = f"{git('rev-parse', 'HEAD')} and the working tree"
        copy_working_tree(source)
    else:
        commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
        git("worktree", "add", "--quiet", "--detach", str(source), commit)
    try:
        options = ["-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
        install = [sys.executable, "-m", "pip", "install", *options, str(source)]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            raise RefusedError(f"{name} ({revision}) does not install: {done.stderr.strip()[-500:]}")
        # safe path: the folder a command is started in must not come before the side's own install
        paths = {"PYTHONPATH": f"{site}{os.pathsep}{source / 'bench'}", "PYTHONSAFEPATH": "1"}
        made = Side(name, commit, source, {**os.environ, **paths})
        check_import(made, site)
        yield made
    finally:
        if revision != ".":
            git("worktree", "remove", "--force", str(source))


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"git {words[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def copy_working_tree(target: Path) -> None:
    """All files that git knows or would add, as they are now."""
    for name in git("ls-files", "-co", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def check_import(made: Side, site: Path) -> None:
    """Refuse unless both halves of the package come from the side's own install."""
    script = "import cxgrad_fast, cxgrad_fast.kernels as k; print(cxgrad_fast.__file__, k.__file__, sep='\\n')"
    done = made.run([sys.executable, "-c", script])
    found = done.stdout.split()
    if done.returncode or not all(Path(path).is_relative_to(site) for path in found):
        raise RefusedError(f"{made.name} would not run its own package: {found or done.stderr.strip()[-300:]}")


def check_tests(made: Side, full: bool) -> None:
    """Run the side's tests; refuse if one fails."""
    words = [] if full else [*filter(lambda name: (made.source / name).exists(), QUICK_TESTS), "-k", QUICK_SELECTION]
    done = made.run([sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *words])
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        raise RefusedError(f"tests of {made.name} ({made.commit[:12]}) fail: {'; '.join(lines)[-400:]}")


class Worker:
    """A process that times meta-steps of one side whenever it is asked to."""

    def __init__(self, made: Side, job: Mapping[str, object]) -> None:
        script = Path(__file__).resolve().parent / "meta_step_worker.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(job)],
            cwd=made.source,
            env=made.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = made.name
        self.numbers: dict[str, float] = json.loads(self._line())

    def __call__(self) -> float:
        """Seconds of one sample."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RefusedError(f"the worker of {self.name} ended with code {self.process.wait()}")
        return line

    def close(self) -> None:
        self.process.communicate()


def check_equal_work(base: Mapping[str, float], head: Mapping[str, float], precision: str) -> None:
    """Refuse unless loss and gradient norms agree as far as the precision goes."""
    if set(base) != set(head):
        raise RefusedError(f"the sides do not have the same parameters: {sorted(set(base) ^ set(head))}")
    for name, wanted in base.items():
        tolerance = SAME[precision][name != "loss"]
        if not abs(head[name] - wanted) <= tolerance * abs(wanted) + 1e-7:
            what = "loss" if name == "loss" else f"gradient norm of {name}"
            raise RefusedError(f"the sides do not do the same work: {what} {wanted:.6g} and {head[name]:.6g}")


def shell(made: Side, command: str) -> Callable[[], float]:
    """What runs ``command`` on a side and gives its wall seconds."""

    def run() -> float:
        begin = time.perf_counter()
        done = made.run(["bash", "-c", command])
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RefusedError(f"the command fails on {made.name}: {done.stderr.strip()[-400:]}")
        return seconds

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--preset", default=DEFAULT_PRESET)
    parser.add_argument("--command", help="time this shell command instead of meta-steps")
    parser.add_argument("--full", action="store_true", help="all tests, not the quick part")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="meta-steps a sample")
    settings, words = split_settings(sys.argv[1:] if argv is None else argv)
    options = parser.parse_args(words)
    precision = preset(options.preset, settings).run.precision
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cxgrad-compare-")))
        pair = ("base", options.base), ("head", options.head)
        sides = [stack.enter_context(side(name, revision, folder)) for name, revision in pair]
        for made in sides:
            check_tests(made, options.full)
            print(f"{made.name}: {made.commit[:12]}, tests pass", flush=True)
        if options.command:
            runs: dict[str, Callable[[], float]] = {made.name: shell(made, options.command) for made in sides}
        else:
            job = {"preset": options.preset, "overrides": settings, "steps": options.steps}
            workers = [Worker(made, job) for made in sides]
            for worker in workers:
                stack.callback(worker.close)
            check_equal_work(workers[0].numbers, workers[1].numbers, precision)
            runs = {worker.name: worker for worker in workers}
        timings = interleave(runs, options.rounds, float("inf"))
    gain = ratio(timings["base"], timings["head"])
    print(f"{machine_line(machine())}\nseconds a sample, n = {options.rounds}; ratio: base over head")
    for name, timing in {**timings, "ratio": gain}.items():
        print(f"{name:<6} {timing.median:.4f}   20-80 %: {timing.p20:.4f} to {timing.p80:.4f}")
    payload = {made.name: {"commit": made.commit, **timings[made.name].as_dict()} for made in sides}
    what = options.command or {"preset": options.preset, "overrides": settings, "steps": options.steps}
    write_result("compare", {**payload, "ratio": gain.as_dict(), "timed": what})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
