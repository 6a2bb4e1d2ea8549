"""Whether the oracle, and the engine where it can, reproduce golden files: numbers that released programs computed.

    python bench/golden.py FILE [FILE ...]

Prints the worst error of every array, relative to the array's largest value. An array that is zero but for rounding
(tests/golden/README.md says which: gradients of biases in front of a norm, and what follows from them) is compared by
plain difference, on the scale of the largest gradient. Exit code 1 where an error is above 1e-9 (losses and logits)
or 1e-7 (all else), 2 where a file is no golden file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from golden_engine import engine
from golden_files import Arrays, Golden, read
from golden_rules import oracle
from torch import Tensor

from cxgrad_fast import InputError, released
from cxgrad_fast.printable import one_line

SIDES: dict[str, Callable[[Golden], Arrays | None]] = {"oracle": oracle, "engine": engine}
LOSS_BOUND, GRADIENT_BOUND = 1e-9, 1e-7
ROUNDING = 1e-13  # an array that nowhere exceeds this part of the largest gradient is rounding


@dataclass(frozen=True)
class Row:
    """One array of a file.

    Attributes:
        key: the file's.
        vanishing: whether it is zero but for rounding.
        bound: of its errors.
        errors: the worst error by side; a side that has no such array is missing.
    """

    key: str
    vanishing: bool
    bound: float
    errors: Mapping[str, float]

    @property
    def is_outside(self) -> bool:
        """Whether an error is above the bound, or not a number."""
        return not all(error <= self.bound for error in self.errors.values())


def check(file: Golden) -> list[Row]:
    """Every array of a golden file against the sides that compute it.

    Raises:
        InputError: the file's settings or arrays do not fit each other.
    """
    found = {name: _computed(file, side) for name, side in SIDES.items()}
    largest = _largest(file)
    rows = []
    for key, expected in file.arrays.items():
        own = float(expected.abs().max()) if expected.numel() else 0.0
        vanishing = _is_zero(file, key) or own <= ROUNDING * largest
        scale = largest if vanishing else own
        errors = {
            name: _error(arrays[key], expected, scale) for name, arrays in found.items() if arrays and key in arrays
        }
        rows.append(Row(key, vanishing, _bound(key), errors))
    return rows


def _computed(file: Golden, side: Callable[[Golden], Arrays | None]) -> Arrays | None:
    try:
        return side(file)
    except InputError:
        raise
    except KeyError as error:
        raise InputError(f"{file.path}: {file.algorithm} needs a parameter {error}, which it lacks") from None
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file.path}: its arrays do not fit each other: {reason}") from None


def _largest(file: Golden) -> float:
    """Of all gradients; of all parameters where the file has no gradients (Reptile)."""
    gradients = [array for key, array in file.arrays.items() if key.startswith("grad/")]
    return max((float(array.abs().max()) for array in gradients or file.parameters.values()), default=0.0) or 1.0


def _is_zero(file: Golden, key: str) -> bool:
    """Whether an array is zero but for rounding, by what the golden README says."""
    group, _, theirs = key.partition("/")
    name = released.ours(file.table).get(theirs, theirs)
    no_effect = name.startswith(("features.", "relation.0.", "relation.1.")) and name.endswith(".bias")
    if ".norm." in name:
        return False
    if file.family == "reptile":  # Adam makes steps of the rounding
        return no_effect
    if group != "grad":
        return False
    if name.startswith("rates.features."):
        return name.endswith(".bias")
    if name == "relation.score.bias":
        return file.text("loss_type", "mse") == "softmax"
    # ALFA's generator reads the biases themselves
    return (no_effect and file.family != "alfa") or (name.startswith("masks.") and ".bias." in name)


def _bound(key: str) -> float:
    is_loss = key in ("trace_loss", "outer_loss", "msl_weights") or key.endswith("_logits")
    return LOSS_BOUND if is_loss else GRADIENT_BOUND


def _error(found: Tensor, expected: Tensor, scale: float) -> float:
    """The largest difference in units of ``scale``; infinite where it is no number or the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    error = float((found.detach().double() - expected).abs().max()) / scale
    return error if error == error else float("inf")


def report(file: Golden, rows: Sequence[Row]) -> str:
    """A table of the errors."""
    x = file.episodes.support_x
    size = "x".join(map(str, x.shape[2:]))
    lines = [one_line(f"{file.path}: {file.algorithm}, {len(x)} tasks of {x.shape[1]} images, {size}")]
    width = max(len(row.key) for row in rows)
    lines.append(f"  {'array':{width}}   bound  " + "  ".join(f"{name:>8}" for name in SIDES))
    for row in rows:
        cells = [f"{row.errors[name]:8.1e}" if name in row.errors else f"{'-':>8}" for name in SIDES]
        remarks = ["zero but for rounding"] if row.vanishing else []
        remarks += ["ABOVE ITS BOUND"] if row.is_outside else []
        remarks += ["not compared"] if not row.errors else []
        line = f"  {row.key:{width}}   {row.bound:.0e}  {'  '.join(cells)}  {', '.join(remarks)}"
        lines.append(one_line(line.rstrip()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    code = 0
    for path in parser.parse_args(arguments).files:
        try:
            file = read(path)
            rows = check(file)
        except InputError as error:
            print(error, file=sys.stderr)
            code = 2
            continue
        print(report(file, rows))
        outside = [row.key for row in rows if row.is_outside]
        print(one_line(f"  above the bound: {', '.join(outside)}" if outside else "  all within their bounds") + "\n")
        code = max(code, 1 if outside else 0)
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)  # sizes of this kind spend their time waiting for each other
    sys.exit(main())
