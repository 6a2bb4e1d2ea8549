"""``folder``: images on disk as root/{train,val,test}/<class>/<image>, decoded as the released programs decode."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from cxgrad_fast.config import InputError
from cxgrad_fast.data.cache import Arrays, cached, is_array
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.files import open_regular
from cxgrad_fast.printable import one_line

_DECODER = 2  # raise when _decode changes: cached images are then made anew
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_FORMATS = ("JPEG", "PNG")  # others are not tried, whatever a file is called: some start other programs
_EIGHT_BITS = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"}  # Pillow's modes of such files, but for 16-bit grey
_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_MANY_FILES = 2000  # from here on a bar shows the progress of decoding


def open_folder(split: str, size: int, root: str | Path) -> ImagePool:
    """The images of one split of a folder, decoded once and cached until a file changes.

    Classes and files are taken in sorted order. A class's images are the .jpg, .jpeg and .png files (in any letter
    case) directly in its folder; other files, hidden ones and folders inside a class are left alone. What is decoded,
    and what becomes of 16-bit values, is in docs/data.md.

    Raises:
        InputError: root or split folder missing, no classes, a class without images, an image that cannot be read.
    """
    root = Path(os.path.expanduser(root))
    folder = _split_folder(root, split)
    try:
        classes = _classes(folder)
    except OSError as error:
        raise InputError(
            f"cannot list the folder '{error.filename}' ({error.strerror}): check its permissions"
        ) from None
    names = tuple(classes)
    files = [path for images in classes.values() for path in images]
    facts = {
        "decoder": _DECODER,
        "pillow": PIL.__version__,
        "size": size,
        "folder": str(folder.resolve()),
        "files": [[str(path.relative_to(folder)), *_stamp(path)] for path in files],
    }

    def fits(arrays: Arrays) -> bool:
        return arrays.keys() == {"images"} and is_array(arrays["images"], np.uint8, len(files), size, size, 3)

    arrays = cached(f"folder-{split}-{size}", facts, lambda: {"images": _decode_all(files, size)}, fits)
    labels = np.repeat(np.arange(len(names)), [len(images) for images in classes.values()])
    source = one_line(f"folder {root}")
    return ImagePool(torch.from_numpy(arrays["images"]), torch.from_numpy(labels), names, split, source)


def _split_folder(root: Path, split: str) -> Path:
    if not root.exists():
        raise InputError(f"data.root '{root}' does not exist: name the folder that holds train/ val/ test/")
    if not root.is_dir():
        raise InputError(f"data.root '{root}' is a file: name the folder that holds train/ val/ test/")
    for name in _FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    raise InputError(
        f"data.root '{root}' has no folder '{split}': it must hold train/ val/ test/, each with a folder a class"
    )


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    classes = {path.name: _images(path) for path in sorted(folder.iterdir()) if _is_class(path)}
    if not classes:
        raise InputError(f"'{folder}' has no class folders: put each class's images into a folder of its own there")
    for name, images in classes.items():
        if not images:
            raise InputError(
                f"class folder '{folder / name}' has no .jpg, .jpeg or .png files directly in it: add some or delete it"
            )
    return classes


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and not path.is_dir()
    )


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change: what tells an edited file from the one that was decoded."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return status.st_size, status.st_mtime_ns


def _decode_all(files: list[Path], size: int) -> np.ndarray:
    """``[files, size, size, 3]`` uint8."""
    images = np.empty((len(files), size, size, 3), dtype=np.uint8)
    threads = min(8, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)
    with warnings.catch_warnings():  # of all threads
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            decoded = pool.map(lambda path: _decode(path, size), files)
            is_short = len(files) < _MANY_FILES
            bar = tqdm(decoded, "decoding", len(files), unit=" images", mininterval=1, disable=is_short)
            for row, image in enumerate(bar):
                images[row] = image
        finally:
            pool.shutdown(cancel_futures=True)
    return images


def _decode(path: Path, size: int) -> np.ndarray:
    """One image, ``[size, size, 3]`` uint8.

    Resized before it becomes RGB, as released: Pillow takes the nearest pixel in palette and 1-bit images. 16-bit grey
    becomes 8-bit first, by range (:func:`_eight_bits`): what was widened from 8 bits then gives the same bytes again.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
            narrow = image if image.mode in _EIGHT_BITS else _eight_bits(image)
            return np.asarray(narrow.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))
    except Exception as error:  # Pillow's decoders raise many kinds at a damaged file
        raise _unreadable(path, error) from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image as an 8-bit one: ``x * 255 / 65535``, rounded (PNG's sample depth rescaling).

    Raises:
        ValueError: another mode.
    """
    if image.mode not in ("I;16", "I"):  # newer and older Pillow's name of 16-bit grey PNGs
        raise ValueError(f"it has Pillow's mode {image.mode}, which is not supported")
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        reason = f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    elif isinstance(error, UnidentifiedImageError):
        reason = f"it is no {' or '.join(_FORMATS)} image"
    else:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
    return InputError(f"cannot read the image '{path}' ({reason}): replace it or delete it")
