"""What autograd keeps as the way to make it again: the same numbers for less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import OperatorCalls, require_cpp
from torch import Tensor

from cxgrad_fast.kernels import conv_block, use_backend
from cxgrad_fast.kernels.recompute import Recipe, Recipes, attach, recipe_of

SHAPE = (2, 3, 8, 6, 6)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_saved_tensors_are_made_again() -> None:
    """The derivative is right, and the recipe alone is kept."""
    made: list[int] = []

    def double(tensor: Tensor) -> Tensor:
        made.append(1)
        return tensor * 2

    a = leaf(4)
    b = a * 2
    recipe = Recipe(double, (a.detach(),))
    with Recipes([(b, recipe)]).keeping():
        c = b.square()
    assert c.grad_fn is not None
    kept = c.grad_fn._raw_saved_self.data  # type: ignore[attr-defined]
    assert kept is recipe
    (gradient,) = torch.autograd.grad(c.sum(), a, create_graph=True)
    assert torch.equal(gradient, 8 * a)
    (second,) = torch.autograd.grad(gradient.sum(), a)
    assert torch.equal(second, torch.full_like(a, 8))
    assert made


def test_recipes_are_made_of_recipes() -> None:
    a = torch.arange(3.0)
    inner = Recipe(torch.add, (a, 1))
    assert torch.equal(Recipe(torch.mul, (inner, inner))(), (a + 1) ** 2)


def test_a_recipe_belongs_to_one_tensor() -> None:
    a = torch.ones(3)
    attach(a, Recipe(torch.neg, (a,)))
    assert recipe_of(a) is not None
    assert recipe_of(a.detach()) is None


def test_other_hooks_see_calls_without_recipes() -> None:
    """A user's own hooks around a block still get what it saves."""
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Recipes().keeping():
        leaf(3).square()
    assert len(seen) == 1


def blocks(x: Tensor, *weights: Tensor) -> Tensor:
    """A chain without pooling, as in a residual block: each output is the next one's input."""
    for weight in weights:
        channels = weight.shape[1]
        ones, zeros = torch.ones(1, channels, dtype=x.dtype), torch.zeros(1, channels, dtype=x.dtype)
        x = conv_block(x, weight, ones, zeros, 1e-3, slope=0.1, pool=False)
    return x


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that the graph of a call keeps alive, itself and its first derivative."""
    found: dict[int, int] = {}

    def visit(value: object) -> None:
        if isinstance(value, Recipe):
            for part in value.arguments:
                visit(part)
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()

    packs: list[object] = []
    original = Recipes._pack

    def spy(self: Recipes, tensor: Tensor) -> Tensor | Recipe:
        packs.append(original(self, tensor))
        return packs[-1]  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipes, "_pack", spy)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packs.append(t) or t, lambda t: t):
            out = run()
    assert out.requires_grad
    for pack in packs:
        visit(pack)
    return sum(found.values())


def test_a_chain_of_blocks_keeps_one_image_a_block() -> None:
    """The convolution's output; not the activation, and of the pointwise block not even that."""
    require_cpp()
    tasks, images, channels, height, width = SHAPE
    image = 8 * tasks * images * channels * height * width
    x = leaf(*SHAPE)
    wide = [leaf(tasks, channels, channels, 3, 3, seed=seed) for seed in (1, 2, 3)]
    narrow = leaf(tasks, channels, channels, 1, 1, seed=4)
    small = 8 * sum(weight.numel() for weight in (*wide, narrow)) + 20_000  # weights, and a few numbers a channel
    with use_backend("cpp"):
        assert 4 * image <= saved_bytes(lambda: blocks(x, *wide)) < 4 * image + small  # x and three y
        assert 3 * image <= saved_bytes(lambda: blocks(x, wide[0], narrow, wide[1])) < 3 * image + small


def test_what_is_made_again_is_the_same_to_the_bit() -> None:
    """Each order of derivative equals, bit for bit, that of blocks whose inputs have no recipe."""
    require_cpp()
    x = leaf(*SHAPE)
    weights = [leaf(2, 8, 8, k, k, seed=seed) for seed, k in enumerate((3, 1, 3), 1)]

    def derivatives(forget: bool) -> list[Tensor]:
        y = x
        for weight in weights:
            y = blocks(y, weight)
            if forget:
                y = y.view_as(y)  # another tensor: nothing is known of it
        first = torch.autograd.grad(y.square().sum(), [x, *weights], create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *weights])
        return [y, *first, *second]

    with use_backend("cpp"), OperatorCalls() as calls:
        again = derivatives(False)
    assert {"conv_block_activation", "conv_block_convolution"} <= set(calls.names())
    with use_backend("cpp"):
        for actual, expected in zip(again, derivatives(True), strict=True):
            assert torch.equal(actual, expected)
