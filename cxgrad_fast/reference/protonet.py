"""Prototypical networks (Snell, Swersky, Zemel 2017): the class whose mean features are nearest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cxgrad_fast.reference.network import Statistics, features


def protonet(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    ways: int,
    distance: str,
    joint: bool,
    **network: Any,
) -> dict[str, Any]:
    """One task: the prototypes are the means of each class's support features; cross-entropy of the query's logits.

    Args:
        parameters: ``features.*``, requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task.
        ways: classes of the task.
        distance: the logits are minus the ``squared`` Euclidean distance (the authors' program), minus the
            ``euclidean`` one (easyfsl), or the ``cosine`` (LibFewShot).
        joint: features of support and query in one pass, normalised together.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (query); ``query_logits``; ``passes``: the statistics of each pass.
    """
    images = [torch.cat([support_x, query_x])] if joint else [support_x, query_x]
    passes: list[dict[str, Statistics]] = [{} for _ in images]
    z = torch.cat([features(parameters, x, found=found, **network) for x, found in zip(images, passes, strict=True)])
    support_z, query_z = z[: len(support_x)], z[len(support_x) :]
    prototypes = torch.stack([support_z[support_y == label].mean(0) for label in range(ways)])
    if distance == "cosine":
        query_z = query_z / query_z.norm(dim=1, keepdim=True).clamp_min(1e-12)
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True).clamp_min(1e-12)
        query_logits = query_z @ prototypes.T
    else:
        squared = (query_z[:, None] - prototypes).square().sum(2)
        query_logits = -squared if distance == "squared" else -squared.sqrt()
    loss = F.cross_entropy(query_logits, query_y)
    return {"loss": loss, "losses": [loss], "query_logits": query_logits, "passes": passes}
