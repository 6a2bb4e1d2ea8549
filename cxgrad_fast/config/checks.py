"""Settings that must fit each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from cxgrad_fast.config.fields import InputError
from cxgrad_fast.config.inner import ALGORITHMS, ANILConfig, MetricConfig, RelationNetConfig
from cxgrad_fast.printable import shown

if TYPE_CHECKING:
    from cxgrad_fast.config import Config
    from cxgrad_fast.config.groups import ModelConfig

_LARGEST_FLOAT32 = 1e38
_MOST_FILTERS = 100_000
_LARGEST_BATCH = 2**50  # numbers in a layer's output for all tasks at once: petabytes
_RELEASED_TASKS = 2**32 - 10**6  # numpy's RandomState takes 32 bits, and the first task's seed is below a million


def check_together(config: Config) -> None:
    _check_sizes(config)
    _check_float32(config)
    _check_inner(config)
    model = config.model
    if len(model.pool_padding) != 4 or not set(model.pool_padding) <= {0, 1}:
        raise InputError(
            f"setting 'model.pool_padding' takes four of 0 or 1, one a block, got {shown(model.pool_padding)}"
        )
    _check_filters(model)
    if model.conv_bias and model.norm != "batch":
        raise InputError(
            f"setting 'model.conv_bias' needs model.norm = batch, which removes the biases, not {model.norm}"
        )
    for name in ("pool_ceil", "channels_last"):
        if getattr(model, name) and model.backbone != "conv4":
            raise InputError(f"setting 'model.{name}' is of conv4 alone, not of {model.backbone}")
    if model.sizes_by_block()[-1] < 1:
        raise InputError(
            f"setting 'model.image_size' (={model.image_size}) pools to nothing in {model.backbone}: use at least 16"
        )
    if config.data.source == "folder" and not config.data.root:
        raise InputError(
            "setting 'data.root' is needed with data.source = folder: the folder that holds train/ val/ test/"
        )
    if config.evaluation.statistics != "transductive" and model.norm != "batch":
        raise InputError(
            f"setting 'evaluation.statistics' (={config.evaluation.statistics}) needs model.norm = batch: "
            f"norm = {model.norm} takes its statistics from each image alone"
        )


def _check_filters(model: ModelConfig) -> None:
    """That every block has filters, and that their norm's groups divide them."""
    filters, shown_filters = model.block_filters, ",".join(map(str, model.block_filters))
    if filters and model.backbone != "resnet12":
        raise InputError(
            f"setting 'model.block_filters' (={shown_filters}) is of resnet12 alone: all layers of {model.backbone} "
            "have 'model.filters'"
        )
    if filters and (len(filters) != 4 or not all(1 <= count <= _MOST_FILTERS for count in filters)):
        raise InputError(
            f"setting 'model.block_filters' takes four numbers from 1 to {_MOST_FILTERS}, one a block, or none, got "
            f"{shown(filters)}"
        )
    if model.norm == "group" and any(count % model.norm_groups for count in model.filters_by_block):
        name, value = ("block_filters", shown_filters) if filters else ("filters", model.filters)
        raise InputError(f"setting 'model.norm_groups' (={model.norm_groups}) must divide 'model.{name}' (={value})")


def _check_inner(config: Config) -> None:
    """Settings that only some algorithms have."""
    inner, statistics = config.inner, config.evaluation.statistics
    if isinstance(inner, ANILConfig) and inner.joint and statistics != "transductive":
        raise InputError(
            f"setting 'evaluation.statistics' (={statistics}) does not go with inner.joint, which normalises support "
            "and query images together: use transductive"
        )
    task = config.task
    if task.of_training().ways != task.ways and not inner.any_ways:
        free = ", ".join(name for name, kind in ALGORITHMS.items() if kind.any_ways)
        raise InputError(
            f"setting 'task.train_ways' (={task.train_ways}) must be task.ways (={task.ways}): the head of "
            f"{inner.algorithm} has a row for each class, only {free} have none"
        )
    steps = config.evaluation.steps
    if steps and isinstance(inner, MetricConfig):
        raise InputError(f"setting 'evaluation.steps' (={steps}) is of an inner loop, which {inner.algorithm} has not")
    if inner.steps_have_parameters and steps > inner.steps:
        raise InputError(
            f"setting 'evaluation.steps' (={steps}) must be at most inner.steps (={inner.steps}): each step of "
            f"{inner.algorithm} has parameters of its own"
        )
    if config.run.recompute and inner.minibatch(training=True) is not None:
        raise InputError(
            f"setting 'run.recompute' has nothing to recompute: {inner.algorithm} keeps no graph of its inner steps"
        )
    if isinstance(inner, RelationNetConfig):
        _check_relation(config.model, inner)
    if not getattr(inner, "layers", True) and not getattr(inner, "context_at_head", False):
        raise InputError("setting 'inner.layers' must name at least one convolution: without any, nothing is adapted")


def _check_relation(model: ModelConfig, inner: RelationNetConfig) -> None:
    if model.backbone != "conv4":
        raise InputError(
            f"setting 'model.backbone' (={model.backbone}) must be conv4: {inner.algorithm} has an encoder of its own"
        )
    least, padded = (each.least_size(model) for each in (inner, dataclasses.replace(inner, relation_padding=1)))
    if model.image_size < least:
        padding = f", or inner.relation_padding = 1 with at least {padded}" if padded < least else ""
        raise InputError(
            f"setting 'model.image_size' (={model.image_size}) leaves nothing of the maps that {inner.algorithm} "
            f"compares: use at least {least}{padding}"
        )


def _check_sizes(config: Config) -> None:
    """That a batch of tasks can be counted, and that the released program's seeds last for all tasks."""
    task, model, outer, evaluation = config.task, config.model, config.outer, config.evaluation
    evaluated = max(evaluation.validation_tasks, evaluation.test_tasks)
    for setting, tasks, each in (
        ("outer.meta_batch", outer.meta_batch, task.of_training()),
        ("evaluation.tasks_per_batch", min(evaluation.tasks_per_batch, evaluated), task),
    ):
        images = tasks * each.ways * (each.shots + each.queries)
        if images * model.image_size**2 * max(model.channels, model.filters, *model.block_filters) > _LARGEST_BATCH:
            raise InputError(
                f"{tasks} tasks at once ({setting}) of {each.ways} ways, {each.shots} shots and {each.queries} "
                f"queries, {model.image_size} pixels wide, need more memory than any machine has"
            )
    drawn = max(outer.iterations * outer.meta_batch, evaluated)
    if config.data.sampler == "released" and drawn > _RELEASED_TASKS:
        raise InputError(
            f"data.sampler = released has seeds for {_RELEASED_TASKS} tasks, outer.iterations (={outer.iterations}) x "
            f"outer.meta_batch (={outer.meta_batch}) are more: use data.sampler = counter"
        )


def _check_float32(config: Config) -> None:
    for name, value in config.flat().items():
        if isinstance(value, float) and value > _LARGEST_FLOAT32 and config.run.precision != "float64":
            raise InputError(
                f"setting '{name}' (={value}) must be at most {_LARGEST_FLOAT32} with run.precision = "
                f"{config.run.precision}: use a smaller one, or float64"
            )
