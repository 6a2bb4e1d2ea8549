"""``glyphs``: letters drawn from font files, a data set that needs no download.

A class is a letter of any script together with the letters that look the same. Whole families of classes (the
accented, stroked and cased forms of one letter, and what resembles them) go to one split, so that no test letter, nor
a look-alike of one, is ever trained on. Every image depends on the fonts and on a seed fixed here, never on a run's.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import unicodedata
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, features

from cxgrad_fast.config import InputError
from cxgrad_fast.data.cache import cached
from cxgrad_fast.data.pool import ImagePool

IMAGES_PER_CLASS = 24
VARIANTS = ("default", "hard")

_VERSION = 1  # raise when the code below changes what it draws: cached glyphs are then drawn anew
_SEED = 0x676C79706873  # "glyphs"
_SHARES = {"train": 0.64, "val": 0.16, "test": 0.20}  # of the classes

_CATEGORIES = {"Lu", "Ll", "Lo", "Lt"}  # not Lm: modifier letters are small copies of others
_FACES_AT_LEAST = 8
_EM = 96  # pixels a letter is drawn at, before its ink is fitted into a mask
_MASK, _INK = 64, 56  # a mask's side and the longer side of its ink
_BOX = 32  # side of the box that ink is stretched to when shapes are compared

# overlap (intersection over union) of stretched shapes in more than half of the faces that have both, or in any face
_SAME_CLASS = 0.97
_SAME_FAMILY, _SAME_FAMILY_ANYWHERE = 0.85, 0.97
_LIKE_DIGIT, _LIKE_DIGIT_ANYWHERE = 0.70, 0.78
_LIKE_HANDWRITTEN_DIGIT = "ZzƷʒSsƼƽbgq"  # of any font's digits these differ more than of what hands write

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

_NO_PAIRS = np.zeros((0, 2), dtype=np.int64)

Arrays = dict[str, np.ndarray]


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
    files = _font_files(root)
    fonts = {
        "version": _VERSION,
        "fonts": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files],
        "freetype": features.version("freetype2"),
        "pillow": PIL.__version__,
        "unicode": unicodedata.unidata_version,
        "byteorder": sys.byteorder,
    }

    def draw() -> Arrays:
        atlas = cached("glyphs-atlas", fonts, lambda: _atlas(files))
        return _draw_split(atlas, split, size, variant)

    facts = {**fonts, "size": size, "variant": variant, "split": split}
    arrays = cached(f"glyphs-{split}-{size}-{variant}", facts, draw)
    names = tuple(bytes(arrays["names"]).decode().split("\n")) if len(arrays["names"]) else ()
    return ImagePool(
        images=torch.from_numpy(arrays["images"]),
        labels=torch.arange(len(names)).repeat_interleave(IMAGES_PER_CLASS),
        class_names=names,
        split=split,
        source=f"glyphs ({variant})" + (f" {root}" if root else ""),
    )


# ---------------------------------------------------------------------------------------------------------- fonts


def _font_files(root: str | Path) -> list[Path]:
    if not root:
        import matplotlib

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        # the others have no letters (STIX sizes, Display), boxes for letters (LastResort) or, behind the code points
        # of letters, other things (cm*: U+00C0 is an AE)
        return sorted([*folder.glob("DejaVu*.ttf"), *folder.glob("STIXGeneral*.ttf")])
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise InputError(f"data.root '{root}' is not a folder: name a folder of .ttf or .otf files, or leave it empty")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".ttf", ".otf"} and path.is_file())
    if not files:
        raise InputError(f"data.root '{root}' has no .ttf or .otf files: add fonts, or leave data.root empty")
    return files


class _Face:
    """One font: the letters it has, and the ink of any of its characters."""

    def __init__(self, path: Path) -> None:
        from matplotlib.ft2font import FT2Font

        try:
            mapped = set(FT2Font(str(path)).get_charmap())
            self.letters = sorted(code for code in mapped if unicodedata.category(chr(code)) in _CATEGORIES)
            self._mapped = mapped
            if self.letters:  # bitmap fonts without letters cannot be opened at this size, and need not be
                self._font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)
                self._missing = self._drawn(next(code for code in range(0xE000, sys.maxunicode) if code not in mapped))
        except (OSError, RuntimeError) as error:
            raise InputError(f"cannot read the font '{path}' ({error}): replace it or delete it") from None

    def ink(self, code: int) -> Image.Image | None:
        """What a character looks like, cut to its ink, 8-bit grey; None where the font draws none."""
        if code not in self._mapped:
            return None
        drawn = self._drawn(code)
        box = drawn.getbbox()
        return None if box is None or drawn == self._missing else drawn.crop(box)

    def _drawn(self, code: int) -> Image.Image:
        left, top, right, bottom = self._font.getbbox(chr(code))
        canvas = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(canvas).text((-left, -top), chr(code), fill=255, font=self._font)
        return canvas


def _mask(ink: Image.Image) -> np.ndarray:
    """The ink in its own proportions, centred: ``[64, 64]`` uint8."""
    longer = max(ink.size)
    width, height = (max(1, round(side * _INK / longer)) for side in ink.size)
    top, left = (_MASK - height) // 2, (_MASK - width) // 2
    mask = np.zeros((_MASK, _MASK), dtype=np.uint8)
    mask[top : top + height, left : left + width] = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
    return mask


def _shape(ink: Image.Image) -> np.ndarray:
    """The ink stretched to a square, as a flat vector of zeros and ones: ``[1024]`` float32."""
    return (np.asarray(ink.resize((_BOX, _BOX), Image.Resampling.BOX)).reshape(-1) > 127).astype(np.float32)


def _is_bar(ink: Image.Image) -> bool:
    """An upright stroke, l or I without serifs: how many people write a one."""
    width, height = ink.size
    return height > 2 * width and bool((np.asarray(ink) > 127).mean() > 0.9)


# ---------------------------------------------------------------------------------------------------------- atlas


def _atlas(files: Sequence[Path]) -> Arrays:
    """All letters of all faces, sorted into classes and splits.

    Returns:
        ``masks`` ``[P, 64, 64]`` uint8 of P pairs of letter and face; of each pair its ``letter`` (code point), its
        ``klass`` (code point of the first letter of the class) and its ``split`` (index; -1: left out), ``[P]`` int64.
    """
    faces = [face for face in map(_Face, files) if face.letters]
    codes, counts = np.unique([code for face in faces for code in face.letters], return_counts=True)
    letters = codes[counts >= min(_FACES_AT_LEAST, len(faces))].tolist()
    row = {code: i for i, code in enumerate(letters)}
    masks, pairs, shapes, digits, bars = [], [], [], [], np.zeros(len(letters), dtype=bool)
    for face in faces:
        inks = {row[code]: ink for code in face.letters if code in row and (ink := face.ink(code)) is not None}
        masks += [_mask(ink) for ink in inks.values()]
        pairs += list(inks)
        shapes.append((np.array(list(inks), dtype=np.int64), _stack([_shape(ink) for ink in inks.values()])))
        digits.append(_stack([_shape(ink) for digit in b"0123456789" if (ink := face.ink(digit)) is not None]))
        bars[[i for i, ink in inks.items() if _is_bar(ink)]] = True

    same, alike = _look_alikes(shapes, len(letters))
    classes = _joined(len(letters), same)
    bases = _equals(_base(code) for code in letters)
    families = _joined(len(letters), [*same, *alike, *bases])
    handwritten = np.array([chr(code) in _LIKE_HANDWRITTEN_DIGIT for code in letters], dtype=bool)
    banned = np.zeros(len(letters), dtype=bool)
    # at the first letter of each class
    banned[classes[bars | handwritten | _like_digits(shapes, digits, len(letters))]] = True
    splits = _splits(np.array(letters), classes, families, banned)

    pair = np.array(pairs, dtype=np.int64)
    codes = np.array(letters, dtype=np.int64)
    return {
        "masks": np.stack(masks) if masks else np.zeros((0, _MASK, _MASK), dtype=np.uint8),
        "letter": codes[pair],
        "klass": codes[classes[pair]],
        "split": splits[classes[pair]],
    }


def _stack(shapes: list[np.ndarray]) -> np.ndarray:
    return np.stack(shapes) if shapes else np.zeros((0, _BOX * _BOX), dtype=np.float32)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every shape of ``a`` with every one of ``b``: ``[A, B]``."""
    both = a @ b.T  # counts below 2 ** 24: exact in float32, in any order
    overlap: np.ndarray = both / (a.sum(1)[:, None] + b.sum(1) - both)
    return overlap


def _look_alikes(shapes: Sequence[tuple[np.ndarray, np.ndarray]], letters: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of letters ``[n, 2]`` of one class, and of one family, by their look in the faces that have both."""
    same, alike = [_NO_PAIRS], [_NO_PAIRS]
    for start in range(0, letters, 512):  # in blocks of letters: all pairs at once may not fit
        counts = (min(512, letters - start), letters - start)
        common, equal, close = (np.zeros(counts, dtype=np.int16) for _ in range(3))
        anywhere = np.zeros(counts, dtype=bool)
        for has, shape in shapes:
            low, high = np.searchsorted(has, [start, start + 512])
            overlap = _overlap(shape[low:high], shape[low:])
            where = np.ix_(has[low:high] - start, has[low:] - start)
            common[where] += 1
            equal[where] += overlap >= _SAME_CLASS
            close[where] += overlap >= _SAME_FAMILY
            anywhere[where] |= overlap >= _SAME_FAMILY_ANYWHERE
        same.append(start + np.argwhere(2 * equal > common))
        alike.append(start + np.argwhere(anywhere | (2 * close > common)))
    return np.concatenate(same), np.concatenate(alike)


def _like_digits(
    shapes: Sequence[tuple[np.ndarray, np.ndarray]], digits: Sequence[np.ndarray], letters: int
) -> np.ndarray:
    """Which letters look like a digit of their own face, in most faces or very much so in one: ``[letters]`` bool."""
    common, close = np.zeros(letters, dtype=int), np.zeros((letters, 10), dtype=int)
    anywhere = np.zeros(letters, dtype=bool)
    for (has, shape), digit in zip(shapes, digits, strict=True):
        if len(digit) == 10:
            overlap = _overlap(shape, digit)
            common[has] += 1
            close[has] += overlap >= _LIKE_DIGIT
            anywhere[has] |= (overlap >= _LIKE_DIGIT_ANYWHERE).any(1)
    return anywhere | (2 * close > common[:, None]).any(1)


def _base(code: int) -> str:
    """The plain letter under accents, strokes, ligatures and case: ``o`` for Ö and Ø."""
    plain = _unmarked(chr(code)) or chr(code)
    name = unicodedata.name(plain[0], "").replace("LETTER SMALL CAPITAL", "SMALL LETTER")
    with contextlib.suppress(KeyError):  # strokes and hooks, LATIN SMALL LETTER O WITH STROKE, do not decompose
        plain = _unmarked(unicodedata.lookup(name.partition(" WITH ")[0])) or plain
    return plain[0]


def _unmarked(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text)
    folded = "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()
    return "".join(char for char in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(char))


def _equals(keys: Iterable[Hashable]) -> list[tuple[int, int]]:
    """Pairs of positions that join all equal keys."""
    first: dict[Hashable, int] = {}
    return [(first.setdefault(key, i), i) for i, key in enumerate(keys)]


def _joined(count: int, pairs: Iterable[Sequence[int]]) -> np.ndarray:
    """Of each of ``count`` things, the first thing that a chain of pairs joins it to: ``[count]`` int64."""
    parent = list(range(count))

    def first(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs:
        low, high = sorted((first(i), first(j)))
        parent[high] = low
    return np.array([first(i) for i in range(count)], dtype=np.int64)


def _splits(codes: np.ndarray, classes: np.ndarray, families: np.ndarray, banned: np.ndarray) -> np.ndarray:
    """The split of each class, at its first letter: ``[letters]``, -1 where it is left out.

    Families are taken in the order of a hash of their first letter, each to the split that is furthest below its
    share; one that would upset the shares of the small splits trains. A banned class does not train: where its family
    does, it is left out.
    """
    heads = np.unique(classes)
    members = {family: heads[families[heads] == family] for family in np.unique(families[heads]).tolist()}
    names, shares = tuple(_SHARES), np.array(list(_SHARES.values()))
    filled = np.zeros(len(names))
    splits = np.full(len(codes), -1, dtype=np.int64)

    def order(family: int) -> str:
        return hashlib.sha256(f"glyphs {codes[family]}".encode()).hexdigest()

    for family in sorted(members, key=lambda family: (len(members[family]) <= 0.05 * len(heads), order(family))):
        classes_here = members[family]
        large = len(classes_here) > 0.05 * len(heads)
        split = 0 if large else int(np.argmin(filled / shares))
        if names[split] == "train":
            classes_here = classes_here[~banned[classes_here]]
        splits[classes_here] = split
        filled[split] += len(classes_here)
    return splits


# -------------------------------------------------------------------------------------------------------- drawing


def _draw_split(atlas: Arrays, split: str, size: int, variant: str) -> Arrays:
    """``images`` ``[classes * 24, size, size, 3]`` uint8, and ``names``, a line a class, as UTF-8 bytes."""
    chosen = np.flatnonzero(atlas["split"] == list(_SHARES).index(split))
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
    zoom = (_INK / _MASK) / (_INK_SHARE[0] + (_INK_SHARE[1] - _INK_SHARE[0]) * numbers[4])
    sampling = -(-_MASK // size)  # more samples than pixels where the mask has more, then averaged
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
