"""Sources of images. :func:`open_pool` is the one door; each source ends in an :class:`ImagePool`."""

from __future__ import annotations

from cxgrad_fast.config import Config, InputError
from cxgrad_fast.data.pool import ImagePool

__all__ = ["ImagePool", "open_pool"]


def open_pool(config: Config, split: str, *, source: str | None = None) -> ImagePool:
    """The images of one split, on the CPU.

    Args:
        config: reads ``data.source``, ``data.root``, ``data.variant`` and ``model.image_size``.
        split: ``train``, ``val`` or ``test``.
        source: another source than ``data.source``, for the cross-domain set; ``data.root`` is not its root.

    Raises:
        InputError: data that is missing or cannot be read, or an unknown split or source.
    """
    if split not in ("train", "val", "test"):
        raise InputError(f"unknown split '{split}': there are train, val and test")
    data, size = config.data, config.model.image_size
    root = data.root if source in (None, data.source) else ""
    match source or data.source:
        case "glyphs":
            from cxgrad_fast.data.glyphs import open_glyphs

            return open_glyphs(split, size, data.variant, root)
        case "digits":
            from cxgrad_fast.data.digits import open_digits

            return open_digits(split, size)
        case "folder":
            from cxgrad_fast.data.folder import open_folder

            return open_folder(split, size, root)
        case unknown:
            raise InputError(f"unknown source of images '{unknown}': there are glyphs, digits and folder")
