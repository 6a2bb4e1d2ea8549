"""What bench/compare.py and bench/test_operators.py refuse to report, and the side that compare.py builds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compare
import compare_precisions
import pytest
import test_operators
import torch
from compare import RefusedError, Side, check_equal_work, check_tests
from measure import RESULTS

from cxgrad_fast.kernels.cases import CASES
from cxgrad_fast.kernels.residual_end import op

HERE = {"PATH": "/usr/bin:/bin", "PYTHONSAFEPATH": "1"}


def side_of(folder: Path, test: str = "def test_it(): assert True") -> Side:
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_conv_block.py").write_text(test)
    return Side("base", "0" * 40, folder, HERE)


def test_failing_tests_refuse(tmp_path: Path) -> None:
    check_tests(side_of(tmp_path / "good"), full=False)
    with pytest.raises(RefusedError, match=r"tests of base \(000000000000\) fail.*test_it"):
        check_tests(side_of(tmp_path / "bad", "def test_it(): assert 1 == 2"), full=False)


def test_different_work_refuses() -> None:
    base = {"loss": 1.5, "features.0.weight": 0.1}
    check_equal_work(base, {"loss": 1.5 + 1e-6, "features.0.weight": 0.1001}, "float32")
    with pytest.raises(RefusedError, match=r"same work: loss 1.5 and 1.51"):
        check_equal_work(base, base | {"loss": 1.51}, "float32")
    with pytest.raises(RefusedError, match=r"gradient norm of features.0.weight 0.1 and 0.2"):
        check_equal_work(base, base | {"features.0.weight": 0.2}, "float32")
    with pytest.raises(RefusedError, match=r"loss 1\.5 and nan"):
        check_equal_work(base, base | {"loss": float("nan")}, "float32")
    with pytest.raises(RefusedError, match=r"same parameters: \['features.0.weight'\]"):
        check_equal_work(base, {"loss": 1.5}, "float32")


def test_ratio_is_base_over_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice as slow a base is a ratio of 2, and the result is written."""
    seconds = {"base": 2.0, "head": 1.0}
    written: dict[str, Any] = {}

    @contextmanager
    def side(name: str, revision: str, folder: Path) -> Iterator[Side]:
        yield Side(name, revision, tmp_path, HERE)

    monkeypatch.setattr(compare, "side", side)
    monkeypatch.setattr(compare, "check_tests", lambda made, full: None)
    monkeypatch.setattr(compare, "shell", lambda made, command: lambda: seconds[made.name])
    monkeypatch.setattr(compare, "write_result", lambda name, payload: written.update(payload) or RESULTS)
    assert compare.main(["old", "new", "--command", "true", "--rounds", "3"]) == 0
    assert "ratio  2.0000   20-80 %: 2.0000 to 2.0000" in capsys.readouterr().out
    assert written["ratio"]["samples"] == [2.0] * 3
    assert written["base"]["commit"] == "old"


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["git", "rev-parse"], cwd=compare.ROOT, capture_output=True).returncode != 0,
                    reason="not a git checkout")  # fmt: skip
def test_side_runs_its_own_package(tmp_path: Path) -> None:
    """The working tree as a side: both halves of the package come from its install, wherever a command is started."""
    with compare.side("head", ".", tmp_path) as made:
        script = "import cxgrad_fast.kernels as k; print(k.__file__)"
        done = made.run([sys.executable, "-c", script])
        assert Path(done.stdout.strip()).is_relative_to(tmp_path / "head-site")
        worker = compare.Worker(made, {"preset": "glyphs-5w1s", "overrides": {"model.filters": 2}, "steps": 1})
        assert worker.numbers["loss"] > 0
        assert worker() > 0
        worker.close()
        assert worker.process.returncode == 0
    with pytest.raises(compare.InputError, match="git rev-parse"), compare.side("base", "no-such-branch", tmp_path):
        pass


def test_operators_refuse_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.operator == "residual_end" and not case.large)
    test_operators.check(case, "reference", "cpu")
    right = op._IMPLEMENTATIONS["reference"]

    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return 1.1 * gradient if gradient.dtype == torch.float32 else gradient

    monkeypatch.setitem(
        op._IMPLEMENTATIONS, "reference", lambda x, shortcut, **options: right(Planted.apply(x), shortcut, **options)
    )
    test_operators._checked.clear()
    with pytest.raises(AssertionError, match=r"d\.x of plain is wrong"):
        test_operators.check(case, "reference", "cpu")


def test_what_is_timed() -> None:
    """FLOPs of the definition, and closures that run more than once."""
    case = next(case for case in CASES if case.name == "glyphs-32/5w1s/layer4")
    unit = 2 * 9 * 32 * 32 * 3 * 3 * 5 * 2
    assert [test_operators.flops(case, stage) for stage in test_operators.STAGES] == [unit, 2 * unit, 6 * unit]
    for stage in test_operators.STAGES:
        given = test_operators.inputs(case, torch.float32)
        run, saved, moved = test_operators.stage_of(case, given, stage)
        first, second = run(), run()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert saved > 0
        assert moved > sum(tensor.numel() * 4 for tensor in given.tensors.values())


def test_precisions_that_cost_accuracy_are_labelled() -> None:
    """Where the mean over seeds lies below float32's worst seed, on either kind of test task."""

    def runs(*accuracies: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"test": {"accuracy": test}, "cross-domain": {"accuracy": other}} for test, other in accuracies]

    results = {
        "float32": runs((0.80, 0.90), (0.76, 0.88)),
        "tf32": runs((0.80, 0.87), (0.72, 0.89)),
        "bfloat16": runs((0.90, 0.90), (0.90, 0.85)),
    }
    lines = compare_precisions.table({"glyphs-5w1s": results})[2:]
    assert lines == [
        "| glyphs-5w1s | float32 | 78.0 % (76.0 to 80.0) | 89.0 % (88.0 to 90.0) |  |",
        "| glyphs-5w1s | tf32 | 76.0 % (72.0 to 80.0) | 88.0 % (87.0 to 89.0) |  |",
        "| glyphs-5w1s | bfloat16 | 90.0 % (90.0 to 90.0) | 87.5 % (85.0 to 90.0) | costs accuracy on digits |",
    ]
