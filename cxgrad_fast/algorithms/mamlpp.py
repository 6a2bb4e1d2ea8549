"""MAML++ (Antoniou et al. 2019): rates and norms of every step, and the query loss after every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, Images, Output, Phase, State, Support, moved
from cxgrad_fast.config import MAMLPPConfig
from cxgrad_fast.models import NORM, OWN, LayerStatistics, Network, Parameter, constant


class MAMLPP(Algorithm):
    """``theta <- theta - rate_s * dL/dtheta`` with the norms' row s; the query pass after it has the same row.

    In the first ``multi_step_iterations`` the query losses after all steps count, equally at first, then the last one
    more and more (:func:`step_weights`).
    """

    config: MAMLPPConfig
    released = released.MAMLPP

    def parameters(self) -> dict[str, Parameter]:
        """The backbone with norms ``[steps, C]``, a head, and ``rates.NAME`` [steps + 1] of every adapted tensor."""
        rows, rates = max(1, self.config.steps), {}
        network = super().parameters()
        for name, each in network.items():
            if each.role == NORM:
                network[name] = replace(each, shape=(rows, *each.shape))
            else:  # the released program's last entry is never used
                rates[f"rates.{name}"] = Parameter((self.config.steps + 1,), OWN, constant(self.config.learning_rate))
        return network | rates

    def network(
        self,
        state: State,
        k: int,
        shared: Mapping[str, Tensor],
        images: Images,
        *,
        eps: Mapping[str, Tensor] | None = None,
        given: Mapping[str, LayerStatistics] | None = None,
        collect: bool = False,
    ) -> Network:
        norms = {name: tensor[:, k] for name, tensor in shared.items() if self.declared[name].role == NORM}
        return super().network(state, k, {**shared, **norms}, images, eps=eps, given=given, collect=collect)

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        return State(moved(found, torch.stack([shared[f"rates.{name}"][k] for name in state.fast])[None]))

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
        return super().predict(state, max(0, k - 1), shared, support, query, given=given, collect=collect)

    def phase(self, iteration: int | None) -> Phase:
        config, phase = self.config, super().phase(iteration)
        if iteration is None or iteration >= config.multi_step_iterations or config.steps < 2:
            return phase
        epochs = config.multi_step_iterations / config.multi_step_epoch
        weights = step_weights(config.steps, iteration // config.multi_step_epoch, epochs)
        return replace(
            phase, asked_after=tuple(range(1, config.steps)), weights=torch.tensor(weights, dtype=torch.float64)
        )


def step_weights(steps: int, epoch: int, epochs: float) -> list[float]:
    """The weights of the query losses after each step, in an epoch from 0 on; they sum to 1."""
    early = max(1 / steps - epoch / (steps * epochs), 0.03 / steps)
    last = min(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - 0.03 * (steps - 1) / steps)
    return [early] * (steps - 1) + [last]
