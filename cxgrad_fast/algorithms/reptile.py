"""Reptile (Nichol, Achiam, Schulman 2018): towards where the training of each task ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cxgrad_fast import released
from cxgrad_fast.algorithms.algorithm import Algorithm, Found, State, Support, Tensors, across, cut, gradients_of, moved
from cxgrad_fast.config import ReptileConfig
from cxgrad_fast.models import OWN, Parameter, constant

COUNT = "count"


class Reptile(Algorithm):
    """Adam or gradient descent on minibatches of the support set; the meta-gradient is ``theta - theta_S``.

    With the meta-gradient's average over tasks, gradient descent (``outer.optimizer = sgd``) at the rate epsilon is
    the released program's interpolation ``theta + epsilon * (mean of theta_S - theta)``. All parameters are adapted,
    norms included. The query set is scored for the record alone.

    Adam has no first moment, and its epsilon is added to the uncorrected root, as in TensorFlow. With ``moments =
    carried`` its second moments and its number of steps go on from task to task, as in the released program. They are
    then parameters that are not trained, ``moments.NAME`` and ``count``; tasks are done one after the other in
    meta-training, and each from the same moments in evaluation.
    """

    config: ReptileConfig
    released = released.REPTILE

    @property
    def sequential(self) -> bool:
        return self.config.optimizer == "adam" and self.config.moments == "carried"

    def parameters(self) -> dict[str, Parameter]:
        """The backbone, a head, and what Adam carries from task to task."""
        network = super().parameters()
        if not self.sequential:
            return network
        start = Parameter((), OWN, constant(0.0), trained=False, carried=True)
        moments = {_moment(name): replace(start, shape=each.shape) for name, each in network.items()}
        return network | moments | {COUNT: start}

    def adapts(self, name: str, parameter: Parameter) -> bool:
        return parameter.role != OWN

    def start(
        self, fast: Tensors, shared: Mapping[str, Tensor], support: Support, graph: bool
    ) -> tuple[State, list[Tensor]]:
        fast = {name: weight.detach() for name, weight in fast.items()}
        if self.config.optimizer == "sgd":
            return State(fast), []
        tasks = len(support.x)
        if not self.sequential:
            carried = {_moment(name): torch.zeros_like(weight) for name, weight in fast.items()}
            return State(fast, carried | {COUNT: support.x.new_zeros(tasks)}), []
        held = {name: shared[name].detach() for name in (*map(_moment, fast), COUNT)}
        return State(fast, {name: tensor.expand(tasks, *tensor.shape) for name, tensor in held.items()}), []

    def gradients(self, state: State, k: int, shared: Mapping[str, Tensor], support: Support, graph: bool) -> Found:
        assert support.batches is not None
        places = support.batches[:, k]
        x = torch.take_along_dim(support.x, places[:, :, None, None, None], 1)
        batch = Support(x, self.images(x).patches, support.y.gather(1, places), support.ways)
        points = dict(zip(state.fast, cut(list(state.fast.values()), graph=False), strict=True))
        losses = self.support_losses(self.network(State(points), k, {}, batch), batch)
        goal = losses * places.shape[1] if self.config.reduction == "sum" else losses
        return Found(state.fast, gradients_of(goal, points, graph=False), [losses])

    def move(self, state: State, k: int, found: Found, shared: Mapping[str, Tensor], graph: bool) -> State:
        config, gradients = self.config, found.gradients
        rate, beta = config.learning_rate, config.beta2
        if config.optimizer == "sgd":
            return State(moved(found, rate))
        count = state.carried[COUNT] + 1
        rates = rate * (-torch.expm1(count * math.log(beta))).sqrt()  # 1 - beta^count without cancellation
        fast, carried = {}, {}
        for name, weight in state.fast.items():
            gradient, moment = gradients[name], _moment(name)
            carried[moment] = beta * state.carried[moment] + (1 - beta) * gradient.square()
            fast[name] = weight - across(rates, gradient) * gradient / (carried[moment].sqrt() + config.adam_eps)
        return State(fast, carried | {COUNT: count})

    def objectives(self, start: Tensors, state: State, losses: Tensor) -> Tensor:
        """The query losses, whose gradient in the parameters is ``theta - theta_S`` instead of their own."""
        gaps = [(start[name] - end.detach()).square().flatten(1).sum(1) for name, end in state.fast.items()]
        half = torch.stack(gaps).sum(0) / 2
        return losses.detach() + (half - half.detach())

    def carried_on(self, state: State) -> Tensors:
        return {name: tensor[-1] for name, tensor in state.carried.items()} if self.sequential else {}


def _moment(name: str) -> str:
    return f"moments.{name}"
