"""The oracle's networks: plain functions of one task's weights and images.

Weights go by our names: ``features.0.weight``, ``features.0.bias`` (where the program has one),
``features.0.norm.weight``, ``features.0.norm.bias``, ``head.weight``, ``head.bias``; in a ResNet
``features.0.2.weight``, ``features.0.shortcut.weight``.
Norms are written out: the backward of torch's own batch norm is wrong for one image with certain strides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

Statistics = tuple[Tensor, Tensor]  # mean and variance [C] of a batch norm's input


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """``x`` [S, C, H, W] less ``mean`` [C], times ``scale`` over the deviation, plus ``shift``."""
    factor = scale / (variance + eps).sqrt()
    return (x - mean[:, None, None]) * factor[:, None, None] + shift[:, None, None]


def group_norm(x: Tensor, groups: int, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Each image of ``x`` [S, C, H, W] normalised by itself, over the channels and places of each group."""
    grouped = x.reshape(len(x), groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    normalised = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    return normalised * scale[:, None, None] + shift[:, None, None]


def conv_norm(
    theta: Mapping[str, Tensor],
    name: str,
    x: Tensor,
    *,
    eps: float,
    norm: str = "batch",
    norm_groups: int = 1,
    padding: int | None = None,
    given: Mapping[str, Statistics] | None = None,
    found: dict[str, Statistics] | None = None,
) -> Tensor:
    """The convolution ``name``, with its bias where ``theta`` has one, and its norm.

    Args:
        theta: weights by name.
        name: ``features.0``, say.
        x: ``[S, C, H, W]``.
        eps: of the norm.
        norm: ``batch``, ``group`` (of ``norm_groups``) or ``layer`` (one group).
        norm_groups: of ``norm = group``.
        padding: of the convolution; None keeps the size of the images.
        given: statistics to normalise with, by name of the convolution, instead of the batch's.
        found: takes the batch's mean and *unbiased* variance under ``name``, which running statistics are made of.
    """
    weight, scale, shift = (theta[f"{name}.{part}"] for part in ("weight", "norm.weight", "norm.bias"))
    y = F.conv2d(x, weight, theta.get(f"{name}.bias"), padding=weight.shape[2] // 2 if padding is None else padding)
    if norm != "batch":
        return group_norm(y, norm_groups if norm == "group" else 1, scale, shift, eps)
    mean, variance = y.mean((0, 2, 3)), y.var((0, 2, 3), correction=0)
    if found is not None:
        count = y[:, 0].numel()
        found[name] = (mean.detach(), variance.detach() * count / max(count - 1, 1))
    if given is not None:
        mean, variance = given[name]
    return batch_norm(y, mean, variance, scale, shift, eps)


def features(
    theta: Mapping[str, Tensor],
    x: Tensor,
    *,
    backbone: str = "conv4",
    slope: float = 0.0,
    eps: float = 1e-5,
    norm: str = "batch",
    norm_groups: int = 1,
    pool_last: bool = True,
    pool_padding: Sequence[int] = (0, 0, 0, 0),
    pool_ceil: bool = False,
    channels_last: bool = False,
    given: Mapping[str, Statistics] | None = None,
    found: dict[str, Statistics] | None = None,
) -> Tensor:
    """Images ``[S, C, H, W]`` -> features ``[S, D]``.

    Args:
        theta: weights by name; their shapes say how wide the network is.
        x: the images.
        backbone: ``conv4``: four blocks of convolution, norm, leaky ReLU and 2x2 max-pool, flattened (C, H, W).
            ``resnet12``: four residual blocks and the mean over all places.
        slope: of the leaky ReLU.
        eps, norm, norm_groups, given, found: as :func:`conv_norm`.
        pool_last: resnet12: pool after the fourth block too.
        pool_padding: resnet12: of each block's pool, with minus infinity.
        pool_ceil: conv4: the pools keep an odd last row and column.
        channels_last: conv4: flattened (H, W, C).
    """

    def convolved(name: str, x: Tensor) -> Tensor:
        return conv_norm(theta, name, x, eps=eps, norm=norm, norm_groups=norm_groups, given=given, found=found)

    for block in range(4):
        if backbone == "conv4":
            x = F.max_pool2d(F.leaky_relu(convolved(f"features.{block}", x), slope), 2, ceil_mode=pool_ceil)
            continue
        shortcut = convolved(f"features.{block}.shortcut", x)
        x = F.leaky_relu(convolved(f"features.{block}.0", x), slope)
        x = F.leaky_relu(convolved(f"features.{block}.1", x), slope)
        x = F.leaky_relu(convolved(f"features.{block}.2", x) + shortcut, slope)
        if block < 3 or pool_last:
            x = F.max_pool2d(x, 2, padding=pool_padding[block])
    if backbone != "conv4":
        return x.mean((2, 3))
    return x.permute(0, 2, 3, 1).flatten(1) if channels_last else x.flatten(1)


def head(theta: Mapping[str, Tensor], z: Tensor) -> Tensor:
    """Features ``[S, D]`` -> logits ``[S, N]``."""
    return F.linear(z, theta["head.weight"], theta["head.bias"])


def running_statistics(
    start: Mapping[str, Statistics], passes: Iterable[Mapping[str, Statistics]], momentum: float
) -> dict[str, Statistics]:
    """``start`` moved by what ``found`` took from each pass, in order: r <- (1 - momentum) r + momentum s."""
    running = dict(start)
    for found in passes:
        for name, pair in found.items():
            mean, variance = (
                (1 - momentum) * old + momentum * new for old, new in zip(running[name], pair, strict=True)
            )
            running[name] = (mean, variance)
    return running
