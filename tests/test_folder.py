"""folder: images on disk, decoded as the released programs decode them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cxgrad_fast.config import InputError, preset
from cxgrad_fast.data import folder as folder_module
from cxgrad_fast.data.folder import open_folder
from cxgrad_fast.episodes import EpisodeSampler

SIZE = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXGRAD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (31, 23)) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    match mode:
        case "RGB" | "CMYK":
            return Image.fromarray(pixels[..., :3].copy()).convert(mode)
        case "RGBA":
            return Image.fromarray(pixels)
        case "L" | "1" | "LA":
            return Image.fromarray(pixels[..., 0].copy()).convert(mode)
        case "P":
            return Image.fromarray(pixels[..., :3].copy()).quantize(17)
        case other:
            raise ValueError(other)


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG" if path.suffix.lower() == ".png" else "JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train/{ant,bee}, two images each."""
    root = tmp_path / "images"
    for i, name in enumerate(["train/bee/1.png", "train/bee/0.jpg", "train/ant/b.png", "train/ant/a.png"]):
        save(root / name, picture(i))
    return root


def decoded(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))


class TestLayout:
    def test_sorted_classes_and_files(self, root: Path) -> None:
        pool = open_folder("train", SIZE, root)
        assert pool.class_names == ("ant", "bee")
        assert pool.labels.tolist() == [0, 0, 1, 1]
        assert pool.split == "train"
        for row, name in enumerate(["ant/a.png", "ant/b.png", "bee/0.jpg", "bee/1.png"]):
            np.testing.assert_array_equal(pool.images[row].numpy(), decoded(root / "train" / name))

    @pytest.mark.parametrize("name", ["val", "validation", "valid"])
    def test_names_of_the_val_folder(self, root: Path, name: str) -> None:
        save(root / name / "cat" / "0.png", picture(0))
        pool = open_folder("val", SIZE, root)
        assert (pool.split, pool.class_names) == ("val", ("cat",))

    @pytest.mark.parametrize("name", ["x.PNG", "x.JPG", "x.JPEG", "x.jpeg", "x.Jpg"])
    def test_any_letter_case(self, root: Path, name: str) -> None:
        save(root / "train" / "ant" / name, picture(9))
        assert open_folder("train", SIZE, root).labels.tolist() == [0, 0, 0, 1, 1]

    def test_what_is_left_alone(self, root: Path) -> None:
        ant = root / "train" / "ant"
        (ant / ".hidden.png").write_bytes(b"x")
        (ant / "notes.txt").write_text("x")
        save(ant / "nested" / "c.png", picture(5))
        save(ant / "folder.png" / "c.png", picture(5))
        save(root / "train" / ".cache" / "d.png", picture(5))
        (root / "train" / "README.md").write_text("x")
        assert open_folder("train", SIZE, root).labels.tolist() == [0, 0, 1, 1]

    def test_home_folder(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(root.parent))
        assert len(open_folder("train", SIZE, "~/images").labels) == 4

    def test_names_that_no_terminal_can_show(self, root: Path) -> None:
        """Bytes that are no UTF-8, and control characters, are taken, and shown as escapes."""
        strange = root.rename(root.parent / os.fsdecode(b"caf\xe9\nred\x1b"))
        (strange / "train" / "bee").rename(strange / "train" / os.fsdecode(b"b\xff"))
        first, second = (open_folder("train", SIZE, strange) for _ in range(2))
        assert first.class_names == ("ant", "b\udcff")
        assert first.source == rf"folder {root.parent}/caf\udce9 red\x1b"
        assert first.fingerprint() == second.fingerprint()
        with pytest.raises(InputError) as caught:
            EpisodeSampler(first, preset("glyphs-5w1s", {"task.ways": 2}))
        assert rf"class 'ant' of folder {root.parent}/caf\udce9 red\x1b, split" in str(caught.value)
        (strange / "train" / os.fsdecode(b"b\xff") / "0.jpg").write_bytes(b"no image")
        with pytest.raises(InputError) as caught:
            open_folder("train", SIZE, strange)
        shown = rf"{root.parent}/caf\udce9 red\x1b/train/b\udcff/0.jpg"
        assert (
            str(caught.value)
            == f"cannot read the image '{shown}' (it is no JPEG or PNG image): replace it or delete it"
        )


class TestDecoding:
    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [
            ("RGB", ".png"),
            ("RGB", ".jpg"),
            ("L", ".png"),
            ("L", ".jpg"),
            ("LA", ".png"),
            ("RGBA", ".png"),
            ("CMYK", ".jpg"),
            ("P", ".png"),
            ("1", ".png"),
        ],
    )
    def test_as_pillow_decodes(self, root: Path, mode: str, suffix: str) -> None:
        path = root / "test" / "only" / f"image{suffix}"
        save(path, picture(3, mode))
        with Image.open(path) as image:
            assert image.mode == mode
        np.testing.assert_array_equal(open_folder("test", SIZE, root).images[0].numpy(), decoded(path))

    @pytest.mark.parametrize("mode", ["P", "1"])
    def test_palettes_are_resized_before_they_become_rgb(self, root: Path, mode: str) -> None:
        """Pillow then takes the nearest pixel; converting first would blend colours, and differ."""
        path = root / "test" / "only" / "image.png"
        save(path, picture(3, mode))
        image = open_folder("test", SIZE, root).images[0].numpy()
        with Image.open(path) as original:
            blended = np.array(original.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        assert not np.array_equal(image, blended)

    @pytest.mark.parametrize("mode", ["L", "1"])
    def test_widened_grey_gives_the_bytes_of_its_8_bits(self, root: Path, mode: str) -> None:
        """As other programs widen: 255 becomes 65535."""
        grey = picture(3, mode).convert("L")
        save(root / "test" / "only" / "16.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
        save(root / "test" / "only" / "8.png", grey)
        with Image.open(root / "test" / "only" / "16.png") as image:
            assert image.mode == "I;16"
        wide, narrow = open_folder("test", SIZE, root).images.numpy()
        np.testing.assert_array_equal(wide, narrow)
        np.testing.assert_array_equal(narrow, decoded(root / "test" / "only" / "8.png"))

    def test_every_16_bit_grey_is_rounded(self, root: Path) -> None:
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        save(root / "test" / "only" / "ramp.png", Image.fromarray(values))
        (image,) = open_folder("test", 256, root).images.numpy()
        exact = [(2 * x * 255 + 65535) // (2 * 65535) for x in range(65536)]  # x * 255 / 65535, rounded
        np.testing.assert_array_equal(image, np.repeat(np.array(exact).reshape(256, 256, 1), 3, axis=2))

    @pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
    def test_widened_colours_give_the_bytes_of_their_8_bits(self, root: Path, mode: str) -> None:
        image = picture(3, mode)
        save(root / "test" / "only" / "8.png", image)
        pixels = np.asarray(image).astype(">u2") * 257
        header = struct.pack(">IIBBBBB", *image.size, 16, {"RGB": 2, "LA": 4, "RGBA": 6}[mode], 0, 0, 0)
        lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)  # each with its filter, none
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
        (root / "test" / "only" / "16.png").write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
                for name, data in chunks
            )
        )
        wide, narrow = open_folder("test", SIZE, root).images.numpy()
        np.testing.assert_array_equal(wide, narrow)
        np.testing.assert_array_equal(narrow, decoded(root / "test" / "only" / "8.png"))

    def test_older_pillow_s_16_bit_grey(self) -> None:
        values = np.array([[0, 128, 129, 65535]], dtype=np.int32)
        image = folder_module._eight_bits(Image.fromarray(values))
        assert (image.mode, np.asarray(image).tolist()) == ("L", [[0, 0, 1, 255]])
        with pytest.raises(ValueError, match="it has Pillow's mode F, which is not supported"):
            folder_module._eight_bits(Image.new("F", (1, 1)))

    def test_many_images_keep_their_order_and_show_a_bar(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [root / "test" / "only" / f"{i:02}.png" for i in range(40)]
        for i, path in enumerate(paths):
            save(path, picture(i, size=(5 + 7 * (i % 9), 5 + i)))
        monkeypatch.setattr(folder_module, "_MANY_FILES", 40)
        images = open_folder("test", SIZE, root).images.numpy()
        np.testing.assert_array_equal(images, np.stack([decoded(path) for path in paths]))
        shown = capsys.readouterr()
        assert "decoding" in shown.err
        assert not shown.out


class TestCache:
    @pytest.fixture
    def decodes(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The files decoded so far."""
        files: list[Path] = []
        decode = folder_module._decode

        def recording(path: Path, size: int) -> np.ndarray:
            files.append(path)
            return decode(path, size)

        monkeypatch.setattr(folder_module, "_decode", recording)
        return files

    def test_decodes_once(self, root: Path, decodes: list[Path]) -> None:
        first, second = (open_folder("train", SIZE, root) for _ in range(2))
        assert len(decodes) == 4
        assert first.fingerprint() == second.fingerprint()

    def test_a_cached_array_of_another_size(self, root: Path, decodes: list[Path], cache: Path) -> None:
        first = open_folder("train", SIZE, root)
        (path,) = cache.iterdir()
        for shape in ((3, SIZE, SIZE, 3), (4, SIZE, SIZE + 1, 3), (4, SIZE, SIZE)):
            with open(path, "wb") as file:
                np.savez(file, images=np.zeros(shape, np.uint8))
            assert open_folder("train", SIZE, root).fingerprint() == first.fingerprint()
        assert len(decodes) == 16

    def test_other_size(self, root: Path, decodes: list[Path]) -> None:
        open_folder("train", SIZE, root)
        assert open_folder("train", SIZE + 1, root).images.shape[1:] == (SIZE + 1, SIZE + 1, 3)
        assert len(decodes) == 8

    def test_edited_file(self, root: Path, decodes: list[Path]) -> None:
        """Same size in bytes, other time of change."""
        path = root / "train" / "ant" / "a.png"
        os.utime(path, ns=(0, 0))
        before = open_folder("train", SIZE, root).images[0].numpy()
        length = path.stat().st_size
        save(path, picture(77))
        path.write_bytes(path.read_bytes()[:length].ljust(length, b"\0"))
        os.utime(path, ns=(0, 1))
        assert not np.array_equal(open_folder("train", SIZE, root).images[0].numpy(), before)
        assert len(decodes) == 8

    def test_other_length_at_the_same_time(self, root: Path, decodes: list[Path]) -> None:
        path = root / "train" / "ant" / "a.png"
        os.utime(path, ns=(0, 0))
        open_folder("train", SIZE, root)
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(0, 0))
        open_folder("train", SIZE, root)
        assert len(decodes) == 8

    @pytest.mark.parametrize(
        "change",
        [
            lambda train: save(train / "ant" / "c.png", picture(8)),
            lambda train: (train / "ant" / "b.png").unlink(),
            lambda train: (train / "ant" / "b.png").rename(train / "ant" / "c.png"),
        ],
        ids=["added", "deleted", "renamed"],
    )
    def test_other_files(self, root: Path, decodes: list[Path], change: Callable[[Path], object]) -> None:
        open_folder("train", SIZE, root)
        change(root / "train")
        pool = open_folder("train", SIZE, root)
        assert len(decodes) == 4 + len(pool.labels)

    def test_another_root_with_the_same_names_and_times(self, root: Path, decodes: list[Path]) -> None:
        for path in root.rglob("*.png"):
            os.utime(path, ns=(0, 0))
        open_folder("train", SIZE, root)
        root.rename(root.parent / "moved")
        open_folder("train", SIZE, root.parent / "moved")
        assert len(decodes) == 8


class TestBadInput:
    def refused(self, root: Path, split: str = "train") -> str:
        with pytest.raises(InputError) as caught:
            open_folder(split, SIZE, root)
        message = str(caught.value)
        assert "\n" not in message
        return message

    def test_root_missing(self, tmp_path: Path) -> None:
        message = self.refused(tmp_path / "nowhere")
        assert message == f"data.root '{tmp_path}/nowhere' does not exist: name the folder that holds train/ val/ test/"

    def test_root_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "data.zip").write_text("x")
        assert f"data.root '{tmp_path}/data.zip' is a file: name the folder" in self.refused(tmp_path / "data.zip")

    def test_split_missing(self, root: Path) -> None:
        assert f"data.root '{root}' has no folder 'val': it must hold train/ val/ test/" in self.refused(root, "val")

    def test_no_class_folders(self, root: Path) -> None:
        save(root / "test" / "0.png", picture(0))
        assert f"'{root}/test' has no class folders: put each class's images" in self.refused(root, "test")

    def test_class_without_images(self, root: Path) -> None:
        save(root / "train" / "cow" / "nested" / "0.png", picture(0))
        assert f"class folder '{root}/train/cow' has no .jpg, .jpeg or .png files" in self.refused(root)

    @pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=["empty", "text", "truncated"])
    @pytest.mark.parametrize("name", ["0.jpg", "1.png"])
    def test_damaged_image(self, root: Path, cache: Path, name: str, content: bytes | str) -> None:
        path = root / "train" / "bee" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else bytes(content))  # type: ignore[arg-type]
        message = self.refused(root)
        assert message.startswith(f"cannot read the image '{path}' (")
        assert message.endswith("): replace it or delete it")
        assert not list(cache.glob("*"))

    @pytest.mark.parametrize("suffix", [".png", ".jpg"])
    @pytest.mark.parametrize("kind", ["PostScript", "TIFF", "GIF", "BMP"])
    def test_other_formats(self, root: Path, kind: str, suffix: str) -> None:
        """Whatever a file is called; for PostScript Pillow starts another program, and floats would become black."""
        path = root / "train" / "bee" / f"x{suffix}"
        if kind == "PostScript":
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
        else:
            Image.new("F" if kind == "TIFF" else "L", (9, 9)).save(path, kind)
        message = f"cannot read the image '{path}' (it is no JPEG or PNG image): replace it or delete it"
        assert self.refused(root) == message

    def test_what_is_no_regular_file(self, root: Path) -> None:
        path = root / "train" / "bee" / "2.png"
        message = f"cannot read the image '{path}' (it is not a regular file): replace it or delete it"
        path.symlink_to("/dev/zero")
        assert self.refused(root) == message
        path.unlink()
        os.mkfifo(path)
        descriptor = os.open(path, os.O_RDWR)  # opening it does not wait while it is open here
        try:
            os.write(descriptor, b"no image" * 100)
            assert self.refused(root) == message
        finally:
            os.close(descriptor)

    def test_too_large_a_file(self, root: Path) -> None:
        path = root / "train" / "bee" / "1.png"
        os.truncate(path, (1 << 28) + 1)
        reason = "it has 268435457 bytes, more than 268435456"
        assert self.refused(root) == f"cannot read the image '{path}' ({reason}): replace it or delete it"

    @pytest.mark.filterwarnings("default")  # as everywhere but in tests
    @pytest.mark.parametrize("most", [500, 100])  # of 713: Pillow warns above its limit, and raises above twice that
    def test_too_many_pixels(self, root: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        path = root / "train" / "bee" / "1.png"
        for other in root.rglob("*.*g"):
            if other != path:
                save(other, picture(0, size=(5, 5)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        message = f"cannot read the image '{path}' (more than {most} pixels): replace it or delete it"
        assert self.refused(root) == message

    def test_dangling_link(self, root: Path) -> None:
        path = root / "train" / "bee" / "2.png"
        path.symlink_to(root / "gone.png")
        assert f"cannot read the image '{path}' (No such file or directory)" in self.refused(root)
