from __future__ import annotations

import pytest
import torch
from helpers import config_of
from torch import Tensor

from cxgrad_fast.algorithms import Algorithm, build_algorithm
from cxgrad_fast.models import Network, build_backbone


@pytest.mark.parametrize(
    ("overrides", "features", "scaled"),
    [
        ({"model.filters": 48, "model.image_size": 84}, 48 * 25, 4),
        ({"model.filters": 8, "model.image_size": 28}, 8, 4),
        ({"model.filters": 5, "model.image_size": 47, "model.channels": 1}, 5 * 4, 4),
        ({"model.filters": 5, "model.image_size": 84, "model.pool_ceil": True}, 5 * 36, 4),
        ({"model.backbone": "resnet12", "model.filters": 64, "model.image_size": 84}, 512, 12),
        ({"model.backbone": "resnet12", "model.block_filters": "7,3,9,5"}, 5, 12),
    ],
)
def test_shapes(overrides: dict[str, object], features: int, scaled: int) -> None:
    config = config_of().override(overrides)
    algorithm = build_algorithm(config, build_backbone(config.model))
    shapes = {name: parameter.shape for name, parameter in algorithm.declared.items()}
    assert shapes["head.weight"] == (5, features)
    assert algorithm.backbone.width == features
    assert len(algorithm.backbone.scaled) == scaled
    assert all(shapes[name][2:] == (3, 3) for name in algorithm.backbone.scaled)
    assert set(algorithm.adapted) == {name for name in shapes if ".norm." not in name and "scaler" not in name}


@pytest.mark.parametrize(
    ("pool_last", "padding", "sizes"),
    [(True, "0,0,0,0", [84, 42, 21, 10, 5]), (False, "0,0,1,1", [84, 42, 21, 11, 11])],
)
def test_resnet12_sizes(pool_last: bool, padding: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's and the released program's image sizes after each block."""
    from cxgrad_fast.models import resnet12

    seen: list[int] = []
    end = resnet12.residual_end

    def watched(x: Tensor, *args: Tensor, slope: float, pool: bool, padding: int) -> Tensor:
        y = end(x, *args, slope=slope, pool=pool, padding=padding)
        seen.extend([x.shape[3], y.shape[3]])
        return y

    monkeypatch.setattr(resnet12, "residual_end", watched)
    config = config_of(
        model__backbone="resnet12",
        model__filters=2,
        model__image_size=84,
        model__pool_last=pool_last,
        model__pool_padding=padding,
    )
    backbone = build_backbone(config.model)
    g = torch.Generator().manual_seed(0)
    weights = {
        name: declared.initial(g, declared.shape).double()[None] for name, declared in backbone.parameters.items()
    }
    net = Network(config.model, weights, collect=True)
    assert backbone.features(net, torch.rand(1, 2, 3, 84, 84, dtype=torch.float64)).shape == (1, 2, 16)
    assert [seen[0], *seen[1::2]] == sizes
    assert set(net.statistics) == set(backbone.convolutions)
    assert len(backbone.convolutions) == 16


def test_initial_weights_are_the_released_programs() -> None:
    """Xavier-uniform bounds, zero head bias, identity norms, and one stream in the network's order."""
    config = config_of(model__filters=32)
    algorithm = Algorithm(config, build_backbone(config.model))
    first = algorithm.initial(torch.Generator().manual_seed(5))
    torch.manual_seed(5)
    for name in algorithm.adapted:
        if name == "head.bias":
            assert not first[name].any()
            continue
        expected = torch.nn.init.xavier_uniform_(torch.empty(first[name].shape))
        assert torch.equal(first[name], expected), name
    assert all((first[name] == 1).all() for name in first if name.endswith("norm.weight"))
    assert all((first[name] == 0).all() for name in first if name.endswith("norm.bias"))
