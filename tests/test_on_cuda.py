"""The engine on a GPU: what runs only where there is one (bench/gpu.sh selects ``cuda``)."""

from __future__ import annotations

import pytest
import torch
from helpers import config_of, golden, gradients, random_episodes, relative_error, spread_parameters

from cxgrad_fast import Learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("form", ["exact", "scaled"])
@pytest.mark.parametrize("name", ["cxgrad_5w1s_a", "maml_5w1s"])
def test_golden_on_cuda(name: str, form: str) -> None:
    """The released program's numbers in float64, as on the CPU."""
    arrays, config, episodes = golden(name)
    learner = Learner(
        config.override({"inner.form": form} if config.inner.algorithm == "cxgrad" else {}, {"run.device": "cuda"})
    )
    learner.load_released({key[6:]: value for key, value in arrays.items() if key.startswith("param/")})
    out = learner.meta_loss(episodes)
    trace = torch.cat([out.support_losses, out.query_losses[:, None].detach()], 1).cpu()
    torch.testing.assert_close(trace, torch.from_numpy(arrays["trace_loss"]), rtol=1e-12, atol=0)
    names = learner.released_names()
    for ours, gradient in gradients(out.loss, learner.meta_parameters).items():
        assert relative_error(gradient.cpu(), torch.from_numpy(arrays[f"grad/{names[ours]}"])) < 1e-9, ours


@pytest.mark.parametrize("backbone", ["conv4", "resnet12"])
def test_float32_on_cuda_is_float32(backbone: str) -> None:
    """Loss and gradients near float64's of the CPU, nearer than TF32 comes (three digits)."""
    settings = {"inner.steps": 2, "model.backbone": backbone, "model.filters": 4}
    exact = Learner(config_of().override(settings))
    spread_parameters(exact)
    episodes = random_episodes(exact.config)
    single = Learner(exact.config.override({"run.device": "cuda", "run.precision": "float32"}))
    single.load_state_dict(exact.state_dict(), optimizer=False)
    wanted, found = exact.meta_loss(episodes), single.meta_loss(episodes)
    assert abs(found.loss.item() - wanted.loss.item()) < 1e-5 * wanted.loss.item()
    expected = gradients(wanted.loss, exact.meta_parameters)
    for name, gradient in gradients(found.loss, single.meta_parameters).items():
        if not name.startswith("scaler") and expected[name].norm() > 1e-9:
            assert relative_error(gradient.cpu(), expected[name]) < 1e-2, name


def test_meta_steps_on_cuda() -> None:
    config = config_of(inner__steps=1, run__device="cuda", run__precision="float32")
    learner, episodes = Learner(config), random_episodes(config)
    losses = [learner.meta_step(episodes).loss.item() for _ in range(5)]
    assert losses[-1] < losses[0]
