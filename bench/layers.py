"""What a layer costs in one sweep over a set of images: FLOPs and bytes, as bench/roofline.py counts them.

The units of each sweep and what they read and write stand in that module's docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cxgrad_fast.algorithms import build_algorithm
from cxgrad_fast.algorithms.metric import Metric
from cxgrad_fast.config import Config, ModelConfig
from cxgrad_fast.models import build_backbone

HEAD = "head"
CONTEXT = "context"  # below the head, among the names of layers: context parameters that join the features


@dataclass(frozen=True)
class Work:
    """Work of one visit: FLOPs, elements and single bytes an image, elements a task (weights)."""

    flops: int = 0
    elements: int = 0
    single: int = 0
    weights: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.elements + other.elements,
            self.single + other.single,
            self.weights + other.weights,
        )

    def moved(self, images: int, element: int) -> int:
        """Bytes of one visit with a set of ``images`` images, in elements of ``element`` bytes."""
        return element * (images * self.elements + self.weights) + images * self.single


@dataclass(frozen=True)
class Asked:
    """What of a pass's gradients concerns one layer.

    Attributes:
        below: something is differentiated below the layer, so that its input carries a gradient.
        weight: the gradient of its weight is found.
        here: something of the layer is differentiated: its weight, its scale, its norm.
    """

    below: bool
    weight: bool
    here: bool


@dataclass(frozen=True)
class Layer:
    """A convolution with its norm, or the head (a convolution of one position), for one image.

    Attributes:
        weight: elements of its weight, ``k^2 Cin Cout``.
        positions: ``H W`` of its output.
        read: elements of its input.
        written: elements of its convolution output, y.
        below: names of the layers that its input comes from; none: it reads the images.
        pooled: positions after the pool; 0 without.
        scaled: CxGrad scales its weight.
        closed: the first-layer form (MATH.md 2) applies.
    """

    name: str
    weight: int
    positions: int
    read: int
    written: int
    below: frozenset[str] = frozenset()
    pooled: int = 0
    scaled: bool = True
    closed: bool = False

    @property
    def unit(self) -> int:
        return 2 * self.weight * self.positions

    @property
    def sparse(self) -> int:
        """FLOPs of a wgrad or a convolution where only what the pool kept is needed."""
        return 2 * self.weight * self.pooled if self.closed else self.unit

    @property
    def output(self) -> int:
        """Elements of the block's output, and of the gradient there."""
        return self.written // self.positions * self.pooled if self.pooled else self.written

    @property
    def saved(self) -> Work:
        """What a later visit reads of the forward pass besides the input."""
        return Work(elements=self.output, single=self.output) if self.closed else Work(elements=self.written)

    def forward(self) -> Work:
        stored = self.saved if self.closed else self.saved + Work(elements=self.output if self.pooled else 0)
        return Work(self.unit, self.read, weights=self.weight) + stored

    def backward(self, asked: Asked) -> Work:
        work = Work()
        if asked.below:
            work += Work(self.unit, self.read, weights=self.weight)
        if asked.weight:
            work += Work(self.sparse, self.read, weights=self.weight)
        if work == Work() and not asked.here:
            return work  # nothing that is differentiated depends on it
        return work + self.saved + Work(elements=self.output)

    def second_backward(self, asked: Asked) -> Work:
        """Tangent and cotangent sweep: X where something below was asked for, W where the weight was."""
        return self._tangent(asked) + self._cotangent(asked)

    def _tangent(self, asked: Asked) -> Work:
        work = Work()
        if asked.below:
            work += Work(self.unit, self.read, weights=self.weight)
        if asked.weight:
            work += Work(self.sparse, self.read, weights=self.weight)
        if work == Work() and not asked.here:
            return work
        u = 0 if self.closed or work == Work() else self.written
        return work + self.saved + Work(elements=2 * self.output + u)

    def _cotangent(self, asked: Asked) -> Work:
        work = Work(self.sparse, self.read + self.output, weights=self.weight) + self.saved
        if self.below:
            work += Work((1 + asked.below) * self.unit, 2 * self.read + self.output + self.written, weights=self.weight)
            if asked.weight:
                work += Work(self.unit, weights=self.weight)
        elif self.closed and asked.weight:
            work += Work(weights=self.weight)
        elif asked.weight:
            work += Work(elements=self.output + self.written)
        elif asked.here:
            work += Work(elements=self.output)
        return work


@dataclass(frozen=True)
class ResidualEnd:
    """Addition, activation and pool: no FLOPs that are counted, traffic of ``branch`` in and ``output`` out."""

    name: str
    branch: int
    output: int
    below: frozenset[str] = frozenset()

    def forward(self) -> Work:
        return Work(elements=2 * self.branch + self.output, single=self.output)

    def backward(self, asked: Asked) -> Work:
        return Work(elements=self.branch + self.output, single=self.output) if asked.below else Work()

    def second_backward(self, asked: Asked) -> Work:
        return Work(elements=3 * self.branch + 2 * self.output, single=2 * self.output)


Network = list[Layer | ResidualEnd]


def layers(config: Config) -> Network:
    """The network of ``config``, in forward order, the head, where the algorithm has one, last."""
    algorithm = build_algorithm(config, build_backbone(config.model))
    head = 0 if isinstance(algorithm, Metric) else config.task.ways * algorithm.backbone.width
    if "head.weight" in algorithm.declared:  # CAVIA's may read more than the features
        head = math.prod(algorithm.declared["head.weight"].shape)
    return _conv4(config, head) if config.model.backbone == "conv4" else _resnet12(config, head)


def _conv4(config: Config, head: int) -> Network:
    model, network, below = config.model, list[Layer | ResidualEnd](), frozenset[str]()
    channels, size = model.channels, model.image_size
    for index in range(4):
        layer = _convolution(f"features.{index}", model, 3, channels, model.filters, size)
        closed = index == 0 and model.norm == "batch" and not (model.pool_ceil and size % 2)
        channels, size = model.filters, model.sizes_by_block()[index]
        network.append(replace(layer, below=below, pooled=size**2, closed=closed))
        below |= {layer.name}
    return [*network, *_head(config.task.ways, head, channels * size * size, below)]


def _resnet12(config: Config, head: int) -> Network:
    model, network, below = config.model, list[Layer | ResidualEnd](), frozenset[str]()
    channels, size = model.channels, model.image_size
    for block in range(4):
        filters, name = model.filters_by_block[block], f"features.{block}"
        shortcut = _convolution(f"{name}.shortcut", model, 1, channels, filters, size)
        network.append(replace(shortcut, below=below, scaled=False))
        branch = below
        for index in range(3):
            inputs = channels if index == 0 else filters
            layer = _convolution(f"{name}.{index}", model, 3, inputs, filters, size)
            network.append(replace(layer, below=branch))
            branch |= {layer.name}
        below = branch | {shortcut.name}
        pool = block < 3 or model.pool_last
        after = (size + 2 * model.pool_padding[block]) // 2 if pool else size
        network.append(ResidualEnd(f"{name}.end", filters * size**2, filters * after**2, below))
        channels, size = filters, after
    return [*network, *_head(config.task.ways, head, channels * size * size, below)]


def _convolution(name: str, model: ModelConfig, kernel: int, inputs: int, outputs: int, size: int) -> Layer:
    return Layer(name, kernel**2 * inputs * outputs, size**2, inputs * size**2, outputs * size**2)


def _head(ways: int, weight: int, read: int, below: frozenset[str]) -> list[Layer]:
    return [Layer(HEAD, weight, 1, read, ways, below | {CONTEXT}, scaled=False)] if weight else []
