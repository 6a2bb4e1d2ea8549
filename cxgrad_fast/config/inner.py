"""The settings of the algorithms: one class each, and one row of :data:`ALGORITHMS`."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cxgrad_fast.config.fields import above, at_least, choice, constant, settings_of
from cxgrad_fast.config.groups import ModelConfig


@dataclass(frozen=True)
class InnerConfig:
    """The inner loop (adaptation): what every algorithm has."""

    any_ways: ClassVar[bool] = False  # whether no parameter has a row a class: one network for any number of classes
    steps_have_parameters: ClassVar[bool] = False  # of their own: no more steps in evaluation than in training

    algorithm: str
    steps: int = field(default=5, metadata=at_least(0, 100_000))
    order: int = field(default=2, metadata=choice(1, 2))  # of the meta-gradient
    learning_rate: float = field(default=0.01, metadata=at_least(0))  # alpha
    first_order_iterations: int = field(default=0, metadata=at_least(0))  # of the outer loop: order 1 in the first ones

    def minibatch(self, training: bool) -> int | None:
        """How many images a step takes from the support set; 0: as many as it has; None: the set as it is."""
        return None

    def least_size(self, model: ModelConfig) -> int:
        """The least ``model.image_size``, beside what the backbone itself asks for."""
        return 1


@dataclass(frozen=True)
class MAMLConfig(InnerConfig):
    """MAML (Finn et al. 2017)."""


@dataclass(frozen=True)
class FOMAMLConfig(InnerConfig):
    """First-order MAML (Finn et al. 2017, section 5.2): the inner gradients are constants."""

    order: int = field(default=1, metadata=choice(1))


@dataclass(frozen=True)
class CxGradConfig(InnerConfig):
    """CxGrad (Lee, Lee, Song 2022)."""

    context_dim: int = field(default=100, metadata=at_least(1, 100_000))  # of nu, and of the scaler's hidden layer
    context_learning_rate: float = field(default=1.0, metadata=at_least(0))  # beta
    # task: nu accumulates over the steps; step: nu starts from zero, with its own first pass, in every step
    context_update: str = field(default="task", metadata=choice("task", "step"))
    # of the gradient that moves nu away from zero: 1 is what the released program does, 2 how one may read the paper
    initial_context_order: int = field(default=1, metadata=choice(1, 2))
    # exact: unit-norm weight and epsilon / gamma^2 (docs/math.md); scaled: the weight gamma * w / |w| itself
    form: str = field(default="exact", metadata=choice("exact", "scaled"))


@dataclass(frozen=True)
class ALFAConfig(InnerConfig):
    """ALFA (Baik et al. 2020); ``learning_rate`` and ``weight_decay`` are where the meta-learned ones start."""

    steps_have_parameters: ClassVar[bool] = True

    weight_decay: float = field(default=0.0005, metadata=at_least(0))  # of the released program: times learning_rate
    random_init: bool = False  # the network stays as it was drawn: only the rule is meta-learned


@dataclass(frozen=True)
class ANILConfig(InnerConfig):
    """ANIL (Raghu et al. 2020)."""

    joint: bool = False  # support and query images are normalised together, as in learn2learn


@dataclass(frozen=True)
class BOILConfig(InnerConfig):
    """BOIL (Oh et al. 2021); the released program's values."""

    steps: int = field(default=1, metadata=at_least(0, 100_000))
    learning_rate: float = field(default=0.5, metadata=at_least(0))  # of the body
    head_learning_rate: float = field(default=0.0, metadata=at_least(0))


@dataclass(frozen=True)
class CAVIAConfig(InnerConfig):
    """CAVIA (Zintgraf et al. 2019); the released program's values."""

    steps: int = field(default=2, metadata=at_least(0, 100_000))
    learning_rate: float = field(default=1.0, metadata=at_least(0))  # of the context parameters
    context_dim: int = field(default=100, metadata=at_least(1, 100_000))
    layers: tuple[int, ...] = (2,)  # convolutions that the context modulates, counted from 0
    hidden: bool = False  # two linear layers with a ReLU between them from the context to a layer, not one
    context_at_head: bool = False  # the context joins the features


@dataclass(frozen=True)
class L2FConfig(InnerConfig):
    """L2F (Baik et al. 2020)."""

    embedding_in_graph: bool = False  # the attenuator's input is differentiated, as in the ALFA program's copy


@dataclass(frozen=True)
class MAMLPPConfig(InnerConfig):
    """MAML++ (Antoniou et al. 2019); ``learning_rate`` is where the meta-learned rates of every step start."""

    steps_have_parameters: ClassVar[bool] = True

    learning_rate: float = field(default=0.1, metadata=at_least(0))
    # iterations of the outer loop in which the query loss of every step counts, less and less before the last
    multi_step_iterations: int = field(default=7500, metadata=at_least(0))
    multi_step_epoch: int = field(default=500, metadata=at_least(1))  # iterations after which the weights change


@dataclass(frozen=True)
class MetaSGDConfig(InnerConfig):
    """Meta-SGD (Li et al. 2017); ``learning_rate`` is where the meta-learned rates start."""

    steps: int = field(default=1, metadata=at_least(0, 100_000))


@dataclass(frozen=True)
class ModGradConfig(InnerConfig):
    """ModGrad (Simon et al. 2020); the released program's values."""

    steps: int = field(default=2, metadata=at_least(0, 100_000))  # rounds, twice the program's inner_step
    learning_rate: float = field(default=0.1, metadata=at_least(0))
    context_dim: int = field(default=300, metadata=at_least(1, 100_000))
    mixtures: int = field(default=5, metadata=at_least(1, 1000))
    layers: tuple[int, ...] = (-2, -1)  # convolutions that are adapted, counted from 0, or from -1 backwards


@dataclass(frozen=True)
class ProtoMAMLConfig(InnerConfig):
    """ProtoMAML (Triantafillou et al. 2020)."""

    any_ways: ClassVar[bool] = True


@dataclass(frozen=True)
class MetricConfig(InnerConfig):
    """What compares features, without an inner loop: the words of one are not its own."""

    any_ways: ClassVar[bool] = True

    steps: int = constant(0)
    order: int = constant(1)
    learning_rate: float = constant(0.0)
    first_order_iterations: int = constant(0)
    joint: bool = True  # the features of support and query are computed in one pass, normalised together
    # of the running statistics: the share of them that a pass in meta-training replaces
    statistics_momentum: float = field(default=0.1, metadata=above(0, 1))


@dataclass(frozen=True)
class ProtoNetConfig(MetricConfig):
    """ProtoNet (Snell et al. 2017); the authors' program's values."""

    # the scores: minus the squared Euclidean distance, minus the Euclidean one, or the cosine
    distance: str = field(default="squared", metadata=choice("squared", "euclidean", "cosine"))


@dataclass(frozen=True)
class MatchingNetConfig(MetricConfig):
    """MatchingNet (Vinyals et al. 2016); CloserLookFewShot's values, for its authors released no program."""

    full_context: bool = True  # the features see the support set, by LSTMs over it
    # softmax of 100 relu(cosine), or of the query's products with supports of unit length
    attention: str = field(default="cosine", metadata=choice("cosine", "support_cosine"))


@dataclass(frozen=True)
class RelationNetConfig(MetricConfig):
    """RelationNet (Sung et al. 2018); the authors' program's values."""

    joint: bool = False
    statistics_momentum: float = field(default=1.0, metadata=above(0, 1))  # of the encoder's norms
    relation_momentum: float = field(default=1.0, metadata=above(0, 1))  # of the relation module's
    shots_rule: str = field(default="sum", metadata=choice("sum", "mean"))  # the class's map, of its shots' maps
    relation_padding: int = field(default=0, metadata=choice(0, 1))  # of the relation module's convolutions
    relation_dim: int = field(default=8, metadata=at_least(1, 100_000))  # of its hidden layer
    # mse: squared error of the scores' sigmoids; softmax: cross-entropy of the scores
    loss: str = field(default="mse", metadata=choice("mse", "softmax"))

    def relation_size(self, model: ModelConfig) -> int:
        """The side of what the relation module's convolutions leave of the images; below 1: nothing."""

        def pooled(size: int) -> int:
            return -(-size // 2) if model.pool_ceil else size // 2

        size = pooled(pooled(model.image_size - 2) - 2)  # the encoder: two of four convolutions do not pad, and pool
        for _ in range(2):
            size = pooled(size - 2 * (1 - self.relation_padding))
        return size

    def least_size(self, model: ModelConfig) -> int:
        sizes = (dataclasses.replace(model, image_size=size) for size in itertools.count(1))
        return next(each.image_size for each in sizes if self.relation_size(each) >= 1)


@dataclass(frozen=True)
class ReptileConfig(InnerConfig):
    """Reptile (Nichol, Achiam, Schulman 2018); the released program's values."""

    steps: int = field(default=8, metadata=at_least(0, 100_000))
    order: int = field(default=1, metadata=choice(1))  # no gradient goes through the inner loop
    learning_rate: float = field(default=1e-3, metadata=at_least(0))
    first_order_iterations: int = field(default=0, metadata=choice(0))
    # images of a step, from the shuffled support set; 0: as many as it has. In evaluation 0: as in training
    batch: int = field(default=10, metadata=at_least(0, 100_000))
    evaluation_batch: int = field(default=0, metadata=at_least(0, 100_000))
    reduction: str = field(default="sum", metadata=choice("sum", "mean"))  # of the images' losses in a step
    optimizer: str = field(default="adam", metadata=choice("adam", "sgd"))  # Adam has no first moment (beta1 = 0)
    # Adam's second moments and number of steps: they go on from task to task, or start anew with each
    moments: str = field(default="carried", metadata=choice("carried", "new"))
    beta2: float = field(default=0.999, metadata=at_least(0.001, 1))
    adam_eps: float = field(default=1e-8, metadata=at_least(1e-30))

    def minibatch(self, training: bool) -> int:
        return self.batch if training else self.evaluation_batch or self.batch


ALGORITHMS: dict[str, type[InnerConfig]] = {
    "alfa": ALFAConfig,
    "anil": ANILConfig,
    "boil": BOILConfig,
    "cavia": CAVIAConfig,
    "cxgrad": CxGradConfig,
    "fomaml": FOMAMLConfig,
    "l2f": L2FConfig,
    "maml": MAMLConfig,
    "mamlpp": MAMLPPConfig,
    "matchingnet": MatchingNetConfig,
    "metasgd": MetaSGDConfig,
    "modgrad": ModGradConfig,
    "protomaml": ProtoMAMLConfig,
    "protonet": ProtoNetConfig,
    "relationnet": RelationNetConfig,
    "reptile": ReptileConfig,
}


def owners(word: str) -> list[str]:
    """The algorithms that have a setting ``inner.<word>``."""
    return [name for name, kind in ALGORITHMS.items() if word in {spec.name for spec in settings_of(kind)}]


def carried(inner: InnerConfig, algorithm: str) -> InnerConfig:
    """The settings of another algorithm: its defaults, and what was changed of those words that both have."""
    new = ALGORITHMS[algorithm](algorithm)
    kept: dict[str, Any] = {}
    for spec in settings_of(new):
        value = getattr(inner, spec.name, spec.default)
        changed = spec.name != "algorithm" and value != getattr(type(inner)(inner.algorithm), spec.name, spec.default)
        if changed and value in spec.metadata.get("choices", (value,)):
            kept[spec.name] = value
    return dataclasses.replace(new, **kept)
