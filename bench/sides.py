"""The sides of the episodes bench, behind one interface: a name -> something that takes whole meta-training steps.

Every side gets the same config, episodes and meta-parameters; ``loop`` is what released programs do, and what the
others' speed is told against.
"""

from __future__ import annotations

import importlib.util

import loop
import torch
from functional import limits, loss_and_gradients
from peers import higher_peer, jax_peer, learn2learn_peer, parallel_metalearn_peer
from side import Factory, Parameters, Side, TorchSide, Unavailable, copies, device_of, differentiated, fill
from torch import Tensor

from cxgrad_fast import Config, Episodes, InputError, Learner
from cxgrad_fast.engine import StaticGradients
from cxgrad_fast.kernels import backends


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
        return differentiated(self._learner.meta_loss(self._episodes).loss, self._learner.meta_parameters)

    def parameters(self) -> dict[str, Tensor]:
        return copies(self._learner.meta_parameters)

    def load(self, parameters: Parameters) -> None:
        fill(self._learner.meta_parameters, parameters)


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
    return lambda config, episodes, parameters: jax_peer.build(config, episodes, parameters, vmap)


def _parallel_metalearn(backend: str) -> Factory:
    return lambda config, episodes, parameters: parallel_metalearn_peer.build(config, episodes, parameters, backend)


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
    known = _ALGORITHMS.get(name)
    if known and config.inner.algorithm not in known:
        return f"computes {', '.join(known)}, not {config.inner.algorithm}"
    package = _PACKAGES.get(name, "torch")
    return "" if importlib.util.find_spec(package) else f"not installed (no module named '{package}')"


BASELINE = "loop"
_COMPILED = "-compiled"
_BFLOAT16 = "ours-cpp-bfloat16-compiled"
_PACKAGES = {
    "jax-vmap": "jax",
    "jax-map": "jax",
    "higher": "higher",
    "learn2learn": "learn2learn",
    "parallel-metalearn": "metalearn",
    "parallel-metalearn-sequential": "metalearn",
}
# what a side computes, where that is not every algorithm
_OF_FUNCTIONAL = ("cxgrad", "maml", "fomaml")
_ALGORITHMS = {
    "func-vmap": _OF_FUNCTIONAL,
    "func-vmap-compiled": _OF_FUNCTIONAL,
    "jax-vmap": _OF_FUNCTIONAL,
    "jax-map": _OF_FUNCTIONAL,
    "higher": ("maml",),
    "learn2learn": ("maml",),
    "parallel-metalearn": parallel_metalearn_peer.ALGORITHMS,
    "parallel-metalearn-sequential": parallel_metalearn_peer.ALGORITHMS,
}
# their first step holds a compilation, too dear to be paid once more for a small case
COMPILING = ("func-vmap-compiled", "jax-vmap", "jax-map", "ours-cpp-compiled", _BFLOAT16, "ours-triton-compiled")
SIDES: dict[str, Factory] = {
    "ours-reference": _ours("reference"),
    "ours-cpp": _ours("cpp"),
    "ours-cpp-compiled": _ours("cpp", is_compiled=True),
    _BFLOAT16: _ours("cpp", is_compiled=True, precision="bfloat16"),
    "ours-triton": _ours("triton"),
    "ours-triton-compiled": _ours("triton", is_compiled=True),
    BASELINE: loop.build,
    "func-vmap": _func_vmap,
    "func-vmap-compiled": _func_vmap_compiled,
    "jax-vmap": _jax(vmap=True),
    "jax-map": _jax(vmap=False),
    "higher": higher_peer.build,
    "learn2learn": learn2learn_peer.build,
    "parallel-metalearn": _parallel_metalearn("vmap"),
    "parallel-metalearn-sequential": _parallel_metalearn("sequential"),
}
