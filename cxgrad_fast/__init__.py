"""Exact, fast meta-training of MAML-type few-shot learners."""

from cxgrad_fast.config import Config, InputError, preset
from cxgrad_fast.episodes import Episodes, EpisodeSampler
from cxgrad_fast.learner import Learner
from cxgrad_fast.runs import load

__all__ = ["Config", "EpisodeSampler", "Episodes", "InputError", "Learner", "load", "preset"]
