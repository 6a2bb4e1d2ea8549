"""The house: imports run one way, and importing the package starts nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# what a room may import; every room may import config and printable
ALLOWED = {
    "printable": set(),
    "near_words": set(),
    "config": {"near_words"},
    "cache_folder": set(),
    "files": set(),
    "kernels": {"kernels", "cache_folder", "files"},
    "models": {"kernels", "models"},
    "algorithms": {"kernels", "models", "algorithms", "released"},
    "schema": set(),
    "torch_files": {"files"},
    "data": {"data", "cache_folder", "files"},
    "minibatches": set(),
    "episodes": {"data", "minibatches", "schema"},
    "engine": {"kernels", "models", "algorithms", "engine", "episodes"},
    "placement": {"kernels"},
    "learner_state": {"models", "algorithms", "schema"},
    "learner": {
        "kernels",
        "models",
        "algorithms",
        "engine",
        "episodes",
        "learner_state",
        "minibatches",
        "placement",
    },
    "reference": {"reference"},
    "released": set(),
    "signals": {"engine"},
    "launched": {"engine", "signals"},
    "pipeline": {"engine", "learner", "episodes"},
    "checkpoints": {"engine", "learner", "learner_state", "schema", "torch_files"},
    "folder_lock": set(),
    "runs": {"learner", "checkpoints", "folder_lock"},
    "session": {"engine", "learner", "episodes", "checkpoints"},
    "endings": {"engine", "checkpoints", "runs", "session", "signals", "launched"},
    "cli": {"near_words", "engine"},
    "train": {
        "pipeline",
        "cli",
        "runs",
        "checkpoints",
        "evaluate",
        "folder_lock",
        "session",
        "signals",
        "launched",
        "endings",
        "engine",
        "learner",
        "episodes",
        "data",
    },
    "evaluate": {
        "cli",
        "runs",
        "checkpoints",
        "torch_files",
        "signals",
        "launched",
        "engine",
        "learner",
        "episodes",
        "data",
    },
    "info": {"cli", "kernels", "cache_folder", "files"},
    "__init__": {"config", "episodes", "learner", "runs"},
}


def room(path: Path) -> str:
    top = path.relative_to(ROOT).parts
    return "kernels" if top[0] == "kernels" else top[1].removesuffix(".py")


def imported_names(path: Path) -> list[str]:
    """Modules that a file imports anywhere, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names.append(node.module or "")
            if node.module == "cxgrad_fast":
                names += [f"cxgrad_fast.{alias.name}" for alias in node.names]
    return names


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports."""
    parts = [name.split(".") for name in imported_names(path)]
    assert not any(part[0] == "kernels" for part in parts), f"{path}: kernels is cxgrad_fast.kernels"
    return {part[1] for part in parts if part[0] == "cxgrad_fast" and len(part) > 1}


FILES = sorted([*(ROOT / "cxgrad_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    here = room(path)
    assert here in ALLOWED, f"new room '{here}': say what it may import"
    upward = imported_rooms(path) - ALLOWED[here] - {"config", "printable", "__version__"}
    assert not upward, f"{here} must not import {sorted(upward)}"


def test_what_an_algorithm_takes_is_what_the_page_says() -> None:
    """No file of the package names ANIL but those that docs/algorithms.md lists."""
    page = (ROOT / "docs" / "algorithms.md").read_text().split("## Adding one")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    package = ROOT / "cxgrad_fast"
    listed = {path for cell in cells for name in re.findall("`(.+?)`", cell) for path in package.glob(name)}
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".toml")]
    assert listed == {path for path in files if re.search("anil", path.name + path.read_text(), re.IGNORECASE)}


BENCH = ROOT / "bench"


def test_the_bench_has_no_circle() -> None:
    """Nor inside functions: a module stands above those that it imports."""
    modules = {
        ".".join(path.relative_to(BENCH).with_suffix("").parts).removesuffix(".__init__"): path
        for path in BENCH.rglob("*.py")
    }
    below = {}
    for name, path in modules.items():
        found = set(imported_names(path))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        below[name] = found & set(modules)
    order = list(TopologicalSorter(below).static_order())  # raises CycleError
    assert order.index("side") < order.index("peers") < order.index("sides") < order.index("episodes")


ORACLE = sorted((ROOT / "cxgrad_fast" / "reference").glob("*.py"))
SHARED = ("__init__", "network", "of_config", "tasks")
ALGORITHMS = [path for path in ORACLE if path.stem not in SHARED]


@pytest.mark.parametrize("path", ORACLE, ids=lambda path: path.stem)
def test_the_oracle_shares_nothing_with_what_it_judges(path: Path) -> None:
    """Nor do its algorithms share anything with each other, but for the layers of their networks."""
    names = set(imported_names(path)) - {"__future__", "collections.abc", "typing", "torch", "torch.nn.functional"}
    algorithms = {other.stem for other in ALGORITHMS}
    may = {"network": set(), "tasks": set(), "of_config": {"tasks"} | algorithms, "__init__": {"tasks", "of_config"}}
    assert names <= {f"cxgrad_fast.reference.{name}" for name in may.get(path.stem, {"network"})}


@pytest.mark.parametrize("path", ALGORITHMS, ids=lambda path: path.stem)
def test_the_oracle_is_literal(path: Path) -> None:
    """An algorithm is a function of its file's name, on one page, without classes."""
    nodes = ast.parse(path.read_text()).body
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    assert path.stem in functions
    assert all(function.end_lineno - function.body[1].lineno < 60 for function in functions.values())
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def test_only_kernels_knows_backends() -> None:
    for path in FILES:
        if room(path) not in ("kernels", "info"):
            assert "kernels.backends" not in path.read_text(), path


def test_importing_starts_nothing() -> None:
    """Neither CUDA nor triton, nor the heavy packages that only some commands need."""
    script = (
        "import sys, cxgrad_fast, cxgrad_fast.kernels, torch\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = ['triton', 'matplotlib', 'sklearn', 'tensorboard', 'PIL', 'torchvision']\n"
        "assert not [name for name in heavy if name in sys.modules], [n for n in heavy if n in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd="/")


def test_public_names() -> None:
    import cxgrad_fast
    import cxgrad_fast.kernels

    assert set(cxgrad_fast.__all__) == {
        "Config", "EpisodeSampler", "Episodes", "InputError", "Learner", "load", "preset",
    }  # fmt: skip
    assert set(cxgrad_fast.kernels.__all__) == {
        "PatchStatistics", "conv_block", "normalize_weights", "patch_statistics", "release_buffers",
        "residual_end", "scale_weights", "scaling_factors", "use_backend", "use_precision",
        "linear_cross_entropy", "gradient_step",
    }  # fmt: skip
    for module in (cxgrad_fast, cxgrad_fast.kernels):
        for name in module.__all__:
            assert getattr(module, name).__doc__
