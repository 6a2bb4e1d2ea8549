"""digits: scikit-learn's handwritten digits as a test set."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from cxgrad_fast.data.digits import open_digits


def test_all_images_sorted_by_class_in_every_split() -> None:
    pool = open_digits("val", 28)
    assert pool.split == "val"
    assert pool.images.shape == (1797, 28, 28, 3)
    assert pool.class_names == tuple("0123456789")
    assert pool.class_sizes.tolist() == np.bincount(load_digits().target).tolist()
    assert torch.equal(pool.images, open_digits("test", 28).images)


def test_images_are_the_originals() -> None:
    """At its own size an image is the file's, 16 grey levels spread over 0 .. 255, alike in all channels."""
    data = load_digits()
    pool = open_digits("test", 8)
    for digit in range(10):
        originals = np.rint(data.images[data.target == digit] * 255 / 16)
        drawn = pool.images[pool.labels == digit].numpy()
        for channel in range(3):
            np.testing.assert_array_equal(drawn[..., channel], originals)


def test_strokes_are_light_on_dark() -> None:
    images = open_digits("test", 28).images.float()
    border = torch.cat([images[:, :, 0], images[:, :, -1]], dim=1)
    assert border.mean() < 20
    assert images.amax((1, 2, 3)).min() > 200
