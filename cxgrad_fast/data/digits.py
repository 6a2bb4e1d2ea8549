"""``digits``: the 1,797 handwritten 8x8 digits that scikit-learn ships; glyphs' cross-domain test set."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cxgrad_fast.data.pool import ImagePool


def open_digits(split: str, size: int) -> ImagePool:
    """All ten digits, light strokes on black, enlarged to ``size`` x ``size``; the same images in every split."""
    data = load_digits()
    order = np.argsort(data.target, kind="stable")
    grey = np.rint(data.images[order] * (255 / 16)).astype(np.uint8)  # the file counts 0 .. 16
    enlarged = [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in grey]
    return ImagePool(
        images=torch.from_numpy(np.repeat(np.stack(enlarged)[..., None], 3, axis=3)),
        labels=torch.from_numpy(data.target[order].astype(np.int64)),
        class_names=tuple(str(digit) for digit in range(10)),
        split=split,
        source="digits",
    )
