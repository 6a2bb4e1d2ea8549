from __future__ import annotations

import pytest
import torch

from cxgrad_fast import InputError, Learner, preset
from cxgrad_fast.kernels import backends, patch_statistics, use_backend


def test_every_backend_has_a_reason_or_runs() -> None:
    found = backends.availability()
    assert set(found) == set(backends.NAMES)
    assert found["reference"] == ""
    for name, reason in found.items():
        if reason:
            with pytest.raises(InputError, match=f"{name} cannot run here: "), use_backend(name):
                pass
        else:
            with use_backend(name):
                assert backends.choose(backends.NAMES, torch.ones(1)) == name


def test_what_tests_run_on() -> None:
    """The C++ operators, and not what stands in for them."""
    assert backends.availability()["cpp"] == ""
    instructions, _, path = backends.details()["cpp"].partition(", ")
    assert instructions in ("AVX-512", "AVX2", "128-bit vectors")
    assert path.endswith("operators.so")
    assert backends.choose(("reference", "cpp"), torch.ones(1)) == "cpp"


def test_auto_takes_what_fits() -> None:
    one = torch.ones(1)
    assert backends.choose(("reference", "triton"), one) == "reference"
    assert backends.choose(("reference", "cpp"), one.bfloat16()) == "reference"
    assert backends.choose(("reference", "cpp"), one.to("meta")) == "reference"


def test_a_named_backend_leaves_the_rest_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(1)
    for setting in ("CXGRAD_BACKEND", "backend"):
        with use_backend("cpp" if setting == "backend" else "reference"), monkeypatch.context() as patch:
            if setting == "CXGRAD_BACKEND":
                patch.setenv(setting, "cpp")
            assert backends.choose(("reference", "cpp"), one) == "cpp"
            assert backends.choose(("reference",), one) == "reference"
            with pytest.raises(InputError, match=f"{setting} = cpp runs on cpu, got a tensor on meta"):
                backends.choose(("reference", "cpp"), one.to("meta"))
            with pytest.raises(InputError, match=f"{setting} = cpp computes in .*float64, got torch.float16"):
                backends.choose(("reference", "cpp"), one.half())


def test_one_warning_where_there_is_no_fast_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not", lambda name: "no compiler" if name == "cpp" else "")
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="cpp operators cannot run here, the slower .* takes over: no compiler"):
        assert backends.choose(("reference", "cpp"), torch.ones(1)) == "reference"
    assert backends.choose(("reference", "cpp"), torch.ones(1)) == "reference"
    backends._warn_once.cache_clear()


def test_environment_wins_and_must_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1, 1, 1, 2, 2)
    monkeypatch.setenv("CXGRAD_BACKEND", "reference")
    patch_statistics(x)
    monkeypatch.setenv("CXGRAD_BACKEND", "cuda")
    with pytest.raises(InputError, match="CXGRAD_BACKEND takes one of auto, reference, cpp, triton, got 'cuda'"):
        patch_statistics(x)
    missing = [name for name, reason in backends.availability().items() if reason]
    for name in missing:
        monkeypatch.setenv("CXGRAD_BACKEND", name)
        with pytest.raises(InputError, match=f"CXGRAD_BACKEND = {name} cannot run here"):
            patch_statistics(x)


def test_learner_refuses_at_once() -> None:
    missing = [name for name, reason in backends.availability().items() if reason]
    for name in missing:
        with pytest.raises(InputError, match=f"{name} cannot run here"):
            Learner(preset("glyphs-5w1s", {"run.backend": name}))
