"""The groups of settings that every algorithm shares."""

from __future__ import annotations

from dataclasses import dataclass, field

from cxgrad_fast.config.fields import above, at_least, choice, like


@dataclass(frozen=True)
class TaskConfig:
    """The shape of one task (episode)."""

    ways: int = field(default=5, metadata=at_least(2, 100_000))
    shots: int = field(default=1, metadata=at_least(1, 100_000))
    queries: int = field(default=15, metadata=at_least(1, 100_000))  # per class
    # of the tasks of meta-training, where they differ from those of validation and test; 0: the same
    train_ways: int = field(default=0, metadata=at_least(0, 100_000))
    train_shots: int = field(default=0, metadata=at_least(0, 100_000))
    train_queries: int = field(default=0, metadata=at_least(0, 100_000))

    def of_training(self) -> TaskConfig:
        """The tasks of meta-training."""
        return TaskConfig(
            self.train_ways or self.ways, self.train_shots or self.shots, self.train_queries or self.queries
        )


@dataclass(frozen=True)
class ModelConfig:
    """The network that is meta-learned."""

    backbone: str = field(default="conv4", metadata=choice("conv4", "resnet12"))
    # conv4: of each layer; resnet12: of the first block, doubled by each of the three that follow
    filters: int = field(default=48, metadata=at_least(1, 100_000))
    block_filters: tuple[int, ...] = ()  # resnet12: of each of the four blocks, instead of the doubled ones
    norm: str = field(default="batch", metadata=choice("batch", "group", "layer"))
    norm_groups: int = field(default=8, metadata=at_least(1))  # of norm = group
    norm_eps: float = field(default=1e-5, metadata=at_least(1e-30))
    slope: float = field(default=0.01, metadata=at_least(0))  # of LeakyReLU; 0 is ReLU
    image_size: int = field(default=84, metadata=at_least(1, 10_000))
    channels: int = field(default=3, metadata=choice(1, 3))
    conv_bias: bool = False  # of every convolution; the norm behind it removes it from all outputs
    pool_ceil: bool = False  # conv4: the pools keep an odd last row and column (the released Reptile)
    channels_last: bool = False  # conv4: features are flattened (H, W, C), not (C, H, W) (the released Reptile)
    pool_last: bool = True  # resnet12: pool after the fourth block too (paper) or not (released ALFA program)
    pool_padding: tuple[int, ...] = (0, 0, 0, 0)  # resnet12: of each block's pool; the released program has 0,0,1,1

    @property
    def filters_by_block(self) -> tuple[int, ...]:
        """Of each of the backbone's four blocks."""
        if self.backbone == "conv4":
            return (self.filters,) * 4
        return self.block_filters or tuple(self.filters << block for block in range(4))

    def sizes_by_block(self) -> tuple[int, ...]:
        """Rows, and as many columns, of the images behind each of the backbone's four blocks."""
        sizes = [self.image_size]
        for block in range(4):
            if self.backbone == "conv4":
                sizes.append((sizes[-1] + self.pool_ceil) // 2)
            elif block < 3 or self.pool_last:
                sizes.append((sizes[-1] + 2 * self.pool_padding[block]) // 2)
            else:
                sizes.append(sizes[-1])
        return tuple(sizes[1:])


@dataclass(frozen=True)
class OuterConfig:
    """The outer loop (meta-update)."""

    # sgd: learning_rate times the meta-gradient, without momentum
    optimizer: str = field(default="adam", metadata=choice("adam", "sgd"))
    learning_rate: float = field(default=1e-3, metadata=above(0))
    meta_batch: int = field(default=4, metadata=at_least(1))
    iterations: int = field(default=50_000, metadata=at_least(1))
    validate_every: int = field(default=500, metadata=at_least(1))
    # of the query losses over the tasks: the paper's Eq. 3 sums, the released program averages
    reduction: str = field(default="mean", metadata=choice("mean", "sum"))
    # of the learning rate: as it is; times schedule_factor every schedule_every iterations; or from learning_rate at
    # the first iteration to final_learning_rate at the last, on a line or half a cosine
    schedule: str = field(default="constant", metadata=choice("constant", "step", "linear", "cosine"))
    schedule_every: int = field(default=5000, metadata=at_least(1))
    schedule_factor: float = field(default=0.5, metadata=at_least(0))
    final_learning_rate: float = field(default=0.0, metadata=at_least(0))
    clip_value: float = field(default=0.0, metadata=at_least(0))  # of every element of the meta-gradient; 0: none
    clip_norm: float = field(default=0.0, metadata=at_least(0))  # of the whole meta-gradient; 0: none
    # what is clipped: everything; the backbone and the head without the algorithm's own parameters; or the backbone and
    # all else, each by itself
    clip: str = field(default="all", metadata=choice("all", "network", "apart"))
    restart_every: int = field(default=0, metadata=at_least(0))  # iterations until the optimizer starts anew; 0: never


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how episodes are drawn from them."""

    source: str = field(default="glyphs", metadata=choice("glyphs", "digits", "folder"))
    root: str = ""  # folder: root/{train,val,test}/<class>/*; glyphs: a folder of fonts instead of matplotlib's
    variant: str = field(default="default", metadata=choice("default", "hard"))  # of glyphs
    cross_domain: str = field(default="", metadata=choice("", "digits", "glyphs"))  # also tested on, at the end
    normalize: str = field(default="none", metadata=choice("none", "imagenet", "cifar", "relationnet"))
    # counter: our own stable stream; released: the classes and images that the released program would draw
    sampler: str = field(default="counter", metadata=choice("counter", "released"))


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation and test."""

    # of the BatchNorm layers in the query pass: its own batch (as released), the support set's, or training's average
    statistics: str = field(default="transductive", metadata=choice("transductive", "support", "running"))
    steps: int = field(default=0, metadata=at_least(0, 100_000))  # of the inner loop; 0: as many as in training
    ensemble: int = field(default=5, metadata=at_least(1))  # best checkpoints kept and averaged
    validation_tasks: int = field(default=100, metadata=at_least(1))
    test_tasks: int = field(default=600, metadata=at_least(1))
    tasks_per_batch: int = field(default=4, metadata=at_least(1))  # adapted at once; no effect on the numbers


@dataclass(frozen=True)
class RunConfig:
    """How a run is executed."""

    device: str = field(default="auto", metadata=like(r"auto|cpu|cuda(:[0-9]{1,4})?", "auto, cpu or cuda[:index]"))
    precision: str = field(default="float32", metadata=choice("float64", "float32", "tf32", "bfloat16"))
    backend: str = field(default="auto", metadata=choice("auto", "reference", "cpp", "triton"))
    compile: bool = False
    tasks_per_chunk: int = field(default=0, metadata=at_least(0))  # of the meta-batch; 0: all at once
    recompute: bool = False  # inner steps in the backward pass: less memory, one more forward pass
    checkpoint_every: int = field(default=100, metadata=at_least(1))  # iterations
    # of the initial weights and of all episodes; numpy's RandomState, which gets 104 more, takes no larger one
    seed: int = field(default=0, metadata=at_least(0, 2**32 - 1 - 104))
