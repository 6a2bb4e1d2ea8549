"""Episodes, a batch of tasks, and EpisodeSampler, which draws them from an ImagePool."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from cxgrad_fast.config import Config, InputError
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.minibatches import draw_batches
from cxgrad_fast.printable import shown
from cxgrad_fast.schema import FLOATING, odd_kind

SPLITS = ("train", "val", "test")
BATCHES = 1  # the last number of the keys of minibatches, which classes and images do not have

# channel means and standard deviations of images in [0, 1]
_NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.5071, 0.4847, 0.4408), (0.2675, 0.2565, 0.2761)),
    "relationnet": ((0.92206,) * 3, (0.08426,) * 3),  # of its program, for all data sets
}

_LABELS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))


def check_images(name: str, value: object) -> None:
    """That ``value`` is a dense tensor of floating-point numbers.

    Raises:
        ValueError: it is not (name, expected, got).
    """
    _check_tensor(name, value, FLOATING, "be floating point, in the network's units")


def check_labels(name: str, value: object) -> None:
    """That ``value`` is a dense tensor of integers. Raises as :func:`check_images`."""
    _check_tensor(name, value, _LABELS, "hold integers")


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], what: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")
    if kind := odd_kind(value):
        raise ValueError(f"{name} must be a dense tensor that has values, got a {kind} one")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must {what}, got {value.dtype}")


@dataclass(frozen=True)
class Episodes:
    """A batch of ``T`` tasks; the images are already in the network's units.

    Attributes:
        support_x: ``[T, N*K, C, H, W]`` floating point.
        support_y: ``[T, N*K]`` integer labels in ``[0, N)``, of any width, signed or not.
        query_x: ``[T, N*Q, C, H, W]``.
        query_y: ``[T, N*Q]``.
        batches: ``[T, steps, images]`` places in the support set, what each inner step takes; for algorithms that draw
            minibatches. None: they draw them, the same for all tasks.
        ways: labels known to be below this, and places to be in the set, so that nobody has to read them; 0: nothing is
            known.

    The sets may have any number of images a class; only the tensors' shapes must agree.

    Raises:
        ValueError: no tensor, a sparse, nested, quantized or meta tensor, or one whose shape or dtype does not fit the
            others (name, expected, got).
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    batches: Tensor | None = field(default=None, kw_only=True)
    ways: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.ways, Integral) or self.ways < 0:
            raise ValueError(f"ways must be a whole number from 0 on, got {shown(self.ways)}")
        for name in ("support", "query"):
            check_images(f"{name}_x", getattr(self, f"{name}_x"))
            check_labels(f"{name}_y", getattr(self, f"{name}_y"))
        if self.support_x.ndim != 5:
            raise ValueError(f"support_x must be [T, images, C, H, W], got {list(self.support_x.shape)}")
        tasks, _, *image = self.support_x.shape
        for name in ("support", "query"):
            x, y = getattr(self, f"{name}_x"), getattr(self, f"{name}_y")
            wanted = [tasks, "images", *image]
            if x.ndim != 5 or x.shape[0] != tasks or list(x.shape[2:]) != image:
                raise ValueError(f"{name}_x must be {wanted} to fit support_x, got {list(x.shape)}")
            if list(y.shape) != list(x.shape[:2]):
                raise ValueError(f"{name}_y must be {list(x.shape[:2])} to fit {name}_x, got {list(y.shape)}")
        if self.batches is not None:
            check_labels("batches", self.batches)
            if self.batches.ndim != 3 or len(self.batches) != tasks:
                raise ValueError(f"batches must be [{tasks}, steps, images], got {list(self.batches.shape)}")

    def __len__(self) -> int:
        """The number of tasks, ``T``."""
        return self.support_x.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name, in a fixed order."""
        named = {name: getattr(self, name) for name in ("support_x", "support_y", "query_x", "query_y", "batches")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __getitem__(self, tasks: slice) -> Episodes:
        """The tasks of a slice, as views."""
        return Episodes(**{name: tensor[tasks] for name, tensor in self.tensors().items()}, ways=self.ways)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Episodes:
        """The same tasks on another device, the images in another floating-point type, the labels int64."""
        return Episodes(
            self.support_x.to(device, dtype),
            self.support_y.to(device, torch.int64),
            self.query_x.to(device, dtype),
            self.query_y.to(device, torch.int64),
            batches=None if self.batches is None else self.batches.to(device, torch.int64),
            ways=self.ways,
        )


class EpisodeSampler:
    """Draws the episodes of one split; task ``i`` depends on (seed, split, i) alone.

    Any task can therefore be drawn again, by any process, on any device, in any order, to the bit.

    Args:
        pool: the images, on the device where episodes are wanted.
        config: reads ``task``, ``model.channels``, ``data.sampler``, ``data.normalize``, ``run.seed`` and the inner
            loop's steps and minibatches.
        dtype: of the images.
        training: whether they are the tasks of meta-training, where these differ (``task.train_ways`` and so on).

    ``data.sampler = counter`` takes its numbers from the raw Philox stream keyed by (seed, split, i), which numpy
    guarantees never to change; ``released`` repeats the released program's draws (its classes and images for its
    seeds, when the files are listed in sorted order; there, training and validation share one base seed and the test
    tasks are the validation seed's).

    Raises:
        InputError: fewer classes than ways, or a class with fewer images than shots + queries (named).
    """

    def __init__(
        self, pool: ImagePool, config: Config, dtype: torch.dtype = torch.float32, *, training: bool = False
    ) -> None:
        task = config.task.of_training() if training else config.task
        ways, shots, queries = (
            f"task.train_{word}" if training and getattr(config.task, f"train_{word}") else f"task.{word}"
            for word in ("ways", "shots", "queries")
        )
        sizes = pool.class_sizes.tolist()
        if len(sizes) < task.ways:
            raise InputError(
                f"{ways} (={task.ways}) is more than the {len(sizes)} classes of {pool.source}, split '{pool.split}'"
            )
        needed = task.shots + task.queries
        for name, size in zip(pool.class_names, sizes, strict=True):
            if size < needed:
                raise InputError(
                    f"class '{name}' of {pool.source}, split '{pool.split}', has {size} images; "
                    f"{shots} + {queries} (={task.shots} + {task.queries}) needs {needed}"
                )
        self.pool, self.dtype, self._task = pool, dtype, task
        self._sizes = np.array(sizes)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)[:-1]])
        self._channels = config.model.channels
        self._seed = config.run.seed
        self._steps, self._minibatch = config.inner_steps(training), config.inner.minibatch(training)
        self._draw = self._draw_released if config.data.sampler == "released" else self._draw_counter
        device = pool.images.device
        # tensors on the device: by a number of the host CUDA multiplies with its reciprocal, which has other bits
        self._white, self._three = (torch.full((), value, dtype=dtype, device=device) for value in (255, 3))
        self._normalization: tuple[Tensor, Tensor] | None = None
        if config.data.normalize != "none":
            mean, std = _NORMALIZATION[config.data.normalize]
            self._normalization = (
                torch.tensor(mean, dtype=dtype, device=device).view(3, 1, 1),
                torch.tensor(std, dtype=dtype, device=device).view(3, 1, 1),
            )

    def indices(self, start: int, count: int) -> np.ndarray:
        """Rows of the pool for tasks ``start .. start + count - 1``: ``[count, N, K + Q]`` int64."""
        task = self._task
        rows = np.empty((count, task.ways, task.shots + task.queries), dtype=np.int64)
        for i in range(count):
            rows[i] = self._draw(start + i)
        return rows

    def sample(self, start: int, count: int) -> Episodes:
        """Tasks ``start .. start + count - 1``; label = position of the class in the draw; images class by class."""
        task, device = self._task, self.pool.images.device
        rows = torch.from_numpy(self.indices(start, count)).to(device)
        sets = []
        for part in (rows[:, :, : task.shots], rows[:, :, task.shots :]):
            labels = torch.arange(task.ways, device=device).repeat_interleave(part.shape[2]).expand(count, -1)
            sets += [self._gather(part.flatten(1)), labels.contiguous()]
        return Episodes(*sets, batches=self._batches(start, count), ways=task.ways)

    def _batches(self, start: int, count: int) -> Tensor | None:
        """What the inner steps take from the support sets, for algorithms that draw minibatches."""
        if self._minibatch is None:
            return None
        images, split = self._task.ways * self._task.shots, SPLITS.index(self.pool.split)
        drawn = [
            draw_batches((self._seed, split, start + i, BATCHES), images, self._steps, self._minibatch)
            for i in range(count)
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.pool.images.device)

    def _gather(self, rows: Tensor) -> Tensor:
        """``[T, S]`` pool rows -> ``[T, S, C, H, W]`` images in the network's units: the same bits on every device."""
        images = self.pool.images[rows].permute(0, 1, 4, 2, 3).to(self.dtype, memory_format=torch.contiguous_format)
        images = images.div_(self._white)
        if self._normalization is not None:
            mean, std = self._normalization
            images = images.sub_(mean).div_(std)
        if self._channels == 1:
            red, green, blue = images.split(1, 2)
            images = (red + green).add_(blue).div_(self._three)
        return images

    def _draw_counter(self, index: int) -> np.ndarray:
        task = self._task
        key = [self._seed, SPLITS.index(self.pool.split), index]
        stream = np.random.Philox(np.random.SeedSequence(key))
        classes = np.argsort(stream.random_raw(len(self._sizes)), kind="stable")[: task.ways]
        picks = [
            self._first[c] + np.argsort(stream.random_raw(self._sizes[c]), kind="stable")[: task.shots + task.queries]
            for c in classes
        ]
        return np.stack(picks)

    def _draw_released(self, index: int) -> np.ndarray:
        task = self._task
        base = np.random.RandomState(self._seed).randint(1, 999999)  # train_seed = val_seed = 0 in its settings
        rng = np.random.RandomState(base + index)
        classes = rng.choice(len(self._sizes), size=task.ways, replace=False)
        rng.shuffle(classes)
        rng.randint(0, 4, size=task.ways)  # rotations, drawn there and never used
        picks = [
            self._first[c] + rng.choice(self._sizes[c], size=task.shots + task.queries, replace=False) for c in classes
        ]
        return np.stack(picks)


class Upcoming:
    """Tasks of a sampler that are drawn and gathered ahead: on a CUDA device beside the work that is under way there.

    Args:
        sampler: whose tasks.
    """

    def __init__(self, sampler: EpisodeSampler) -> None:
        self._sampler = sampler
        device = sampler.pool.images.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: tuple[int, int, Episodes] | None = None

    def prepare(self, start: int, count: int) -> None:
        """Draw tasks ``start .. start + count - 1`` now, for the next :meth:`take`."""
        with torch.cuda.stream(self._stream):  # of no effect without one
            self._ready = (start, count, self._sampler.sample(start, count))

    def take(self, start: int, count: int) -> Episodes:
        """What :meth:`EpisodeSampler.sample` gives, prepared or not."""
        ready, self._ready = self._ready, None
        if ready is None or ready[:2] != (start, count):
            return self._sampler.sample(start, count)
        episodes = ready[2]
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            for tensor in episodes.tensors().values():
                tensor.record_stream(current)  # its memory is not the other stream's to take back
        return episodes
