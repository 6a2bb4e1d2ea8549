"""Learner: the public face of algorithms and engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxgrad_fast.algorithms import Phase, State, build_algorithm
from cxgrad_fast.config import Config, InputError
from cxgrad_fast.engine import (
    ALONE,
    Adaptation,
    CapturedStep,
    CudaGraphs,
    Engine,
    Gradients,
    Graphs,
    MemoryPlan,
    MetaLoss,
    NonFiniteError,
    NonFiniteLossError,
    Pending,
    Ranks,
    RunningStatistics,
    SharedGradients,
    StaticGradients,
    check_finite,
    is_finite,
    memory,
    predictions_of,
    take_over,
)
from cxgrad_fast.engine.updates import HYPERPARAMETERS, build_optimizer, clipped, learning_rate, restart
from cxgrad_fast.episodes import SPLITS, Episodes, check_images, check_labels
from cxgrad_fast.kernels import backends, use_backend, use_precision
from cxgrad_fast.learner_state import arrays_of, check_parameters, check_state, names_in, program_of
from cxgrad_fast.minibatches import draw_batches
from cxgrad_fast.models import OWN, LayerStatistics, build_backbone
from cxgrad_fast.placement import device_of, dtype_of
from cxgrad_fast.printable import shown

_ALL_TASKS = (len(SPLITS), 0, 1)  # of the key of minibatches that nobody drew: no task of any split

__all__ = ["Adapted", "Learner", "NonFiniteError", "NonFiniteLossError", "Pending"]


class Learner:
    """Meta-parameters, the meta-step that trains them, and adaptation with them.

    All of it works under ``torch.no_grad()`` and ``torch.inference_mode()`` too: the inner loop has its own gradients.

    Args:
        config: a Config, from :func:`cxgrad_fast.preset`.
        ranks: the processes that train it together, from :func:`cxgrad_fast.engine.join_ranks`.

    Attributes:
        meta_parameters: name -> leaf tensor: the backbone (``features.0.weight``, ``features.0.norm.weight``,
            ``head.weight``, ...) and, for CxGrad, the network of the scaling factors (``scaler.0.weight``, ...).
        optimizer: Adam or SGD over those of them that are trained, its state included in :meth:`state_dict`.

    Raises:
        InputError: a device, precision, backend or mode that this version or machine does not have.
    """

    @torch.inference_mode(False)  # what an inference mode makes can never be trained, nor adapted
    def __init__(self, config: Config, ranks: Ranks = ALONE) -> None:
        self.config = config
        self._ranks = ranks
        self.algorithm = build_algorithm(config, build_backbone(config.model))
        if self.algorithm.sequential and ranks.size > 1:
            raise InputError(
                f"setting 'inner.moments' (=carried): {config.inner.algorithm}'s tasks follow each other, {ranks.size} "
                "ranks cannot share them: use inner.moments = new, or one process"
            )
        self.device = ranks.place(device_of(config))
        self.dtype = dtype_of(config, self.device)
        with use_backend(config.run.backend):
            pass  # an impossible choice is an error now, not in the first step
        if self.device.type == "cuda":
            # float32 means float32: by default the framework rounds convolution operands to TF32
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        self.engine = Engine(config, self.algorithm)
        # for seed 0 the released program's initial weights
        generator = torch.Generator().manual_seed(int(np.random.RandomState(104 + config.run.seed).randint(0, 999999)))
        self.meta_parameters = {
            name: tensor.to(self.device, self.dtype).requires_grad_()
            for name, tensor in self.algorithm.initial(generator).items()
        }
        declared = self.algorithm.declared
        trained = [tensor for name, tensor in self.meta_parameters.items() if declared[name].trained]
        self.optimizer = build_optimizer(config.outer, trained, self.device)
        self._statistics = RunningStatistics(self.device, self.algorithm.running_share)
        self._gradients: Gradients = self._loss_and_gradients
        self._sharing = SharedGradients(config, ranks)
        self._captured: CapturedStep | None = None
        self._predictions = predictions_of(config, self.engine, self.device)
        self._prepare()

    @contextmanager
    def _operators(self) -> Iterator[None]:
        """The backend and the precision of products that the config names; no inference mode, gradients as they are."""
        run = self.config.run
        is_recording = torch.is_grad_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(is_recording),
            use_backend(run.backend),
            use_precision("float32" if run.precision == "float64" else run.precision),
        ):
            yield

    def _prepare(self) -> None:
        """What ``run.compile`` asks for; again where tensors that a graph has the addresses of were replaced."""
        if not self.config.run.compile:
            return
        if self.device.type == "cuda":
            self._captured = self._captured_step(CudaGraphs(self.device))
        elif self._gradients == self._loss_and_gradients:
            self._gradients = StaticGradients(self._loss_and_gradients)

    def _captured_step(self, graphs: Graphs) -> CapturedStep:
        gradients = partial(self._whole_gradients, self._loss_and_gradients)
        patience = self._ranks.timeout if self._ranks.size > 1 else None
        return CapturedStep(
            self.meta_parameters, self.optimizer, gradients, self._statistics, graphs, patience=patience
        )

    @property
    def running_statistics(self) -> dict[str, LayerStatistics]:
        """Mean and variance ``[C]`` of each BatchNorm's input, averaged, by convolution; for ``statistics = running``.

        Of the query passes, exponentially, with momentum 0.01 once there are a hundred meta-steps; of algorithms
        without an inner loop of all passes, with the momentum of their settings.
        """
        return self._statistics.values

    @property
    def rounds_in_software(self) -> bool:
        """Whether ``run.precision`` only rounds the factors of float32's products here: no faster than float32."""
        return backends.rounds_in_software(self.config.run.precision, self.device)

    @torch.inference_mode(False)
    def plan_memory(self, tasks: int) -> MemoryPlan:
        """Predict the peak memory of a meta-step of so many tasks; where they do not fit at once, choose chunks.

        Takes a few seconds: the step is gone through on tensors without values. ``run.tasks_per_chunk``, where it is
        not 0, is kept. Chunks give the same gradients but for rounding. Of several ranks each plans for its part, and
        those on one CPU share its memory.
        """
        own = self._ranks.shard(tasks)
        tasks = max(1, own.stop - own.start)
        neighbours = 1 if self.device.type == "cuda" else self._ranks.local_size
        found = memory.plan(
            lambda count: memory.peak_of(lambda: self._rehearse(count)),
            tasks,
            memory.available(self.device) // neighbours,
            1 if self.algorithm.sequential else self.config.run.tasks_per_chunk,
        )
        if found.chunk < tasks:
            self.engine.tasks_per_chunk = found.chunk
        return found

    def _rehearse(self, tasks: int) -> None:
        """The work of a meta-step, on the host's operators: those of a device keep the same tensors."""
        task, model = self.config.task.of_training(), self.config.model

        def part(per_class: int) -> tuple[Tensor, Tensor]:
            shape = (tasks, task.ways * per_class)
            x = torch.empty(*shape, model.channels, model.image_size, model.image_size, dtype=self.dtype)
            return x, torch.zeros(shape, dtype=torch.int64)

        episodes = self._with_batches(Episodes(*part(task.shots), *part(task.queries), ways=task.ways), training=True)
        parameters = [torch.empty(tensor.shape, dtype=self.dtype) for tensor in self.meta_parameters.values()]
        backend = self.config.run.backend
        with use_backend(backend if backend == "reference" else "auto"):
            engine = Engine(self.config.override({"run.tasks_per_chunk": 0}), self.algorithm)
            leaves = [tensor.requires_grad_() for tensor in parameters]
            phases = {phase.kind: phase for phase in map(self.algorithm.phase, (None, 0))}  # the dearest counts
            for phase in phases.values():
                weights = None if phase.weights is None else torch.empty(phase.weights.shape, dtype=self.dtype)
                named = dict(zip(self.meta_parameters, leaves, strict=True))
                out = engine.meta_loss(named, episodes, replace(phase, weights=weights))
                torch.autograd.grad(out.loss, leaves, allow_unused=True, materialize_grads=True)
                del out

    def meta_loss(self, episodes: Episodes, iteration: int | None = None) -> MetaLoss:
        """Loss, logits and trace of a batch of tasks; ``loss`` is differentiable in ``meta_parameters``.

        Args:
            episodes: ``T`` tasks of ``config.task.of_training().ways`` classes, images ``[C, H, W]`` as the config
                says. Moved to the learner's device and precision.
            iteration: as for :meth:`meta_step`.

        Raises:
            ValueError: wrong shapes, no task, labels out of range (name, expected, got).
        """
        with self._operators():
            episodes = self._checked(episodes, training=True)
            return self.engine.meta_loss(self.meta_parameters, episodes, self._phase(iteration))

    def meta_step(self, episodes: Episodes, iteration: int | None = None) -> MetaLoss:
        """One step of meta-training: meta-loss, its gradients, the optimizer's update. Returns the meta-loss before it.

        With several ranks ``episodes`` are this rank's, ``ranks.shard(config.outer.meta_batch)``; all call it, and get
        the meta-loss of the whole meta-batch.

        Args:
            episodes: the tasks.
            iteration: how many meta-steps were done before; what schedules and phases of the algorithm go by. None:
                the learning rate of the config, and the algorithm as it is after all phases.

        Raises:
            NonFiniteLossError: the loss or a gradient is not finite; parameters and optimizer stay as they were.
            RankLostError: another rank did not take part; the same.
            ValueError: as :meth:`meta_loss`.
        """
        return self.start_step(episodes, iteration).result()

    @property
    def steps_ahead(self) -> int:
        """How many steps it pays to have started and not finished: 2 where a device replays them by itself."""
        return 1 if self._captured is None else 2

    def start_step(self, episodes: Episodes, iteration: int | None = None) -> Pending:
        """As :meth:`meta_step`, without waiting for its end where the step is captured (``run.compile`` on CUDA).

        Raises:
            NonFiniteLossError, RankLostError: as :meth:`meta_step`, here or from the result.
            ValueError: as :meth:`meta_loss`.
        """
        with self._operators(), torch.enable_grad():
            return self._start_step(episodes, iteration)

    def _start_step(self, episodes: Episodes, iteration: int | None) -> Pending:
        has_work = self._sharing.has_work(episodes)
        episodes = self._checked(episodes, training=True) if has_work else episodes.to(self.device, self.dtype)
        phase, rate = self._phase(iteration), learning_rate(self.config.outer, iteration)
        if iteration and self.config.outer.restart_every and iteration % self.config.outer.restart_every == 0:
            restart(self.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = float(np.float32(rate)) if group["fused"] else rate
        if self._captured is not None:
            if (pending := self._captured.start(episodes, phase)) is not None:
                return pending
            self._captured = None
        parameters = list(self.meta_parameters.values())
        out, gradients = self._whole_gradients(self._gradients, parameters, episodes, phase)
        if not is_finite(out, gradients):
            raise NonFiniteLossError(bool(out.loss.isfinite()))

        def update() -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            for parameter in parameters:  # those that the optimizer does not have too
                parameter.grad = None
            take_over(out.carried, self.meta_parameters)
            self._statistics.add(out.statistics)

        return Pending(out, update)

    def _phase(self, iteration: int | None) -> Phase:
        """What depends on the iteration, on the learner's device and in its precision."""
        phase = self.algorithm.phase(iteration)
        return phase if phase.weights is None else replace(phase, weights=phase.weights.to(self.device, self.dtype))

    def _whole_gradients(
        self, gradients: Gradients, parameters: Sequence[Tensor], episodes: Episodes, phase: Phase
    ) -> tuple[MetaLoss, Sequence[Tensor]]:
        """Of all ranks' tasks, clipped as the config says."""
        out, found = self._sharing(gradients, parameters, episodes, phase)
        outer = self.config.outer
        if not outer.clip_value and not outer.clip_norm:
            return out, found
        for part in self._clipped_parts():
            found = clipped(outer, found, part)
        return out, found

    def _clipped_parts(self) -> list[list[bool]]:
        """Which parameters have their gradients clipped together, once or for each of the parts."""
        declared, clip = self.algorithm.declared, self.config.outer.clip
        if clip == "apart":
            backbone = self.algorithm.backbone.parameters
            return [
                [each.trained and (name in backbone) == is_backbone for name, each in declared.items()]
                for is_backbone in (True, False)
            ]
        return [[each.trained and (clip == "all" or each.role != OWN) for each in declared.values()]]

    def _loss_and_gradients(
        self, parameters: Sequence[Tensor], episodes: Episodes, phase: Phase
    ) -> tuple[MetaLoss, Sequence[Tensor]]:
        out = self.engine.meta_loss(dict(zip(self.meta_parameters, parameters, strict=True)), episodes, phase)
        return out.detach(), torch.autograd.grad(out.loss, parameters, allow_unused=True, materialize_grads=True)

    def check_finite(self, what: str = "this learner") -> None:
        """That all meta-parameters are finite.

        Raises:
            NonFiniteError: one is not; the message names it, and ``what`` it is a parameter of.
        """
        check_finite(self.meta_parameters, what)

    def predict(self, episodes: Episodes, statistics: str | None = None) -> Tensor:
        """Query logits ``[T, N*Q, N]`` after adaptation to each support set, without a graph.

        Args:
            episodes: as for :meth:`meta_loss`, of ``config.task.ways`` classes.
            statistics: of BatchNorm in the query pass: ``transductive`` (the images of a task together, as in
                meta-training), ``support`` or ``running``; None takes ``config.evaluation.statistics``.

        Raises:
            InputError: ``running`` without any meta-training, or statistics for a norm that has none.
            NonFiniteError: a meta-parameter is not finite.
            ValueError: as :meth:`meta_loss`.
        """
        self.check_finite()
        kind = self._statistics_kind(statistics)
        with self._operators():
            episodes = self._checked(episodes)
            return self._predictions(self.meta_parameters, episodes, kind, self.running_statistics)

    def adapt(
        self,
        support_x: Tensor,
        support_y: Tensor,
        statistics: str | None = None,
        batches: Tensor | None = None,
    ) -> Adapted:
        """Adapt to one task, or to several at once; call the result on query images.

        Args:
            support_x: ``[S, C, H, W]``, or ``[T, S, C, H, W]`` for several tasks; the units of meta-training (for the
                presets: [0, 1]).
            support_y: ``[S]`` or ``[T, S]``, labels in ``[0, config.task.ways)``.
            statistics: as for :meth:`predict`. With ``transductive`` all images of one call are normalised together:
                for images that come one by one, choose ``support`` or ``running``.
            batches: ``[steps, images]`` or ``[T, steps, images]``, as in :class:`Episodes`.

        Raises:
            ValueError: wrong shapes, labels out of range (name, expected, got).
            InputError, NonFiniteError: as :meth:`predict`.
        """
        self.check_finite()
        check_images("support_x", support_x)
        check_labels("support_y", support_y)
        single = support_x.ndim == 4
        if single:
            support_x, support_y = support_x[None], support_y[None]
            batches = None if batches is None else batches[None]
        kind = self._statistics_kind(statistics)
        with self._operators():
            # the checks of a batch of tasks, with the support set in the place of the query set
            episodes = self._checked(Episodes(support_x, support_y, support_x, support_y, batches=batches))
            adaptation = self.engine.adapted(
                self.meta_parameters,
                episodes.support_x,
                episodes.support_y,
                kind,
                self.running_statistics,
                episodes.batches,
            )
        return Adapted(self, adaptation, single)

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """Everything that training goes on from: tensors and plain values only (``weights_only=True`` loads it)."""
        return {
            "parameters": {name: tensor.detach().clone() for name, tensor in self.meta_parameters.items()},
            "statistics": {name: torch.stack(pair) for name, pair in self.running_statistics.items()},
            "steps_averaged": int(self._statistics.steps),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: Mapping[str, Any], optimizer: bool = True) -> None:
        """Take over what :meth:`state_dict` gave; without the optimizer's part for evaluation only.

        Raises:
            ValueError: names, shapes or types that are not this config's; nothing is taken over then.
        """
        check_state(self.config, state, optimizer)
        self._assign(state["parameters"])
        self._take_statistics(state["statistics"], state["steps_averaged"])
        if optimizer:
            saved, own = state["optimizer"], self.optimizer.state_dict()
            (group,) = own["param_groups"]  # how to compute is this device's matter, not the checkpoint's
            group |= {name: saved["param_groups"][0][name] for name in HYPERPARAMETERS[self.config.outer.optimizer]}
            own["state"] = {index: _copies(moments) for index, moments in saved["state"].items()}
            self.optimizer.load_state_dict(own)
        self._prepare()

    def released_names(self) -> dict[str, str]:
        """Our names of the meta-parameters -> those of the program that the algorithm's authors released.

        Raises:
            InputError: that program has no such parameter: it has another backbone.
        """
        return names_in(self.algorithm.released, self.meta_parameters, self.config.inner.algorithm)

    def load_released(self, state_dict: Mapping[str, Any]) -> None:
        """Take the parameters of a checkpoint of the released program, under its own names.

        Args:
            state_dict: name -> tensor or array. Running statistics are taken over where the algorithm has the same
                (those without an inner loop). Other entries that are no parameters of ours are passed over: per-step
                learning rates, and convolution biases before a batch norm, which removes them.

        Raises:
            ValueError: a parameter is missing, has another shape or is not floating point (named).
        """
        names, running = program_of(self.algorithm, state_dict)
        values, shapes = arrays_of(state_dict, names), self._shapes()
        for layer, pair in running.items():
            shapes |= dict.fromkeys(pair, shapes[f"{layer}.norm.weight"])
        check_parameters(values, shapes, "released checkpoint")
        self._assign(values)
        self._take_statistics(
            {layer: torch.stack([values[name] for name in pair]) for layer, pair in running.items()}, bool(running)
        )
        self._prepare()

    def _take_statistics(self, statistics: Mapping[str, Tensor], steps: int) -> None:
        """Mean and variance ``[2, C]`` by convolution, of so many meta-steps."""
        self._statistics = RunningStatistics(self.device, self.algorithm.running_share)
        self._statistics.steps.fill_(steps)
        for name, pair in statistics.items():
            mean, variance = pair.to(self.device, self.dtype).clone().unbind()
            self._statistics.values[name] = (mean, variance)

    def _shapes(self) -> dict[str, Sequence[int]]:
        return {name: tensor.shape for name, tensor in self.meta_parameters.items()}

    def _assign(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.meta_parameters.items():
                tensor.copy_(values[name])

    def _statistics_kind(self, statistics: str | None) -> str:
        """Of BatchNorm in the query pass: what was asked for, or the config's, if it can be had."""
        statistics = statistics or self.config.evaluation.statistics
        if statistics not in ("transductive", "support", "running"):
            raise InputError(f"statistics takes one of transductive, support, running, got {shown(statistics)}")
        if statistics != "transductive" and self.config.model.norm != "batch":
            raise InputError(f"statistics = {statistics} needs model.norm = batch, not {self.config.model.norm}")
        if statistics != "transductive" and self.algorithm.joint:
            raise InputError(f"statistics = {statistics}: {self.config.inner.algorithm} normalises both sets together")
        if statistics == "running" and not self.running_statistics:
            raise InputError("statistics = running needs the averages of meta-training; this learner has none")
        return statistics

    def _checked(self, episodes: Episodes, training: bool = False) -> Episodes:
        """The episodes on the learner's device and in its precision, if they are what the config says."""
        if not isinstance(episodes, Episodes):
            raise ValueError(f"episodes must be Episodes, got {type(episodes).__name__}")
        if not len(episodes):
            raise ValueError("episodes must hold at least one task, got none")
        self._check_image("support_x", episodes.support_x)
        self._check_labels(episodes, training)
        episodes = self._with_batches(episodes.to(self.device, self.dtype), training)
        parts = episodes.tensors()
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in parts.items() if tensor.is_inference()}
        return replace(episodes, **copies)

    def _with_batches(self, episodes: Episodes, training: bool) -> Episodes:
        """With what each inner step takes from the support sets, where the algorithm draws minibatches."""
        size, steps = self.config.inner.minibatch(training), self.config.inner_steps(training)
        if size is None:
            return replace(episodes, batches=None)
        tasks, images = episodes.support_y.shape
        batches = episodes.batches
        if batches is None:
            drawn = torch.from_numpy(draw_batches((self.config.run.seed, *_ALL_TASKS), images, steps, size))
            batches = drawn.to(episodes.support_x.device).expand(tasks, -1, -1).contiguous()
        elif batches.shape[1] != steps or not batches.shape[2]:
            raise ValueError(f"batches must be [{tasks}, {steps}, images], got {list(batches.shape)}")
        elif not episodes.ways and batches.numel() and not 0 <= int(batches.min()) <= int(batches.max()) < images:
            raise ValueError(f"batches must hold places in support_x, 0 to {images - 1}")
        return replace(episodes, batches=batches)

    def _check_labels(self, episodes: Episodes, training: bool = False) -> None:
        task = self.config.task
        ways = task.of_training().ways if training else task.ways
        setting = "task.train_ways" if training and task.train_ways else "task.ways"
        for name, y in (("support_y", episodes.support_y), ("query_y", episodes.query_y)):
            if not y.numel():
                raise ValueError(f"{name} must hold at least one image a task, got {list(y.shape)}")
            if 0 < episodes.ways <= ways:
                continue
            y = y.long()  # the framework has no least and largest of unsigned integers
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= ways:
                raise ValueError(
                    f"{name} must hold labels 0 to {ways - 1} ({setting} = {ways}), got {low if low < 0 else high}"
                )

    def _check_image(self, name: str, x: Tensor) -> None:
        model = self.config.model
        wanted = [model.channels, model.image_size, model.image_size]
        if list(x.shape[-3:]) != wanted:
            raise ValueError(
                f"{name} must hold images {wanted} (model.channels, model.image_size), got {list(x.shape[-3:])}"
            )


class Adapted:
    """Networks adapted to their support sets; made by :meth:`Learner.adapt`.

    Attributes:
        state: the adapted weights and all else that the inner loop carried, each with a leading task axis.
    """

    def __init__(self, learner: Learner, adaptation: Adaptation, single: bool) -> None:
        self._learner, self._adaptation, self._single = learner, adaptation, single

    @property
    def state(self) -> State:
        return self._adaptation.state

    def __call__(self, query_x: Tensor) -> Tensor:
        """Logits ``[Q, N]`` of query images ``[Q, C, H, W]``; ``[T, Q, N]`` of ``[T, Q, C, H, W]`` for several tasks.

        Raises:
            ValueError: images of another shape or kind, or of another number of tasks.
        """
        check_images("query_x", query_x)
        tasks = len(self._adaptation.support.x)
        wanted = "[Q, C, H, W]" if self._single else f"[{tasks}, Q, C, H, W]"
        if query_x.ndim != 5 - self._single or (not self._single and len(query_x) != tasks):
            raise ValueError(f"query_x must be {wanted} as support_x was, got {list(query_x.shape)}")
        self._learner._check_image("query_x", query_x)
        x = (query_x[None] if self._single else query_x).to(self._learner.device, self._learner.dtype)
        logits = self.logits(x)
        return logits[0] if self._single else logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits ``[T, Q, N]`` of images ``[T, Q, C, H, W]`` on the learner's device and in its precision."""
        with self._learner._operators():
            return self._learner.engine.answer(self._adaptation, x)


def _copies(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in moments.items()}
