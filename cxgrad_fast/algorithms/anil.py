"""ANIL (Raghu et al. 2020): the head alone is adapted, on features that are computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import (
    Algorithm,
    Found,
    Images,
    Output,
    State,
    Support,
    Tensors,
    cut,
    gradients_of,
    linear,
    moved,
)
from cxgrad_fast.config import ANILConfig
from cxgrad_fast.kernels import linear_cross_entropy
from cxgrad_fast.models import HEAD, LayerStatistics, Parameter


class ANIL(Algorithm):
    """``(W, b) <- (W, b) - alpha * dL/d(W, b)`` on the features of the support set.

    With ``joint`` the features of support and query are computed in one pass, normalised together, as learn2learn does.
    """

    config: ANILConfig
    released = released.ANIL

    @property
    def joint(self) -> bool:
        return self.config.joint

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role == HEAD

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        images, count = support if support.query is None else support.together, support.x.shape[1]
        # in first order the inner gradients are constants, and the query pass has features of its own
        with torch.set_grad_enabled(graph or self.joint):
            features = self.backbone.features(self.network(State(fast), 0, shared, images), images.x)
        carried = {"features": features[:, :count]}
        if support.query is not None:
            carried["query_features"] = features[:, count:]
        return State(fast, carried), []

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        features = state.carried["features"]
        points = dict(zip(state.fast, cut(list(state.fast.values()), graph), strict=True))
        features = features if graph else features.detach()
        losses, _ = linear_cross_entropy(features, points["head.weight"], points["head.bias"], support.y)
        return Found(state.fast, gradients_of(losses, points, graph), [losses])

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        return State(moved(found, self.config.learning_rate), state.carried)

    def predict(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        support: Support,
        query: Images,
        *,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Output:
        if "query_features" not in state.carried:
            return super().predict(state, k, shared, support, query, given=given, collect=collect)
        return Output(linear(state.fast, "head", state.carried["query_features"]), {})
