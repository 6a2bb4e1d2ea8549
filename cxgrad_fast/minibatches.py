"""The minibatches that the steps of an inner loop take from a support set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def draw_batches(key: Sequence[int], images: int, steps: int, size: int) -> np.ndarray:
    """Places in a set of ``images``: ``[steps, size]`` int64, the same for the same key, whatever the machine.

    The set is shuffled and gone through in order, again and again; a batch may span two shuffles (the released
    Reptile). The numbers are those of the raw Philox stream keyed by ``key``, which numpy guarantees never to change.

    Args:
        key: whole numbers from 0 on; a last one of 0 changes nothing.
        images: at least one.
        steps: batches.
        size: images of a batch, which may be more than there are; 0: all.
    """
    size = size or images
    stream = np.random.Philox(np.random.SeedSequence(list(key)))
    shuffles = -(-steps * size // images)
    places = [np.argsort(stream.random_raw(images), kind="stable") for _ in range(shuffles)]
    return np.array(places, dtype=np.int64).reshape(-1)[: steps * size].reshape(steps, size)
