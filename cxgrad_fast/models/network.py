"""A network's layers under one set of weights of all tasks, and what its parameters are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxgrad_fast.config import ModelConfig
from cxgrad_fast.kernels import PatchStatistics, conv_block, linear_cross_entropy

LayerStatistics = tuple[Tensor, Tensor]  # mean and biased variance of a BatchNorm's input, [T, C] each
Initial = Callable[[torch.Generator, tuple[int, ...]], Tensor]

CONVOLUTION, BIAS, NORM, HEAD, OWN = "convolution", "bias", "norm", "head", "own"


def xavier_uniform(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Glorot and Bengio 2010, gain 1."""
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


def constant(value: float) -> Initial:
    """An initialisation that draws nothing: all elements are ``value``."""
    return lambda generator, shape: torch.full(shape, value)


@dataclass(frozen=True)
class Parameter:
    """One meta-parameter.

    Attributes:
        shape: of the tensor.
        role: what it is in the network: ``convolution``, ``bias`` (of a convolution), ``norm``, ``head``, or ``own``
            (the algorithm's own, which the network does not read).
        initial: (generator, shape) -> a fresh float32 tensor.
        scaled: CxGrad scales it; convolutions only.
        trained: the outer optimizer moves it; otherwise it stays as it was drawn, or is carried.
        carried: not trained: what a task of meta-training leaves for the next, an inner optimizer's moments.
    """

    shape: tuple[int, ...]
    role: str
    initial: Initial = xavier_uniform
    scaled: bool = False
    trained: bool = True
    carried: bool = False

    def untrained(self) -> Parameter:
        """The same, but not moved by the outer optimizer."""
        return replace(self, trained=False)


def own_linear(name: str, inputs: int, outputs: int) -> dict[str, Parameter]:
    """A linear layer of an algorithm's own, ``[outputs, inputs]`` and ``[outputs]``, as torch.nn.Linear draws it."""
    bound = 1 / math.sqrt(inputs)

    def weight(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def bias(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        return nn.init.uniform_(torch.empty(shape), -bound, bound, generator=generator)

    return {
        f"{name}.weight": Parameter((outputs, inputs), OWN, weight),
        f"{name}.bias": Parameter((outputs,), OWN, bias),
    }


class Network:
    """The layers of a backbone and of a head, as functions of images and features ``[T, S, ...]`` of ``T`` tasks.

    Args:
        model: reads ``norm``, ``norm_groups`` and ``norm_eps``.
        weights: parameters by name: convolutions, their biases and heads ``[T, ...]``, norms ``[T or 1, C]``.
        eps: epsilon ``[T]`` of the norm behind a convolution, by the convolution's name; others have ``norm_eps``.
        patches: patch statistics of a convolution's input, by its name.
        film: scale and shift ``[T, C]`` between a block's pooling and its activation (FiLM), by the convolution's name.
        beside: what joins the features of a linear layer, ``[T, P]``, by the layer's name.
        given: mean and variance ``[T or 1, C]`` to normalise with, by convolution, instead of the images' own.
        collect: whether :attr:`statistics` is filled.

    Attributes:
        statistics: mean and variance ``[T, C]`` of each BatchNorm's input, by the name of its convolution.
        counts: how many values of a task each of these is of, by the same names.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        eps: Mapping[str, Tensor] | None = None,
        patches: Mapping[str, PatchStatistics] | None = None,
        film: Mapping[str, LayerStatistics] | None = None,
        beside: Mapping[str, Tensor] | None = None,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> None:
        self._model, self._weights = model, weights
        self._eps, self._patches, self._film = eps or {}, patches or {}, film or {}
        self._given, self._collect, self._beside = given, collect, beside or {}
        self.statistics: dict[str, LayerStatistics] = {}
        self.counts: dict[str, int] = {}

    def block(self, name: str, x: Tensor, *, slope: float | None, pool: bool, padded: bool = True) -> Tensor:
        """Convolution ``name``, its norm, 2x2 max-pooling and LeakyReLU.

        An odd last row and column are dropped, or with ``pool_ceil`` kept.

        Args:
            name: of the convolution.
            x: ``[T, S, C_in, H, W]``.
            slope: of the LeakyReLU; 0 is ReLU, None is no activation.
            pool: whether it pools.
            padded: whether the convolution keeps the size of the images.

        A convolution's bias cancels in a BatchNorm behind it; it only shifts the means that are collected and given.
        """
        if name in self._film:
            scale, shift = (value[:, None, :, None, None] for value in self._film[name])
            y = self._convolve(name, x, slope=None, pool=pool, padded=padded) * scale + shift
            return y if slope is None else F.leaky_relu(y, slope)
        return self._convolve(name, x, slope=slope, pool=pool, padded=padded)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """``x`` [T, S, D], weight [T, N, D] and bias [T, N] -> [T, S, N]."""
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return torch.baddbmm(bias[:, None], self._joined(name, x), weight.mT)

    def linear_cross_entropy(self, name: str, x: Tensor, labels: Tensor) -> Tensor:
        """The loss ``[T]`` of each task: mean cross-entropy of :meth:`linear` and ``labels`` [T, S].

        ``x`` [T, S, ...]: all axes behind S are the features.
        """
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return linear_cross_entropy(self._joined(name, x), weight, bias, labels)[0]

    def _joined(self, name: str, x: Tensor) -> Tensor:
        """Features ``[T, S, ...]`` and what joins them at a linear layer."""
        if name not in self._beside:
            return x
        return torch.cat([x.flatten(2), self._beside[name][:, None].expand(-1, x.shape[1], -1)], 2)

    def own(self, name: str) -> Tensor:
        """A parameter of the algorithm's own, the same of all tasks."""
        return self._weights[name]

    def _convolve(self, name: str, x: Tensor, *, slope: float | None, pool: bool, padded: bool) -> Tensor:
        model, weights = self._model, self._weights
        lost = 0 if padded else weights[f"{name}.weight"].shape[3] - 1
        height, width = x.shape[3] - lost, x.shape[4] - lost
        if pool and model.pool_ceil and (height % 2 or width % 2):  # pool and activation may change places
            y = self._convolve(name, x, slope=slope, pool=False, padded=padded)
            return F.max_pool2d(y.flatten(0, 1), 2, ceil_mode=True).unflatten(0, y.shape[:2])
        bias = weights.get(f"{name}.bias")
        operands = (weights[f"{name}.weight"], weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
        eps = self._eps.get(name, model.norm_eps)
        if model.norm != "batch":
            groups = model.norm_groups if model.norm == "group" else 1
            return conv_block(x, *operands, eps, slope=slope, pool=pool, norm="group", groups=groups, padded=padded)
        given = None if self._given is None else self._given[name]
        if given is not None and bias is not None:
            given = (given[0] - bias, given[1])
        y, (mean, variance) = conv_block(
            x,
            *operands,
            eps,
            slope=slope,
            pool=pool,
            patch_statistics=self._patches.get(name),
            statistics=given,
            padded=padded,
            return_statistics=True,
        )
        if self._collect:
            self.statistics[name] = (mean if bias is None else mean + bias, variance)
            self.counts[name] = x.shape[1] * height * width
        return y
