"""ImagePool: the form in which every source hands over its images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cxgrad_fast.config import InputError


@dataclass(frozen=True)
class ImagePool:
    """The images of one split of one source, resident on one device.

    Attributes:
        images: ``[N, H, W, 3]`` uint8, RGB.
        labels: ``[N]`` int64, sorted, each in ``[0, len(class_names))``; every class has at least one image.
        class_names: one name a class, in label order.
        split: ``train``, ``val`` or ``test``.
        source: where the images come from, for messages (``glyphs``, ``folder /data/mini_imagenet``), printable.

    Raises:
        InputError: no images at all.
        ValueError: arrays that do not fit together (a fault of the source, not of its user).
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    split: str
    source: str

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise InputError(f"{self.source} has no images in its split '{self.split}'")
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            raise ValueError(f"images must be uint8 [N, H, W, 3], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [{len(self.images)}], got {list(self.labels.shape)}")
        if not torch.equal(self.labels.unique(), torch.arange(len(self.class_names), device=self.labels.device)):
            raise ValueError("every class must have an image and every label a class")
        if (self.labels.diff() < 0).any():
            raise ValueError("labels must be sorted: a class is a range of images")

    @property
    def class_sizes(self) -> Tensor:
        """Images of each class, ``[classes]`` int64, on the CPU."""
        return torch.bincount(self.labels.cpu(), minlength=len(self.class_names))

    def to(self, device: torch.device | str) -> ImagePool:
        """The same pool on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def fingerprint(self) -> str:
        """SHA-256 of images, labels and names: two runs with equal fingerprints saw the same data."""
        digest = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape"))
        digest.update(self.labels.cpu().numpy().tobytes())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()
