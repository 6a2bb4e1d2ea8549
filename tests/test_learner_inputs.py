"""What Episodes and Learner refuse, and what they take: shapes, types, labels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import config_of, random_episodes

from cxgrad_fast import Episodes, Learner


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"support_x": (2, 5, 3, 20, 21)}, r"query_x must be \[2, 'images', 3, 20, 21\] to fit support_x"),
        ({"support_x": (5, 3, 21, 21)}, r"support_x must be \[T, images, C, H, W\], got \[5, 3, 21, 21\]"),
        ({"query_y": (2, 14)}, r"query_y must be \[2, 15\] to fit query_x, got \[2, 14\]"),
        ({"support_y": (3, 5)}, r"support_y must be \[2, 5\]"),
        (
            {"support_x": (2, 5, 3, 20, 21), "query_x": (2, 15, 3, 20, 21)},
            r"support_x must hold images \[3, 21, 21\] \(model.channels, model.image_size\), got \[3, 20, 21\]",
        ),
        (
            {"support_x": (0, 5, 3, 21, 21), "support_y": (0, 5), "query_x": (0, 1, 3, 21, 21), "query_y": (0, 1)},
            "episodes must hold at least one task",
        ),
    ],
)
def test_wrong_shapes(change: dict[str, tuple[int, ...]], message: str) -> None:
    config = config_of()
    learner, episodes = Learner(config), random_episodes(config)
    tensors = {name: getattr(episodes, name) for name in ("support_x", "support_y", "query_x", "query_y")}
    for name, shape in change.items():
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
    with pytest.raises(ValueError, match=message):
        learner.meta_loss(Episodes(**tensors))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("sign", ["", "u"])
def test_labels_of_every_width(sign: str, bits: int) -> None:
    """The same numbers as with int64, and the same refusals."""
    config = config_of(inner__steps=1)
    learner, e = Learner(config), random_episodes(config)
    wanted = learner.meta_loss(e)
    dtype = getattr(torch, f"{sign}int{bits}")
    narrow = Episodes(e.support_x, e.support_y.to(dtype), e.query_x, e.query_y.to(dtype))
    out = learner.meta_loss(narrow)
    assert out.loss == wanted.loss
    assert out.accuracy == wanted.accuracy
    assert torch.equal(learner.predict(narrow), learner.predict(e))
    adapted = learner.adapt(narrow.support_x, narrow.support_y)
    assert torch.equal(adapted(e.query_x), learner.adapt(e.support_x, e.support_y)(e.query_x))
    with pytest.raises(ValueError, match=r"query_y must hold labels 0 to 4 \(task.ways = 5\), got 5"):
        learner.predict(Episodes(e.support_x, e.support_y, e.query_x, (e.query_y + 1).to(dtype)))


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their interface may still change
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will move them to another package
        return torch.quantize_per_tensor(torch.ones(2, 5), 0.1, 0, torch.quint8)


ODD = {
    "None": (None, "must be a torch tensor, got NoneType"),
    "list": ([1.0], "must be a torch tensor, got list"),
    "numpy": (np.ones((2, 5, 3, 21, 21)), "must be a torch tensor, got ndarray"),
    "sparse": (torch.ones(2, 5).to_sparse(), "must be a dense tensor that has values, got a sparse_coo one"),
    "compressed": (torch.ones(2, 5, dtype=torch.int64), "must be a dense tensor that has values, got a sparse_csr one"),
    "meta": (torch.ones(2, 5, device="meta"), "must be a dense tensor that has values, got a meta one"),
    "quantized": (_quantized, "must be a dense tensor that has values, got a quantized one"),
    "nested": (_nested, "must be a dense tensor that has values, got a nested one"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        "must be a dense tensor that has values, got a nested one",
    ),
    "complex": (torch.ones(2, 5, dtype=torch.complex64), r"must .*, got torch\.complex64"),
    "bool": (torch.ones(2, 5, dtype=torch.bool), r"must .*, got torch\.bool"),
    "eight bits": (torch.ones(2, 5).to(torch.float8_e5m2), r"must .*, got torch\.float8_e5m2"),
    "bits": (torch.empty(2, 5, dtype=torch.bits8), r"must .*, got torch\.bits8"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_tensor_of_numbers_is_told(kind: str) -> None:
    odd, message = ODD[kind]
    if kind == "compressed":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            odd = odd.to_sparse_csr()
    odd = odd() if callable(odd) else odd
    config = config_of(inner__steps=1)
    learner, e = Learner(config), random_episodes(config)
    tensors = {name: getattr(e, name) for name in ("support_x", "support_y", "query_x", "query_y")}
    for name in tensors:
        with pytest.raises(ValueError, match=f"^{name} {message}$"):
            Episodes(**tensors | {name: odd})
    with pytest.raises(ValueError, match=f"^support_x {message}$"):
        learner.adapt(odd, e.support_y)
    with pytest.raises(ValueError, match=f"^support_y {message}$"):
        learner.adapt(e.support_x, odd)
    with pytest.raises(ValueError, match=f"^query_x {message}$"):
        learner.adapt(e.support_x, e.support_y)(odd)


def test_episodes_that_are_none() -> None:
    learner = Learner(config_of())
    for call in (learner.meta_loss, learner.meta_step, learner.predict):
        with pytest.raises(ValueError, match=r"^episodes must be Episodes, got NoneType$"):
            call(None)
    e = random_episodes(config_of())
    for ways in ("5", -1, None, 2.0):
        with pytest.raises(ValueError, match=r"^ways must be a whole number from 0 on, got"):
            Episodes(e.support_x, e.support_y, e.query_x, e.query_y, ways=ways)


def test_wrong_labels_and_types() -> None:
    config = config_of()
    learner, e = Learner(config), random_episodes(config)
    for y, message in ((e.query_y + 1, "query_y must hold labels 0 to 4"), (e.query_y - 1, "got -1")):
        with pytest.raises(ValueError, match=message):
            learner.meta_loss(Episodes(e.support_x, e.support_y, e.query_x, y))
    with pytest.raises(ValueError, match=r"query_y must hold integers, got torch\.float32"):
        Episodes(e.support_x, e.support_y, e.query_x, e.query_y.float())
    with pytest.raises(ValueError, match="support_x must be floating point"):
        Episodes(e.support_x.long(), e.support_y, e.query_x, e.query_y)
