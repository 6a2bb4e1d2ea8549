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
                assert backends.choose() == name


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
