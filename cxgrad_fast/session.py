"""A training run in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cxgrad_fast.checkpoints import Best, Checkpoint
from cxgrad_fast.config import Config, InputError
from cxgrad_fast.engine import Ranks
from cxgrad_fast.episodes import EpisodeSampler
from cxgrad_fast.learner import Learner


@dataclass
class Session:
    """A training run in memory; :meth:`checkpoint` is what of it outlives the process.

    Attributes:
        samplers: by their part in the run: train, val, test, cross-domain.
        ranks: the processes that train it; all but the first keep what they find to themselves.
        iteration: meta-updates done.
        validated: iteration of the last validation.
        best: best models so far, best first.
    """

    config: Config
    learner: Learner
    samplers: dict[str, EpisodeSampler]
    fingerprints: dict[str, str]
    source: str
    ranks: Ranks
    iteration: int = 0
    validated: int = 0
    best: list[Best] = field(default_factory=list)

    def checkpoint(self, **episode: Any) -> Checkpoint:
        """The session as it stands.

        Raises:
            NonFiniteError: a meta-parameter is not finite: nothing can go on from it.
        """
        self.learner.check_finite("this run")
        return Checkpoint(
            config=self.config,
            state=self.learner.state_dict(),
            iteration=self.iteration,
            validated=self.validated,
            best=tuple(self.best),
            fingerprints=self.fingerprints,
            rng=_rng_states(self.learner.device),
            source=self.source,
            episode=episode,
        )

    def validation_is_due(self) -> bool:
        """Whether the weights of now are to be validated and have not been."""
        outer = self.config.outer
        is_due = self.iteration % outer.validate_every == 0 or self.iteration >= outer.iterations
        return self.iteration > self.validated and is_due


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Put torch's generators into the states of a checkpoint.

    Raises:
        InputError: the device's generator does not take its state.
    """
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        try:
            torch.cuda.set_rng_state(states["cuda"], device)
        except RuntimeError as error:
            raise InputError(f"the checkpoint's state of the generator on {device} cannot be used: {error}") from error
