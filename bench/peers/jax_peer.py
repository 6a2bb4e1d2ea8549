"""The same step in JAX: one task as a function, ``scan`` over its steps, ``grad`` twice, ``jit``.

Tasks go through ``vmap`` (side jax-vmap) or, one after the other in the same program, through ``lax.map`` (jax-map).
The second is there because jaxlib 0.10.2's compiled vmap of a convolution with a weight a task has wrong gradients on
CPUs (right without jit): the equal-work check refuses it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from functional import limits
from side import Parameters, Unavailable, device_of, dtype_of
from torch import Tensor

from cxgrad_fast import Config, Episodes
from peers import load_package

DEPTH = 4
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's, as in torch


def build(config: Config, episodes: Episodes, parameters: Parameters, vmap: bool) -> JaxSide:
    """The side; Unavailable says why not."""
    reason = limits(config)
    if reason:
        raise Unavailable(reason)
    if config.outer.optimizer != "adam" or config.outer.clip_value or config.outer.clip_norm:
        raise Unavailable("written for Adam, without clipping")
    jax = load_package("jax")
    if device_of(config).type == "cuda" and jax.default_backend() != "gpu":
        raise Unavailable("the installed jax has no CUDA device")
    jax.config.update("jax_enable_x64", dtype_of(config) == torch.float64)
    return JaxSide(jax, config, episodes, parameters, vmap)


class JaxSide:
    """As :class:`side.Side` says; the arrays live on JAX's default device."""

    def __init__(self, jax: Any, config: Config, episodes: Episodes, parameters: Parameters, vmap: bool) -> None:
        self._jax, self._dtype = jax, str(dtype_of(config)).removeprefix("torch.")
        self._find = jax.jit(jax.value_and_grad(partial(_meta_loss, jax, config, vmap)))
        self._adam = jax.jit(partial(_adam, jax, config.outer.learning_rate))
        sets = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        self._sets = tuple(self._array(part) for part in sets)
        self.load(parameters)

    def step(self) -> None:
        _, gradients = self._find(self._values, self._sets)
        moved = self._adam(self._values, self._state, gradients)
        self._values, self._state = self._jax.block_until_ready(moved)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = self._find(self._values, self._sets)
        return float(loss), _tensors(gradients)

    def parameters(self) -> dict[str, Tensor]:
        return _tensors(self._values)

    def load(self, parameters: Parameters) -> None:
        self._values = {name: self._array(tensor) for name, tensor in parameters.items()}
        zeros = {name: 0 * value for name, value in self._values.items()}
        self._state = (zeros, zeros, self._jax.numpy.zeros((), self._dtype))

    def _array(self, tensor: Tensor) -> Any:
        array = tensor.detach().cpu().numpy()
        return self._jax.numpy.asarray(array.astype(self._dtype if tensor.is_floating_point() else np.int32))


def _tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(array, dtype=np.float64).copy()) for name, array in arrays.items()}


def _adam(jax: Any, rate: float, values: dict[str, Any], state: Any, gradients: dict[str, Any]) -> tuple[Any, Any]:
    first, second, count = state
    count = count + 1
    first = jax.tree.map(lambda m, g: BETA1 * m + (1 - BETA1) * g, first, gradients)
    second = jax.tree.map(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, second, gradients)

    def moved(value: Any, m: Any, v: Any) -> Any:
        size = jax.numpy.sqrt(v / (1 - BETA2**count)) + EPS
        return value - rate * m / (1 - BETA1**count) / size

    return jax.tree.map(moved, values, first, second), (first, second, count)


def _meta_loss(jax: Any, config: Config, vmap: bool, meta: dict[str, Any], sets: Any) -> Any:
    one = partial(_task_loss, jax, config, meta)
    losses = jax.vmap(one)(*sets) if vmap else jax.lax.map(lambda task: one(*task), sets)
    return losses.mean() if config.outer.reduction == "mean" else losses.sum()


def _task_loss(jax: Any, config: Config, meta: dict[str, Any], *sets: Any) -> Any:
    """Query loss of one task; as :func:`functional.task_loss`."""
    support_x, support_y, query_x, query_y = sets
    inner, xp = config.inner, jax.numpy
    fast = {name: value for name, value in meta.items() if ".norm." not in name and not name.startswith("scaler")}

    def loss(weights: dict[str, Any], x: Any, y: Any) -> Any:
        logits = jax.nn.log_softmax(_network(jax, config, {**meta, **weights}, x))
        return -xp.take_along_axis(logits, y[:, None], 1).mean()

    def keep(gradient: Any, order: int) -> Any:
        return gradient if order == 2 else jax.lax.stop_gradient(gradient)

    still = {name: xp.zeros_like(value) for name, value in fast.items()}

    def at(context: Any, moves: dict[str, Any], fast: dict[str, Any]) -> tuple[Any, Any]:
        weights = _scaled(jax, meta, fast, context)
        return loss({name: weights[name] + moves[name] for name in fast}, support_x, support_y), weights

    def step(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        fast, context = state
        if inner.algorithm == "cxgrad":
            (turn, found), fast = jax.grad(at, (0, 1), has_aux=True)(context, still, fast)
            context = context - inner.context_learning_rate * keep(turn, inner.order)
        else:
            found = jax.grad(loss)(fast, support_x, support_y)
        return (
            {name: fast[name] - inner.learning_rate * keep(found[name], inner.order) for name in fast},
            context,
        ), None

    context = xp.zeros(inner.context_dim, support_x.dtype)
    if inner.algorithm == "cxgrad":
        first, _ = jax.grad(at, has_aux=True)(context, still, fast)
        context = context - inner.context_learning_rate * keep(first, min(inner.order, inner.initial_context_order))
    (fast, _), _ = jax.lax.scan(step, (fast, context), length=inner.steps)
    return loss(fast, query_x, query_y)


def _scaled(jax: Any, meta: dict[str, Any], weights: dict[str, Any], context: Any) -> dict[str, Any]:
    hidden = jax.nn.relu(meta["scaler.0.weight"] @ context + meta["scaler.0.bias"])
    gammas = jax.nn.softplus(meta["scaler.2.weight"] @ hidden + meta["scaler.2.bias"])
    names = [f"features.{layer}.weight" for layer in range(DEPTH)]
    unit = {name: weights[name] / jax.numpy.sqrt((weights[name] ** 2).sum()) for name in names}
    return {**weights, **{name: gammas[layer] * unit[name] for layer, name in enumerate(names)}}


def _network(jax: Any, config: Config, p: dict[str, Any], x: Any) -> Any:
    """Conv-4: ``[S, C, H, W]`` -> ``[S, N]``; the pool as a maximum over a reshaped view, whose gradient is cheaper."""
    model = config.model
    for layer in range(DEPTH):
        x = jax.lax.conv(x, p[f"features.{layer}.weight"], (1, 1), "SAME")
        centred = x - x.mean((0, 2, 3), keepdims=True)
        variance = (centred**2).mean((0, 2, 3), keepdims=True)
        scale, bias = (p[f"features.{layer}.norm.{part}"][:, None, None] for part in ("weight", "bias"))
        x = centred * jax.lax.rsqrt(variance + model.norm_eps) * scale + bias
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2).max((3, 5))
        x = jax.nn.leaky_relu(x, model.slope)
    return x.reshape(len(x), -1) @ p["head.weight"].T + p["head.bias"]
