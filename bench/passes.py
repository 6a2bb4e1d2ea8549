"""Which passes over the support set a meta-step of an algorithm has, and what each of them differentiates.

Most algorithms need no row here: in each inner step they take the gradient of what they adapt
(:attr:`cxgrad_fast.algorithms.Algorithm.adapted`), and where nothing is adapted, layers are computed once. :data:`ROWS`
has those whose passes are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from layers import CONTEXT, HEAD, Asked, Layer, Network, ResidualEnd

from cxgrad_fast.algorithms import Algorithm, build_algorithm
from cxgrad_fast.algorithms.metric import Metric
from cxgrad_fast.config import CAVIAConfig, Config, CxGradConfig, L2FConfig, ModGradConfig, ReptileConfig
from cxgrad_fast.models import build_backbone

Names = frozenset[str]


@dataclass(frozen=True)
class Pass:
    """Passes of one kind over the support set.

    Attributes:
        phase: what the table of phases calls them.
        times: how many a task has.
        second: 1 where their gradients are differentiated, else 0.
        weights: layers whose weight they take the gradient of.
        points: layers of which they take another gradient: of a scale, a norm, of FiLM behind it.
        backward: whether they have gradients at all.
        features: of the backbone alone, for what is made of the features; with one backward, the meta-gradient's.
    """

    phase: str
    times: int
    second: int
    weights: Names
    points: Names = frozenset()
    backward: bool = True
    features: bool = False

    def asked(self, layer: Layer | ResidualEnd) -> Asked:
        """What of this pass concerns a layer."""
        taken = self.weights | self.points
        return Asked(bool(layer.below & taken), layer.name in self.weights, layer.name in taken)


@dataclass(frozen=True)
class Step:
    """A meta-step of one task.

    Attributes:
        passes: over the support set.
        images: of the support set that each of those reads; None: all.
        queries: passes over the query set.
        differentiates_queries: whether these have a backward.
        second: 1 where the inner gradients are differentiated, else 0.
        adapted: layers whose weight the inner loop moves.
        differentiates_support: whether the meta-gradient runs through what is computed once of the support set.
        repeats: whether layers that all passes have in common are computed in each all the same, as the plain programs
            do where these are not the whole backbone.
    """

    passes: tuple[Pass, ...]
    images: int | None
    queries: int
    differentiates_queries: bool
    second: int
    adapted: Names
    differentiates_support: bool
    repeats: bool

    def once(self, network: Network) -> Names:
        """Layers whose output, before what acts behind it, is the same in all passes over the support set."""
        changed = frozenset[str]().union(*(each.weights for each in self.passes))
        acting = changed.union(*(each.points for each in self.passes))
        found = frozenset(layer.name for layer in network if layer.name not in changed and not layer.below & acting)
        backbone = {layer.name for layer in network} - {HEAD}
        return frozenset() if self.repeats and not backbone <= found - acting else found


def passes_of(config: Config, iteration: int | None, dense: bool) -> Step:
    """The meta-step of ``config`` in an iteration, counted from 0, or after all phases.

    ``dense``: as autograd of the plain composition takes it.
    """
    algorithm = build_algorithm(config, build_backbone(config.model))
    phase = algorithm.phase(iteration)
    second = int(phase.order == 2 and config.inner.steps > 0)
    adapted, normed = _layers_of(algorithm, "weight"), _layers_of(algorithm, "norm.weight", "norm.bias", "bias")
    steps = Pass("support passes", config.inner.steps, second, adapted, normed)
    rows = ROWS.get(config.inner.algorithm, lambda algorithm, steps, dense: (steps,))
    return Step(
        rows(algorithm, steps, dense),
        config.inner.minibatch(training=True) or None,
        1 + len(phase.asked_after),
        not isinstance(config.inner, ReptileConfig),  # its query set is scored for the record alone
        second,
        adapted,
        differentiates_support=bool(second) or algorithm.joint or isinstance(algorithm, Metric),
        repeats=dense,
    )


def _layers_of(algorithm: Algorithm, *parts: str) -> Names:
    """Layers of which the inner loop moves one of the parameters ``LAYER.PART``."""
    found: set[str] = set()
    for part in parts:
        names: Iterable[str] = (name for name in algorithm.adapted if name.endswith(f".{part}"))
        found |= {name.removesuffix(f".{part}") for name in names}
    return frozenset(name for name in found if not name.endswith(".norm"))


def _cxgrad(algorithm: Algorithm, steps: Pass, dense: bool) -> tuple[Pass, ...]:
    """Context passes: the gradient of the scales, which autograd takes through that of the scaled weights."""
    config = algorithm.config
    assert isinstance(config, CxGradConfig)
    scaled = frozenset(name.removesuffix(".weight") for name in algorithm.backbone.scaled)
    times = 1 if config.context_update == "task" else config.steps
    second = steps.second * (config.initial_context_order == 2)
    return Pass("context pass", times, second, scaled if dense else frozenset(), scaled), steps


def _l2f(algorithm: Algorithm, steps: Pass, dense: bool) -> tuple[Pass, ...]:
    """A pass for the means of the gradients, which is differentiated in every order or in none."""
    assert isinstance(algorithm.config, L2FConfig)
    return Pass("embedding pass", 1, int(algorithm.config.embedding_in_graph), steps.weights), steps


def _cavia(algorithm: Algorithm, steps: Pass, dense: bool) -> tuple[Pass, ...]:
    """No weight's gradient: the context acts behind some layers, or beside the features."""
    config = algorithm.config
    assert isinstance(config, CAVIAConfig)
    points = frozenset(algorithm.backbone.chosen(config.layers).values())
    points |= {CONTEXT} if config.context_at_head else frozenset()
    return (Pass(steps.phase, steps.times, steps.second, frozenset(), points),)


def _modgrad(algorithm: Algorithm, steps: Pass, dense: bool) -> tuple[Pass, ...]:
    """The last round's support loss is only told; before the first round there is a pass for the gradient itself."""
    assert isinstance(algorithm.config, ModGradConfig)
    return (steps, Pass(steps.phase, 1, 0, frozenset(), backward=False)) if dense else (steps,)


def _protomaml(algorithm: Algorithm, steps: Pass, dense: bool) -> tuple[Pass, ...]:
    """A pass for the prototypes, which the head starts from; at its best the first step's, whose features are the same.

    Where that step is differentiated, so are they with it.
    """
    steps = replace(steps, weights=steps.weights | {HEAD})
    if not dense and steps.times and steps.second:
        return (steps,)
    return Pass("prototype pass", 1, 0, frozenset(), backward=False, features=True), steps


ROWS: dict[str, Callable[[Algorithm, Pass, bool], tuple[Pass, ...]]] = {
    "cavia": _cavia,
    "cxgrad": _cxgrad,
    "l2f": _l2f,
    "modgrad": _modgrad,
    "protomaml": _protomaml,
}
