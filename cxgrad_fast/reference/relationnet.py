"""Relation networks (Sung et al. 2018): a second network scores every pair of class and query."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import Statistics, conv_norm


def relationnet(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    ways: int,
    shots_rule: str,
    relation_padding: int,
    loss_type: str,
    joint: bool,
    slope: float = 0.0,
    **norm: Any,
) -> dict[str, Any]:
    """One task: all its pairs go through the relation module as one batch, queries outer, classes inner.

    Args:
        parameters: ``features.*`` of the encoder; ``relation.0.*``, ``relation.1.*``, ``relation.hidden.*`` and
            ``relation.score.*`` of the relation module. Requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        ways: classes of the task.
        shots_rule: the class's map is the ``sum`` (the authors' program) or the ``mean`` (CloserLookFewShot) of its
            shots'.
        relation_padding: of the relation module's convolutions.
        loss_type: ``mse``: squared error of the scores' sigmoids against one-hot labels; ``softmax``: cross-entropy.
        joint: maps of support and query in one pass, normalised together.
        slope: of the leaky ReLU.
        norm: keywords of :func:`cxgrad_fast.reference.network.conv_norm`.

    Returns:
        ``loss``; ``losses`` (query); ``query_logits``: scores, with ``mse`` behind the sigmoid; ``passes``: the
        statistics of the encoder's passes and of the relation module's.
    """
    images = [torch.cat([support_x, query_x])] if joint else [support_x, query_x]
    passes: list[dict[str, Statistics]] = [{} for _ in (*images, "relation")]
    by_pass = []
    for x, found in zip(images, passes, strict=False):
        for block in range(4):
            x = conv_norm(parameters, f"features.{block}", x, padding=int(block >= 2), found=found, **norm)
            x = F.leaky_relu(x, slope)
            x = F.max_pool2d(x, 2) if block < 2 else x
        by_pass.append(x)
    maps = torch.cat(by_pass)
    support, query = maps[: len(support_x)], maps[len(support_x) :]
    classes = torch.stack([support[support_y == label].sum(0) for label in range(ways)])
    if shots_rule == "mean":
        classes = classes / torch.stack([(support_y == label).sum() for label in range(ways)])[:, None, None, None]
    shape = (len(query), ways, *query.shape[1:])
    x = torch.cat([classes.expand(shape), query[:, None].expand(shape)], 2).flatten(0, 1)
    for block in range(2):
        x = conv_norm(parameters, f"relation.{block}", x, padding=relation_padding, found=passes[-1], **norm)
        x = F.max_pool2d(F.leaky_relu(x, slope), 2)
    x = torch.relu(F.linear(x.flatten(1), parameters["relation.hidden.weight"], parameters["relation.hidden.bias"]))
    scores = F.linear(x, parameters["relation.score.weight"], parameters["relation.score.bias"]).view(-1, ways)
    if loss_type == "mse":
        scores = torch.sigmoid(scores)
        loss = (scores - (query_y[:, None] == torch.arange(ways)).to(scores.dtype)).square().mean()
    else:
        loss = F.cross_entropy(scores, query_y)
    return {"loss": loss, "losses": [loss], "query_logits": scores, "passes": passes}
