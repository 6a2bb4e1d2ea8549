"""Matching networks (Vinyals et al. 2016): attention over the support set, in the two forms that are in use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.reference.network import Statistics, features


def matchingnet(
    parameters: Mapping[str, Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    *,
    ways: int,
    full_context: bool,
    attention: str,
    joint: bool,
    **network: Any,
) -> dict[str, Any]:
    """One task: a class's probability is the attention that its supports get; the loss is minus its logarithm.

    Args:
        parameters: ``features.*``; with full context ``support_lstm.*``, ``support_lstm.reverse.*`` and
            ``query_lstm.*`` (rows: input, forget, candidate, output). Requiring gradients.
        support_x, support_y, query_x, query_y: images ``[S, C, H, W]`` and labels ``[S]`` of one task. With full
            context the order of the supports matters.
        ways: classes of the task.
        full_context: whether the features see the other supports (full context embeddings).
        attention: ``cosine``: softmax of 100 relu(cosine), CloserLookFewShot's; ``support_cosine``: softmax of the
            products with normalised supports, the query as it is, easyfsl's.
        joint: features of support and query in one pass, normalised together.
        network: keywords of :func:`cxgrad_fast.reference.network.features`.

    Returns:
        ``loss``; ``losses`` (query); ``query_logits``: log-probabilities; ``passes``: the statistics of each pass.
    """
    images = [torch.cat([support_x, query_x])] if joint else [support_x, query_x]
    passes: list[dict[str, Statistics]] = [{} for _ in images]
    z = torch.cat([features(parameters, x, found=found, **network) for x, found in zip(images, passes, strict=True)])
    s, f = z[: len(support_x)], z[len(support_x) :]
    if full_context:
        ahead = _lstm(parameters, "support_lstm", s)
        back = _lstm(parameters, "support_lstm.reverse", s.flip(0)).flip(0)
        s = s + ahead + back
        h, c = f, torch.zeros_like(f)
        for _ in range(len(s)):
            read = torch.softmax(h @ s.T, 1) @ s
            h, c = _cell(parameters, "query_lstm", torch.cat([f, read], 1), h, c)
            h = h + f
        f = h
    if attention == "cosine":
        f, s = (each / (each.norm(dim=1, keepdim=True) + 1e-5) for each in (f, s))
        weights = torch.softmax(100 * torch.relu(f @ s.T), 1)
    else:
        weights = torch.softmax(f @ (s / s.norm(dim=1, keepdim=True).clamp_min(1e-12)).T, 1)
    by_class = torch.stack([weights[:, support_y == label].sum(1) for label in range(ways)], 1)
    query_logits = (by_class + 1e-6).log()
    loss = -query_logits[torch.arange(len(query_y)), query_y].mean()
    return {"loss": loss, "losses": [loss], "query_logits": query_logits, "passes": passes}


def _cell(parameters: Mapping[str, Tensor], name: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the LSTM ``name``: input ``[..., I]``, states ``[..., D]``."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        parameters[f"{name}.{part}"] for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    enter, keep, candidate, leave = (x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh).chunk(4, -1)
    c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(candidate)
    return torch.sigmoid(leave) * torch.tanh(c), c


def _lstm(parameters: Mapping[str, Tensor], name: str, sequence: Iterable[Tensor]) -> Tensor:
    """The states of the LSTM ``name`` behind each element, from zero."""
    states: list[Tensor] = []
    h = c = torch.zeros_like(parameters[f"{name}.weight_hh"][0])
    for x in sequence:
        h, c = _cell(parameters, name, x, h, c)
        states.append(h)
    return torch.stack(states)
