"""The sides of the episodes bench, behind one interface: a name -> something that takes whole meta-training steps.

Every side gets the same config, episodes and meta-parameters; ``loop`` is what released programs do, and what the
others' speed is told against.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from unittest import mock

import torch
import torch.nn.functional as F
from functional import limits, loss_and_gradients
from torch import Tensor

from cxgrad_fast import Config, Episodes, InputError, Learner, reference
from cxgrad_fast.engine import StaticGradients
from cxgrad_fast.kernels import backends
from cxgrad_fast.reference import network

Parameters = Mapping[str, Tensor]


class Unavailable(Exception):
    """A side that cannot run here, or not with these settings; the message is the reason."""


class Side(Protocol):
    """Takes meta-training steps on fixed episodes, from given meta-parameters."""

    def step(self) -> None:
        """A whole meta-training step: forward, inner loop, meta-gradient, Adam's update."""
        ...

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Meta-loss, and its gradients by our names, at the current parameters; changes nothing."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The current meta-parameters by our names."""
        ...

    def load(self, parameters: Parameters) -> None:
        """Take over the values of ``parameters``."""
        ...


Factory = Callable[[Config, Episodes, Parameters], Side]


def device_of(config: Config) -> torch.device:
    """What ``run.device`` names; ``auto`` is CUDA where there is some."""
    if config.run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.run.device)


def dtype_of(config: Config) -> torch.dtype:
    """What ``run.precision`` names.

    Raises:
        Unavailable: a precision that torch's own operators do not have.
    """
    dtype = {"float32": torch.float32, "float64": torch.float64}.get(config.run.precision)
    if dtype is None:
        raise Unavailable(f"runs in float32 and float64, not {config.run.precision}")
    return dtype


class Ours:
    """:class:`cxgrad_fast.Learner` on one backend, compiled or not, in the config's precision or another."""

    def __init__(
        self,
        backend: str,
        is_compiled: bool,
        config: Config,
        episodes: Episodes,
        parameters: Parameters,
        precision: str = "",
    ) -> None:
        overrides = {"run.backend": backend, "run.compile": is_compiled}
        try:
            self._learner = Learner(config.override(overrides | ({"run.precision": precision} if precision else {})))
        except InputError as error:
            raise Unavailable(str(error)) from None
        if isinstance(self._learner._gradients, StaticGradients):  # to be timed itself, also where it is slower
            self._learner._gradients = StaticGradients(self._learner._loss_and_gradients, trials=0)
        self._episodes = episodes.to(self._learner.device, self._learner.dtype)
        self.load(parameters)

    def step(self) -> None:
        self._learner.meta_step(self._episodes)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        return _differentiated(self._learner.meta_loss(self._episodes).loss, self._learner.meta_parameters)

    def parameters(self) -> dict[str, Tensor]:
        return _copies(self._learner.meta_parameters)

    def load(self, parameters: Parameters) -> None:
        _fill(self._learner.meta_parameters, parameters)


class TorchSide:
    """A side made of a function ``(leaf parameters, episodes) -> (loss, gradients)`` and torch's own Adam.

    Args:
        find: the function.
        config: of the case.
        episodes: of the case.
        parameters: initial values by our names.
        leaves: the tensors that hold the parameters, where they are not to be made here (those of a module).

    Raises:
        Unavailable: a precision that torch's own operators do not have.
    """

    def __init__(
        self,
        find: Callable[[dict[str, Tensor], Episodes], tuple[Tensor, dict[str, Tensor]]],
        config: Config,
        episodes: Episodes,
        parameters: Parameters,
        leaves: dict[str, Tensor] | None = None,
    ) -> None:
        device, dtype = device_of(config), dtype_of(config)
        if device.type == "cuda":  # float32 means float32 on every side
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._find, self._episodes = find, episodes.to(device, dtype)
        if leaves is None:
            leaves = {name: torch.empty_like(t, device=device, dtype=dtype) for name, t in parameters.items()}
        self._leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        self.load(parameters)
        self._adam = torch.optim.Adam(self._leaves.values(), lr=config.outer.learning_rate)

    def step(self) -> None:
        _, gradients = self._find(self._leaves, self._episodes)
        for name, leaf in self._leaves.items():
            leaf.grad = gradients[name]
        self._adam.step()
        self._adam.zero_grad()

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        loss, gradients = self._find(self._leaves, self._episodes)
        return float(loss), _copies(gradients)

    def parameters(self) -> dict[str, Tensor]:
        return _copies(self._leaves)

    def load(self, parameters: Parameters) -> None:
        _fill(self._leaves, parameters)


def backward(loss: Tensor, leaves: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss and its gradients by name, zeros where a parameter takes no part."""
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, found, strict=True))


def _conv_norm(theta: Parameters, name: str, x: Tensor, *, eps: float, norm: str, norm_groups: int, **_: Any) -> Tensor:
    """The oracle's convolution and norm by torch's own norms, as released programs have them: the faster loop."""
    weight, scale, shift = (theta[f"{name}.{part}"] for part in ("weight", "norm.weight", "norm.bias"))
    y = F.conv2d(x, weight, theta.get(f"{name}.bias"), padding=weight.shape[2] // 2)
    if norm == "batch":
        return F.batch_norm(y, None, None, scale, shift, training=True, eps=eps)
    return F.group_norm(y, norm_groups if norm == "group" else 1, scale, shift, eps)


def _loop(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    def find(leaves: dict[str, Tensor], episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        with mock.patch.object(network, "conv_norm", _conv_norm):
            return backward(reference.meta_loss(config, leaves, episodes).loss, leaves)

    return TorchSide(find, config, episodes, parameters)


def _func_vmap(config: Config, episodes: Episodes, parameters: Parameters, compiled: bool = False) -> Side:
    reason = limits(config)
    if reason:
        raise Unavailable(reason)
    function = loss_and_gradients(config)
    if compiled:
        function = torch.compile(function)

    def find(leaves: dict[str, Tensor], episodes: Episodes) -> tuple[Tensor, dict[str, Tensor]]:
        gradients, loss = function({name: leaf.detach() for name, leaf in leaves.items()}, episodes)
        return loss, gradients

    return TorchSide(find, config, episodes, parameters)


def _func_vmap_compiled(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    return _func_vmap(config, episodes, parameters, compiled=True)


def _ours(backend: str, is_compiled: bool = False, precision: str = "") -> Factory:
    return lambda config, episodes, parameters: Ours(backend, is_compiled, config, episodes, parameters, precision)


def _jax(vmap: bool) -> Factory:
    def build(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
        from peers import jax_peer

        return jax_peer.build(config, episodes, parameters, vmap)

    return build


def _higher(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    from peers import higher_peer

    return higher_peer.build(config, episodes, parameters)


def _learn2learn(config: Config, episodes: Episodes, parameters: Parameters) -> Side:
    from peers import learn2learn_peer

    return learn2learn_peer.build(config, episodes, parameters)


def precision_of(name: str, config: Config) -> str:
    """The precision that a side multiplies in."""
    return "bfloat16" if name == _BFLOAT16 else config.run.precision


def refusal(name: str, config: Config) -> str:
    """Why a side cannot run, as far as that is known without starting it; empty where it may."""
    if name == _BFLOAT16:
        if config.run.precision != "float32":
            return f"beside float32, not {config.run.precision}"
        return backends.why_not_precision("bfloat16", "cpp", device_of(config))
    if name.startswith("ours-"):
        return backends.availability()[name.removeprefix("ours-").removesuffix(_COMPILED)]
    if name in ("higher", "learn2learn") and config.inner.algorithm != "maml":
        return "MAML only: compared with ours under inner.algorithm = maml"
    package = _PACKAGES.get(name, "torch")
    return "" if importlib.util.find_spec(package) else f"not installed (no module named '{package}')"


BASELINE = "loop"
_COMPILED = "-compiled"
_BFLOAT16 = "ours-cpp-bfloat16-compiled"
_PACKAGES = {"jax-vmap": "jax", "jax-map": "jax", "higher": "higher", "learn2learn": "learn2learn"}
# their first step holds a compilation, too dear to be paid once more for a small case
COMPILING = ("func-vmap-compiled", "jax-vmap", "jax-map", "ours-cpp-compiled", _BFLOAT16, "ours-triton-compiled")
SIDES: dict[str, Factory] = {
    "ours-reference": _ours("reference"),
    "ours-cpp": _ours("cpp"),
    "ours-cpp-compiled": _ours("cpp", is_compiled=True),
    _BFLOAT16: _ours("cpp", is_compiled=True, precision="bfloat16"),
    "ours-triton": _ours("triton"),
    "ours-triton-compiled": _ours("triton", is_compiled=True),
    BASELINE: _loop,
    "func-vmap": _func_vmap,
    "func-vmap-compiled": _func_vmap_compiled,
    "jax-vmap": _jax(vmap=True),
    "jax-map": _jax(vmap=False),
    "higher": _higher,
    "learn2learn": _learn2learn,
}


def _differentiated(loss: Tensor, leaves: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    value, gradients = backward(loss, leaves)
    return float(value), _copies(gradients)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in tensors.items()}


def _fill(leaves: Mapping[str, Tensor], values: Parameters) -> None:
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(values[name])
