"""``glyphs``: letters drawn from font files, a data set that needs no download.

Every image depends on the fonts and on a seed fixed here, never on a run's; which letters there are, and which split
they belong to, is :mod:`cxgrad_fast.data.letters`.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import features

from cxgrad_fast.data.cache import Arrays, cached, is_array
from cxgrad_fast.data.letters import INK, MASK, SPLITS, font_digest, font_files, letter_atlas
from cxgrad_fast.data.pool import ImagePool
from cxgrad_fast.printable import one_line

IMAGES_PER_CLASS = 24
VARIANTS = ("default", "hard")

_VERSION = 1  # raise when this file or letters.py changes what is drawn: cached glyphs are then drawn anew
_SEED = 0x676C79706873  # "glyphs"

# of an image: half-ranges around no change, and the size of the ink as a share of the image's side
_ROTATION = 0.30  # radians
_SHEAR = 0.25
_SHIFT = 0.10  # of the image's side
_INK_SHARE = (0.50, 0.75)
_ASPECT = 0.20  # of the logarithm of width over height

# red, green and blue in luminance (Rec. 601)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_GAP = {"default": 0.40, "hard": 0.10}  # least difference in luminance of letter and background
_NOISE = {"default": 0.04, "hard": 0.15}  # greatest standard deviation
_TEXTURE = {"default": 0.0, "hard": 0.5}  # greatest height of the background's texture
_TEXTURE_SIDE = 4


def open_glyphs(split: str, size: int, variant: str = "default", root: str | Path = "") -> ImagePool:
    """The letters of one split, ``size`` x ``size``, 24 images a class.

    Args:
        split: ``train``, ``val`` or ``test``.
        size: side of the images in pixels.
        variant: ``default`` draws light letters on darker backgrounds, luminance at least 0.4 apart, standard deviation
            of the noise at most 0.04; ``hard`` has both polarities, gaps from 0.1, textured backgrounds, noise to 0.15.
        root: a folder of .ttf and .otf files, searched at any depth; empty: matplotlib's own.

    Class names are the letters of a class: ``AΑА`` is Latin, Greek and Cyrillic.

    Raises:
        InputError: no such folder, no fonts in it, a font that cannot be read, or too few letters for the split.
    """
    files = font_files(root)
    fonts = {
        "version": _VERSION,
        "fonts": [font_digest(path) for path in files],
        "freetype": features.version("freetype2"),
        "pillow": PIL.__version__,
        "unicode": unicodedata.unidata_version,
        "byteorder": sys.byteorder,
    }

    def draw() -> Arrays:
        atlas = cached("glyphs-atlas", fonts, lambda: letter_atlas(files), _is_atlas)
        return _draw_split(atlas, split, size, variant)

    facts = {**fonts, "size": size, "variant": variant, "split": split}
    arrays = cached(f"glyphs-{split}-{size}-{variant}", facts, draw, lambda arrays: _is_split(arrays, size))
    names = _names(arrays["names"])
    return ImagePool(
        images=torch.from_numpy(arrays["images"]),
        labels=torch.arange(len(names)).repeat_interleave(IMAGES_PER_CLASS),
        class_names=names,
        split=split,
        source=one_line(f"glyphs ({variant})" + (f" {root}" if root else "")),
    )


def _is_atlas(arrays: Arrays) -> bool:
    """Whether arrays are :func:`letter_atlas`'s."""
    if arrays.keys() != {"masks", "letter", "klass", "split"}:
        return False
    pairs = arrays["split"].size
    are_numbers = all(is_array(arrays[name], np.int64, pairs) for name in ("letter", "klass", "split"))
    return are_numbers and is_array(arrays["masks"], np.uint8, pairs, MASK, MASK)


def _is_split(arrays: Arrays, size: int) -> bool:
    """Whether arrays are :func:`_draw_split`'s."""
    if arrays.keys() != {"images", "names"} or not is_array(arrays["names"], np.uint8, None):
        return False
    try:
        count = len(_names(arrays["names"])) * IMAGES_PER_CLASS
    except UnicodeDecodeError:
        return False
    return is_array(arrays["images"], np.uint8, count, size, size, 3)


def _names(lines: np.ndarray) -> tuple[str, ...]:
    """The class names in a split's ``names``."""
    return tuple(bytes(lines).decode().split("\n")) if len(lines) else ()


def _draw_split(atlas: Arrays, split: str, size: int, variant: str) -> Arrays:
    """``images`` ``[classes * 24, size, size, 3]`` uint8, and ``names``, a line a class, as UTF-8 bytes."""
    chosen = np.flatnonzero(atlas["split"] == SPLITS.index(split))
    chosen = chosen[np.argsort(atlas["klass"][chosen], kind="stable")]
    classes, first, counts = np.unique(atlas["klass"][chosen], return_index=True, return_counts=True)
    images = np.empty((len(classes) * IMAGES_PER_CLASS, size, size, 3), dtype=np.uint8)
    names = []
    for start in range(0, len(classes), 16):
        picks, drawn = [], []
        for i in range(start, min(start + 16, len(classes))):
            pairs = chosen[first[i] : first[i] + counts[i]]
            names.append("".join(map(chr, np.unique(atlas["letter"][pairs]))))
            draws = _Draws(int(classes[i]), size)
            picks.append(pairs[(draws.uniform[:, 0] * len(pairs)).astype(int)])
            drawn.append(draws)
        uniform = np.concatenate([draws.uniform for draws in drawn])
        noise = np.concatenate([draws.noise for draws in drawn])
        cover = _cover(atlas["masks"][np.concatenate(picks)], uniform[:, 1:8], size)
        rows = slice(start * IMAGES_PER_CLASS, start * IMAGES_PER_CLASS + len(cover))
        images[rows] = _colour(cover, uniform[:, 8:], noise, variant)
    return {"images": images, "names": np.frombuffer("\n".join(names).encode(), dtype=np.uint8)}


class _Draws:
    """The random numbers of one class, from numpy's raw Philox stream, which never changes.

    Attributes:
        uniform: ``[24, 37]`` float64 in [0, 1).
        noise: ``[24, size, size, 3]`` float32, mean 0, standard deviation 1, bounded by 2.5.
    """

    def __init__(self, klass: int, size: int) -> None:
        numbers = np.random.Philox(np.random.SeedSequence([_SEED, klass]))
        raw = numbers.random_raw(IMAGES_PER_CLASS * (21 + _TEXTURE_SIDE**2))
        self.uniform = (raw >> np.uint64(11)).reshape(IMAGES_PER_CLASS, -1) * 2.0**-53
        shape = (IMAGES_PER_CLASS, size, size, 3)
        count = int(np.prod(shape))
        pixels = np.random.Philox(np.random.SeedSequence([_SEED, klass, size])).random_raw(-(-count // 4))
        pairs = pixels.view(np.uint8)[: 2 * count].reshape(count, 2).astype(np.float32)
        deviation = np.float32(np.sqrt((256**2 - 1) / 6))  # of the sum of two bytes
        self.noise = ((pairs[:, 0] + pairs[:, 1] - 255) / deviation).reshape(shape)


def _cover(masks: np.ndarray, uniform: np.ndarray, size: int) -> np.ndarray:
    """How much of each pixel its letter covers, ``[n, size, size, 1]`` float32, at most and at its most 1.

    Geometry in float64, rounded to 256 levels: the last bits of another machine's arithmetic do not show.
    """
    numbers = uniform.T
    weight = (1.5 * numbers[0] - 0.5)[:, None, None]  # erosion by halves at most: hairlines must not vanish
    changed = np.where(weight > 0, _neighbours(masks, np.maximum), _neighbours(masks, np.minimum))
    ink = masks + np.abs(weight) * (changed.astype(np.float64) - masks)

    # where in the mask each place of the image lies, both counted from -1 to 1
    signed = 2 * numbers - 1
    angle, shear, stretch = _ROTATION * signed[1], _SHEAR * signed[2], np.exp(_ASPECT / 2 * signed[3])
    zoom = (INK / MASK) / (_INK_SHARE[0] + (_INK_SHARE[1] - _INK_SHARE[0]) * numbers[4])
    sampling = -(-MASK // size)  # more samples than pixels where the mask has more, then averaged
    places = (2 * np.arange(sampling * size) + 1) / (sampling * size) - 1
    across = places[None, None, :] - 2 * _SHIFT * signed[5][:, None, None]
    down = places[None, :, None] - 2 * _SHIFT * signed[6][:, None, None]
    cosine, sine = zoom * np.cos(angle), zoom * np.sin(angle)
    xx, xy, yx, yy = (
        factor[:, None, None]
        for factor in (
            (cosine + shear * sine) / stretch,
            (shear * cosine - sine) / stretch,
            sine * stretch,
            cosine * stretch,
        )
    )
    grid = torch.from_numpy(np.stack([xx * across + xy * down, yx * across + yy * down], axis=3))
    cover = F.grid_sample(torch.from_numpy(ink).unsqueeze(1), grid, align_corners=False)
    cover = F.avg_pool2d(cover, sampling)
    cover = cover / cover.amax((1, 2, 3), keepdim=True)
    return cover.mul_(255).round_().float().div_(255).view(-1, size, size, 1).numpy()


def _neighbours(masks: np.ndarray, choose: np.ufunc) -> np.ndarray:
    """The greatest (smallest) of each pixel and the eight around it."""
    for axis in (1, 2):
        masks = choose(choose(masks, np.roll(masks, 1, axis)), np.roll(masks, -1, axis))  # the margins are empty
    return masks


def _colour(cover: np.ndarray, uniform: np.ndarray, noise: np.ndarray, variant: str) -> np.ndarray:
    """``[n, size, size, 3]`` uint8. Plain float32 products and sums, which are the same on every machine."""
    numbers = uniform.astype(np.float32)
    gap = _GAP[variant] + (1 - _GAP[variant]) * numbers[:, 0]
    dark = (1 - gap) * numbers[:, 1]
    paint, ground = _tinted(dark + gap, numbers[:, 2:6]), _tinted(dark, numbers[:, 6:10])
    if variant == "hard":
        swap = numbers[:, 10] < 0.5
        paint[swap], ground[swap] = ground[swap], paint[swap]
    paint, ground = paint[:, None, None], ground[:, None, None]
    if height := _TEXTURE[variant]:
        ground = ground + height * numbers[:, 11, None, None, None] * _texture(uniform[:, 13:], cover.shape[1])
    image = ground + cover * (paint - ground) + _NOISE[variant] * numbers[:, 12, None, None, None] * noise
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _tinted(luminance: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Colours ``[n, 3]`` of given luminance: grey, moved by chance towards the edge of what can be shown."""
    tint = numbers[:, :3] - (numbers[:, :3] * _LUMINANCE).sum(1, keepdims=True)
    room = np.where(tint > 0, 1 - luminance[:, None], luminance[:, None]) / np.maximum(np.abs(tint), 1e-6)
    colour: np.ndarray = luminance[:, None] + tint * room.min(1, keepdims=True) * numbers[:, 3:]
    return colour


def _texture(numbers: np.ndarray, size: int) -> np.ndarray:
    """Soft blotches between -0.5 and 0.5, ``[n, size, size, 1]`` float32."""
    coarse = torch.from_numpy(numbers - 0.5).view(-1, 1, _TEXTURE_SIDE, _TEXTURE_SIDE)
    fine = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)
    return fine.mul_(255).round_().float().div_(255).view(-1, size, size, 1).numpy()
