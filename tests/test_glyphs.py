"""glyphs: letters drawn from fonts, split so that nothing like a test letter trains."""

from __future__ import annotations

import os
import shutil
import struct
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from cxgrad_fast.config import InputError, preset
from cxgrad_fast.data import ImagePool, glyphs, letters, open_pool
from cxgrad_fast.data.glyphs import open_glyphs

SPLITS = ("train", "val", "test")
TTF = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("glyphs-cache")


@pytest.fixture(autouse=True)
def cache(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the whole session: letters are drawn once. Tests that count drawings set their own."""
    monkeypatch.setenv("CXGRAD_CACHE", str(session_cache))
    return session_cache


@pytest.fixture(scope="session")
def pools(session_cache: Path) -> dict[str, ImagePool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXGRAD_CACHE", str(session_cache))
        return {split: open_pool(preset("glyphs-5w1s"), split) for split in SPLITS}


@pytest.fixture(scope="session")
def split_of(pools: dict[str, ImagePool]) -> dict[str, str]:
    """Letter -> the split it is in."""
    return {letter: split for split, pool in pools.items() for name in pool.class_names for letter in name}


@pytest.fixture(scope="session")
def classmates(pools: dict[str, ImagePool]) -> dict[str, str]:
    """Letter -> all letters of its class."""
    return {letter: name for pool in pools.values() for name in pool.class_names for letter in name}


def base_letter(letter: str) -> str:
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", letter).casefold())
    return next(char for char in decomposed if not unicodedata.combining(char))


def luminance(images: torch.Tensor) -> torch.Tensor:
    return images.float() @ torch.tensor([0.299, 0.587, 0.114]) / 255


def whole_val(pools: dict[str, ImagePool]) -> dict[str, np.ndarray]:
    """What the cache holds of the val split."""
    names = "\n".join(pools["val"].class_names).encode()
    return {"images": pools["val"].images.numpy(), "names": np.frombuffer(names, np.uint8)}


class TestClasses:
    @pytest.mark.slow
    def test_numbers(self, pools: dict[str, ImagePool]) -> None:
        sizes = {split: len(pool.class_names) for split, pool in pools.items()}
        total = sum(sizes.values())
        assert 1400 < total < 1700
        assert sizes["train"] / total == pytest.approx(0.64, abs=0.04)
        assert sizes["val"] / total == pytest.approx(0.16, abs=0.04)
        assert sizes["test"] / total == pytest.approx(0.20, abs=0.04)

    def test_a_task_fits_every_class(self, pools: dict[str, ImagePool]) -> None:
        for pool in pools.values():
            assert pool.class_sizes.unique().tolist() == [24]

    def test_classes_are_letters(self, classmates: dict[str, str]) -> None:
        assert {unicodedata.category(letter) for letter in classmates} == {"Lu", "Ll", "Lo", "Lt"}
        assert not any(unicodedata.name(letter).startswith("MODIFIER") for letter in classmates)

    def test_scripts(self, classmates: dict[str, str]) -> None:
        scripts = {unicodedata.name(letter).split()[0] for letter in classmates}
        assert {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"} <= scripts

    @pytest.mark.parametrize("letters", ["AΑА", "EΕЕ", "cϲс", "KΚK", "pр", "ÏΪЇ", "əǝә", "ΓГ"])
    def test_look_alikes_are_one_class(self, classmates: dict[str, str], letters: str) -> None:
        assert set(letters) <= set(classmates[letters[0]])

    @pytest.mark.parametrize("letters", ["AH", "CG", "EF", "ЕЁ", "nп", "ий", "PR"])
    def test_different_letters_are_not(self, classmates: dict[str, str], letters: str) -> None:
        assert len({classmates[letter] for letter in letters}) == len(letters)

    def test_classes_do_not_chain(self, classmates: dict[str, str]) -> None:
        assert max(map(len, classmates.values())) <= 6


class TestSplit:
    def test_no_letter_twice(self, pools: dict[str, ImagePool]) -> None:
        letters = [letter for pool in pools.values() for name in pool.class_names for letter in name]
        assert len(letters) == len(set(letters))

    def test_accents_and_cases_stay_together(self, split_of: dict[str, str]) -> None:
        splits_of_base: dict[str, set[str]] = {}
        for letter, split in split_of.items():
            splits_of_base.setdefault(base_letter(letter), set()).add(split)
        assert len(splits_of_base) > 300
        assert {base: splits for base, splits in splits_of_base.items() if len(splits) > 1} == {}

    @pytest.mark.parametrize(
        "letters",
        [
            "aáäÀăậA",
            "eèęЁёЀ",
            "uüŭU",
            "kĸкᴋќЌ",  # small capitals and what other scripts have for them
            "yуўỳY",
            "sśŝꜱ",
            "dđð",
            "tŧτᴛ",
            "gɡ",
            "hнħ",
            "aɑα",
            "иᴎ",
        ],
    )
    def test_relatives_stay_together(self, split_of: dict[str, str], letters: str) -> None:
        found = [letter for letter in letters if letter in split_of]
        assert len(found) >= 2
        assert len({split_of[letter] for letter in found}) == 1

    def test_shapes_alike_stay_together(self, split_of: dict[str, str]) -> None:
        """Drawn again here, with another size and another program than the source's own."""
        font = ImageFont.truetype(TTF / "DejaVuSans.ttf", 120)
        names = sorted(set(split_of) & charmap("DejaVuSans.ttf"))
        shapes = torch.stack([stretched(font, letter) for letter in names])
        both = shapes @ shapes.T
        overlap = both / (shapes.sum(1)[:, None] + shapes.sum(1) - both)
        found = (overlap > 0.975).triu(1).nonzero().tolist()
        assert len(found) > 80
        assert [(names[i], names[j]) for i, j in found if split_of[names[i]] != split_of[names[j]]] == []

    def test_no_digit_and_nothing_like_one_trains(self, pools: dict[str, ImagePool], split_of: dict[str, str]) -> None:
        trained = {letter for letter, split in split_of.items() if split == "train"}
        assert not {letter for letter in split_of if unicodedata.category(letter).startswith("N")}
        assert not trained & set("0123456789OoОоΟοօՕᴏIlІӀӏıΙЗзBВвΒƻƼΘθӨөƟɵбSЅsѕZΖzbgqƷӠʒ")
        assert trained & set("óöőŠŽ")  # their accented relatives may


def charmap(name: str) -> set[str]:
    return {chr(code) for code in FT2Font(str(TTF / name)).get_charmap()}


def stretched(font: ImageFont.FreeTypeFont, letter: str) -> torch.Tensor:
    left, top, right, bottom = font.getbbox(letter)
    image = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), letter, fill=255, font=font)
    box = image.crop(image.getbbox()).resize((40, 40), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(box).reshape(-1) > 127).float()


class TestImages:
    def test_drawing_again_gives_the_same_bytes(
        self, pools: dict[str, ImagePool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session_cache: Path
    ) -> None:
        (atlas,) = session_cache.glob("glyphs-atlas*")
        shutil.copy(atlas, tmp_path)
        monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path))
        assert open_glyphs("val", 28).fingerprint() == pools["val"].fingerprint()

    def test_the_seed_of_a_run_does_not_matter(self, pools: dict[str, ImagePool]) -> None:
        pool = open_pool(preset("glyphs-5w1s", {"run.seed": 5}), "val")
        assert pool.fingerprint() == pools["val"].fingerprint()

    def test_cached(self, pools: dict[str, ImagePool], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(glyphs, "_draw_split", None)
        assert open_glyphs("val", 28).fingerprint() == pools["val"].fingerprint()

    @pytest.mark.parametrize("other", ["rows", "size", "type", "text", "names", "missing"])
    def test_other_arrays_in_the_cache_are_drawn_anew(
        self,
        other: str,
        pools: dict[str, ImagePool],
        session_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path))
        for path in session_cache.glob("glyphs-val-28-default-*"):
            with np.load(path) as arrays:
                images, names = arrays["images"], arrays["names"]
            changed = {
                "rows": {"images": images[:-24]},
                "size": {"images": images[:, :-1]},
                "type": {"images": images.astype(np.int16)},
                "text": {"names": np.frombuffer(b"\xff" + names.tobytes()[1:], np.uint8)},
                "names": {"names": names[:0]},
                "missing": {},
            }[other]
            whole = {"images": images, "names": names} if changed else {"names": names}
            np.savez(tmp_path / path.name, **whole | changed)
        drawn: list[str] = []
        monkeypatch.setattr(glyphs, "_draw_split", lambda atlas, split, *rest: drawn.append(split) or whole_val(pools))
        monkeypatch.setattr(glyphs, "letter_atlas", lambda files: {})
        assert open_glyphs("val", 28).fingerprint() == pools["val"].fingerprint()
        assert drawn == ["val"]

    def test_an_atlas_is_told_from_other_arrays(self) -> None:
        numbers = np.zeros(3, np.int64)
        atlas = {"masks": np.zeros((3, 64, 64), np.uint8), "letter": numbers, "klass": numbers, "split": numbers}
        assert glyphs._is_atlas(atlas)
        for other in (
            {"masks": np.zeros((2, 64, 64), np.uint8)},
            {"masks": np.zeros((3, 64, 64), bool)},
            {"klass": numbers.astype(np.int32)},
            {"split": np.array(3)},
            {"more": numbers},
        ):
            assert not glyphs._is_atlas(atlas | other)
        assert not glyphs._is_atlas({})

    def test_images_of_a_class_differ(self, pools: dict[str, ImagePool]) -> None:
        images = pools["val"].images.view(-1, 24, 28 * 28 * 3)
        for drawn in images[:50]:
            assert len(drawn.unique(dim=0)) == 24

    def test_letters_are_lighter_by_the_gap(self, pools: dict[str, ImagePool]) -> None:
        """The corners show the background, the lightest pixels the letter; noise lifts and lowers both a little."""
        light = luminance(pools["val"].images)
        ground = light[:, [0, 0, -1, -1], [0, -1, 0, -1]].median(1).values
        letter = light.flatten(1).topk(4).values.mean(1)
        gap = letter - ground
        assert gap.quantile(0.002) > 0.35
        assert gap.median() > 0.5
        darkest = light.flatten(1).quantile(0.02, dim=1)
        assert (ground - darkest).max() < 0.15  # nothing is darker than the background, but for noise

    def test_noise_is_slight(self, pools: dict[str, ImagePool]) -> None:
        corner = pools["val"].images[:, :3, :3].float().flatten(1, 2) / 255
        assert corner.std(1).mean(1).quantile(0.95) < 0.045

    def test_colours_vary(self, pools: dict[str, ImagePool]) -> None:
        corner = pools["val"].images[:, 0, 0].float()
        assert (corner.amax(1) - corner.amin(1) > 40).float().mean() > 0.2

    def test_letters_are_inside(self, pools: dict[str, ImagePool]) -> None:
        light = luminance(pools["val"].images)
        frame = torch.cat([light[:, 0], light[:, -1], light[:, :, 0], light[:, :, -1]], 1)
        assert (frame.amax(1) - frame.median(1).values < 0.2).float().mean() > 0.9

    def test_hard_has_both_polarities_and_more_noise(self, pools: dict[str, ImagePool]) -> None:
        hard = open_glyphs("val", 28, "hard")
        assert hard.class_names == pools["val"].class_names
        assert hard.fingerprint() != pools["val"].fingerprint()
        light, default = luminance(hard.images), luminance(pools["val"].images)
        shape = default - default.flatten(1).mean(1)[:, None, None]  # same letters in the same places
        sign = (shape * (light - light.flatten(1).mean(1)[:, None, None])).flatten(1).sum(1) > 0
        assert 0.4 < sign.float().mean() < 0.6
        corner = [pool.images[:, :3, :3].float().flatten(1, 2).std(1).mean() for pool in (hard, pools["val"])]
        assert corner[0] > 2 * corner[1]

    def test_learnable_but_not_trivial(self, pools: dict[str, ImagePool]) -> None:
        """Nearest class mean of raw pixels, one shot of five classes."""
        images = pools["val"].images.float().flatten(1).view(-1, 24, 28 * 28 * 3)
        generator = torch.Generator().manual_seed(0)
        correct = []
        for _ in range(60):
            task = images[torch.randperm(len(images), generator=generator)[:5]]
            nearest = torch.cdist(task[:, 1:16].reshape(75, -1), task[:, 0]).argmin(1)
            correct.append((nearest == torch.arange(5).repeat_interleave(15)).float().mean())
        assert 0.23 < torch.stack(correct).mean() < 0.6


class TestFonts:
    """A folder of one's own fonts."""

    @pytest.fixture
    def fonts(self, tmp_path: Path) -> Path:
        folder = tmp_path / "fonts"
        (folder / "more").mkdir(parents=True)
        shutil.copy(TTF / "STIXGeneralItalic.ttf", folder / "italic.TTF")
        shutil.copy(TTF / "STIXGeneralBol.ttf", folder / "more" / "bold.ttf")
        return folder

    def test_own_fonts(self, fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "cache"))
        config = preset("glyphs-5w1s", {"data.root": str(fonts), "model.image_size": 40})
        pool = open_pool(config, "test")
        assert pool.images.shape[1:] == (40, 40, 3)
        assert str(fonts) in pool.source
        assert len(pool.class_names) > 50
        (fonts / "more" / "bold.ttf").unlink()
        assert open_pool(config, "test").fingerprint() != pool.fingerprint()

    def test_letters_without_an_outline_are_left_out(self) -> None:
        face = letters._Face(TTF / "DejaVuSans.ttf")
        assert face.ink(ord("A")) is not None
        assert face.ink(ord(" ")) is None
        assert face.ink(0xE000) is None  # not in the font: its box is no letter

    def test_root_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere' is not a folder: name a folder of \.ttf"):
            open_glyphs("test", 28, root=tmp_path / "nowhere")

    def test_no_fonts(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no \.ttf or \.otf files"):
            open_glyphs("test", 28, root=tmp_path)

    def test_damaged_font(self, fonts: Path) -> None:
        (fonts / "broken.ttf").write_bytes(b"no font")
        with pytest.raises(InputError, match=r"cannot read the font '.*broken.ttf' \(.*\): replace it or delete it"):
            open_glyphs("test", 28, root=fonts)

    @pytest.mark.parametrize("fill", [1, 0xFF])
    def test_damaged_outlines(self, fonts: Path, fill: int) -> None:
        """The font opens; its letters cannot be drawn."""
        path = fonts / "more" / "bold.ttf"
        content = bytearray(path.read_bytes())
        (tables,) = struct.unpack_from(">H", content, 4)
        entries = [struct.unpack_from(">4s4xII", content, 12 + 16 * table) for table in range(tables)]
        start, length = next(place for name, *place in entries if name == b"glyf")
        content[start : start + length] = bytes([fill]) * length
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read the font '.*bold.ttf' \(invalid .*\): replace it or delete"):
            open_glyphs("test", 28, root=fonts)

    def test_letters_of_thousands_of_pixels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their image would not fit into memory."""
        face = letters._Face(TTF / "DejaVuSans.ttf")
        monkeypatch.setattr(letters, "_WIDEST", 50)
        with pytest.raises(
            InputError, match=r"cannot read the font '.*' \(character U\+0041 is .* pixels at size 96\)"
        ):
            face.ink(ord("A"))

    def test_ink_too_faint_for_a_shape_is_like_nothing(self) -> None:
        shapes = np.array([[0, 0, 0], [0, 1, 1]], np.float32)
        assert letters._overlap(shapes, shapes).tolist() == [[0, 0], [0, 1]]

    def test_what_cannot_be_read(self, fonts: Path) -> None:
        os.mkfifo(fonts / "pipe.ttf")  # no font, as other kinds of files
        path = fonts / "italic.TTF"
        os.truncate(path, (1 << 28) + 1)
        with pytest.raises(
            InputError, match=r"cannot read the font '.*italic.TTF' \(it has 268435457 bytes, more than "
        ):
            open_glyphs("test", 28, root=fonts)

    def test_fonts_without_letters(self, tmp_path: Path) -> None:
        shutil.copy(TTF / "STIXSizTwoSymReg.ttf", tmp_path / "symbols.ttf")
        with pytest.raises(InputError, match="has no images in its split 'train'"):
            open_glyphs("train", 28, root=tmp_path)
