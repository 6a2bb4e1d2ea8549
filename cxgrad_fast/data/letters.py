"""The letters that font files hold: their shapes, which of them are one class, and which split a class belongs to.

A class is a letter of any script together with the letters that look the same. Whole families of classes (the
accented, stroked and cased forms of one letter, and what resembles them) go to one split, so that no test letter, nor
a look-alike of one, is ever trained on.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cxgrad_fast.config import InputError
from cxgrad_fast.data.cache import Arrays
from cxgrad_fast.files import open_regular, sha256

MASK, INK = 64, 56  # a mask's side and the longer side of its ink
SPLITS = ("train", "val", "test")

_SHARES = (0.64, 0.16, 0.20)  # of the classes, by split
_CATEGORIES = {"Lu", "Ll", "Lo", "Lt"}  # not Lm: modifier letters are small copies of others
_FACES_AT_LEAST = 8
_EM = 96  # pixels a letter is drawn at, before its ink is fitted into a mask
_WIDEST = 64 * _EM  # no letter is so wide or high
_BOX = 32  # side of the box that ink is stretched to when shapes are compared

# overlap (intersection over union) of stretched shapes in more than half of the faces that have both, or in any face
_SAME_CLASS = 0.97
_SAME_FAMILY, _SAME_FAMILY_ANYWHERE = 0.85, 0.97
_LIKE_DIGIT, _LIKE_DIGIT_ANYWHERE = 0.70, 0.78
_LIKE_HANDWRITTEN_DIGIT = "ZzƷʒSsƼƽbgq"  # of any font's digits these differ more than of what hands write

_NO_PAIRS = np.zeros((0, 2), dtype=np.int64)


def font_files(root: str | Path) -> list[Path]:
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


def font_digest(path: Path) -> str:
    """The SHA-256 of a font file.

    Raises:
        InputError: it cannot be read.
    """
    with _reading(path), open_regular(path) as file:
        return sha256(file)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what FreeType, through Pillow and matplotlib, says of a damaged font into one line."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, OverflowError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"cannot read the font '{path}' ({reason}): replace it or delete it") from None


class _Face:
    """One font: the letters it has, and the ink of any of its characters.

    Raises:
        InputError: the font cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from matplotlib.ft2font import FT2Font

        self._path = path
        with _reading(path):
            mapped = set(FT2Font(str(path)).get_charmap())
            self.letters = sorted(code for code in mapped if unicodedata.category(chr(code)) in _CATEGORIES)
            self._mapped = mapped
            if self.letters:  # bitmap fonts without letters cannot be opened at this size, and need not be
                self._font = ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)
                self._missing = self._drawn(next(code for code in range(0xE000, sys.maxunicode) if code not in mapped))

    def ink(self, code: int) -> Image.Image | None:
        """What a character looks like, cut to its ink, 8-bit grey; None where the font draws none.

        Raises:
            InputError: its outline is damaged.
        """
        if code not in self._mapped:
            return None
        with _reading(self._path):
            drawn = self._drawn(code)
        box = drawn.getbbox()
        return None if box is None or drawn == self._missing else drawn.crop(box)

    def _drawn(self, code: int) -> Image.Image:
        left, top, right, bottom = self._font.getbbox(chr(code))
        if max(right - left, bottom - top) > _WIDEST:
            raise ValueError(f"character U+{code:04X} is {right - left:.0f} x {bottom - top:.0f} pixels at size {_EM}")
        canvas = Image.new("L", (int(right - left), int(bottom - top)))
        ImageDraw.Draw(canvas).text((-left, -top), chr(code), fill=255, font=self._font)
        return canvas


def _mask(ink: Image.Image) -> np.ndarray:
    """The ink in its own proportions, centred: ``[64, 64]`` uint8."""
    longer = max(ink.size)
    width, height = (max(1, round(side * INK / longer)) for side in ink.size)
    top, left = (MASK - height) // 2, (MASK - width) // 2
    mask = np.zeros((MASK, MASK), dtype=np.uint8)
    mask[top : top + height, left : left + width] = np.asarray(ink.resize((width, height), Image.Resampling.BOX))
    return mask


def _shape(ink: Image.Image) -> np.ndarray:
    """The ink stretched to a square, as a flat vector of zeros and ones: ``[1024]`` float32."""
    return (np.asarray(ink.resize((_BOX, _BOX), Image.Resampling.BOX)).reshape(-1) > 127).astype(np.float32)


def _is_bar(ink: Image.Image) -> bool:
    """An upright stroke, l or I without serifs: how many people write a one."""
    width, height = ink.size
    return height > 2 * width and bool((np.asarray(ink) > 127).mean() > 0.9)


def letter_atlas(files: Sequence[Path]) -> Arrays:
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
        "masks": np.stack(masks) if masks else np.zeros((0, MASK, MASK), dtype=np.uint8),
        "letter": codes[pair],
        "klass": codes[classes[pair]],
        "split": splits[classes[pair]],
    }


def _stack(shapes: list[np.ndarray]) -> np.ndarray:
    return np.stack(shapes) if shapes else np.zeros((0, _BOX * _BOX), dtype=np.float32)


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every shape of ``a`` with every one of ``b``: ``[A, B]``."""
    both = a @ b.T  # counts below 2 ** 24: exact in float32, in any order
    either = a.sum(1)[:, None] + b.sum(1) - both
    overlap: np.ndarray = np.divide(both, either, out=np.zeros_like(both), where=either > 0)  # faint ink leaves none
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
    names, shares = SPLITS, np.array(_SHARES)
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
