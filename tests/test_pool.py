"""The door to the sources, the cache of their arrays, and the episodes that are drawn from a pool."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import give_away
from torch.utils._python_dispatch import TorchDispatchMode

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.config import Config, InputError, preset
from cxgrad_fast.data import ImagePool, open_pool
from cxgrad_fast.data.cache import Arrays, cached, is_array
from cxgrad_fast.episodes import EpisodeSampler, Upcoming

SMALL = {"task.ways": 3, "task.shots": 2, "task.queries": 4, "model.image_size": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CXGRAD_CACHE", str(folder))
    return folder


def numbered_pool(sizes: list[int], split: str = "train") -> ImagePool:
    """A pool whose image of row ``r`` is grey ``r`` all over: an episode shows which rows it drew."""
    count = sum(sizes)
    return ImagePool(
        images=torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 16, 16, 3).contiguous(),
        labels=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64)),
        class_names=tuple(f"class {i}" for i in range(len(sizes))),
        split=split,
        source="numbers",
    )


def rows_of(images: torch.Tensor) -> np.ndarray:
    return (images[:, :, 0, 0, 0] * 255).round().long().numpy()


class TestDoor:
    def test_the_cross_domain_source_does_not_take_the_root_of_the_training_data(self, tmp_path: Path) -> None:
        config = preset("released-mini-5w1s", {"data.root": str(tmp_path / "missing"), "model.image_size": 16})
        assert open_pool(config, "test", source="digits").source == "digits"
        with pytest.raises(InputError, match="missing"):
            open_pool(config, "test")

    def test_unknown_split(self) -> None:
        with pytest.raises(InputError, match="unknown split 'dev'"):
            open_pool(preset("glyphs-5w1s"), "dev")

    def test_unknown_source(self) -> None:
        with pytest.raises(InputError, match="unknown source of images 'pets'"):
            open_pool(preset("glyphs-5w1s"), "test", source="pets")


class Built:
    """Counts how often the arrays had to be made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Arrays:
        self.times += 1
        return {
            "images": (np.arange(50_000) % 251).astype(np.uint8).reshape(50, 1000),
            "names": np.frombuffer(b"ab", np.uint8),
        }


def fits(arrays: Arrays) -> bool:
    is_whole = is_array(arrays.get("images"), np.uint8, 50, 1000) and is_array(arrays.get("names"), np.uint8, None)
    return is_whole and len(arrays) == 2


def check_whole(arrays: Arrays) -> None:
    expected = Built()()
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype


def _store_and_delete(rounds: int) -> None:
    for _ in range(rounds):
        arrays = cached("thing", "same", Built(), fits)
        check_whole(arrays)
        for path in Path(os.environ["CXGRAD_CACHE"]).glob("*.npz"):
            path.unlink(missing_ok=True)


class TestCache:
    def test_equal_facts_are_built_once(self, cache: Path) -> None:
        build = Built()
        for _ in range(3):
            check_whole(cached("thing", {"a": 1, "b": [2]}, build, fits))
        assert build.times == 1
        assert len(list(cache.iterdir())) == 1

    @pytest.mark.parametrize(("name", "facts"), [("thing", {"a": 2}), ("other", {"a": 1})])
    def test_other_facts_are_built_anew(self, name: str, facts: object) -> None:
        build = Built()
        cached("thing", {"a": 1}, build, fits)
        cached(name, facts, build, fits)
        assert build.times == 2

    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:100],
            lambda data: data[:-30],
            lambda data: b"not a zip file at all",
            lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],  # one bit, in the middle of an array
            lambda data: data.replace(b"(50, 1000)", b"(40, 1000)"),
        ],
        ids=["empty", "head only", "end missing", "other content", "one bit", "fewer rows"],
    )
    def test_damaged_file_is_built_anew(self, cache: Path, damage: Callable[[bytes], bytes]) -> None:
        build = Built()
        cached("thing", 1, build, fits)
        (path,) = cache.iterdir()
        path.write_bytes(damage(path.read_bytes()))
        check_whole(cached("thing", 1, build, fits))
        assert build.times == 2
        check_whole(cached("thing", 1, build, fits))
        assert build.times == 2

    def test_pickles_are_not_opened(self, cache: Path) -> None:
        cached("thing", 1, Built(), fits)
        (path,) = cache.iterdir()
        with open(path, "wb") as file:
            np.savez(file, images=np.array([{"an": "object"}], dtype=object))
        check_whole(cached("thing", 1, Built(), fits))

    def test_unwritable_folder_costs_one_line(self, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache.write_text("a file stands where the folder should be")
        build = Built()
        for _ in range(2):
            check_whole(cached("thing", 1, build, fits))
        assert build.times == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"cxgrad_fast: cannot use the cache folder '{cache}' (Not a directory): going on without"

    def test_failing_write_leaves_nothing_behind(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(file: object, **arrays: np.ndarray) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        check_whole(cached("thing", 1, Built(), fits))
        assert list(cache.iterdir()) == []

    def test_full_disk_costs_one_line(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def full(file: object, **arrays: np.ndarray) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(np, "savez", full)
        for _ in range(2):
            check_whole(cached("thing", 1, Built(), fits))
        (line,) = capsys.readouterr().err.splitlines()
        assert (
            line == f"cxgrad_fast: cannot write the cache folder '{cache}' (No space left on device): going on without"
        )

    @pytest.mark.parametrize(
        "other",
        [
            {"images": np.zeros((49, 1000), np.uint8)},
            {"images": np.zeros((50, 1000, 1), np.uint8)},
            {"images": np.zeros((50, 1000), np.int64)},
            {"images": np.zeros((50, 1000), ">u2")},
            {"names": np.array(0, np.uint8)},
            {"names": np.array("ab")},
            {"more": np.zeros(1)},
        ],
        ids=["rows", "dimensions", "type", "byte order", "number", "text", "more arrays"],
    )
    def test_other_arrays_are_built_anew(self, cache: Path, other: Arrays) -> None:
        cached("thing", 1, Built(), fits)
        (path,) = cache.iterdir()
        with open(path, "wb") as file:
            np.savez(file, **Built()() | other)  # type: ignore[arg-type]
        build = Built()
        for _ in range(2):
            check_whole(cached("thing", 1, build, fits))
        assert build.times == 1

    def test_a_missing_array_is_built_anew(self, cache: Path) -> None:
        cached("thing", 1, Built(), fits)
        (path,) = cache.iterdir()
        with open(path, "wb") as file:
            np.savez(file, names=Built()()["names"])
        check_whole(cached("thing", 1, Built(), fits))

    @pytest.mark.parametrize("bits", [0o620, 0o602])
    def test_a_file_that_others_can_write_is_built_anew(self, cache: Path, bits: int) -> None:
        build = Built()
        cached("thing", 1, build, fits)
        (path,) = cache.iterdir()
        path.chmod(bits)
        cached("thing", 1, build, fits)
        assert (build.times, path.stat().st_mode & 0o777) == (2, 0o600)

    def test_a_file_of_somebody_else_s_is_built_anew(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build = Built()
        cached("thing", 1, build, fits)
        (path,) = cache.iterdir()
        give_away(path, monkeypatch)
        cached("thing", 1, build, fits)
        assert build.times == 2

    def test_a_link_is_not_followed(self, cache: Path, tmp_path: Path) -> None:
        build = Built()
        cached("thing", 1, build, fits)
        (path,) = cache.iterdir()
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
        before = (tmp_path / "elsewhere").read_bytes()
        cached("thing", 1, build, fits)
        assert build.times == 2
        assert not path.is_symlink()
        assert (tmp_path / "elsewhere").read_bytes() == before

    @pytest.mark.parametrize("bits", [0o770, 0o707])
    def test_a_folder_that_others_can_write_is_not_used(
        self, cache: Path, bits: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build = Built()
        cached("thing", 1, build, fits)
        cache.chmod(bits)
        for _ in range(2):
            check_whole(cached("thing", 1, build, fits))
            check_whole(cached("thing", 2, build, fits))
        assert build.times == 5
        assert len(list(cache.iterdir())) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == (
            f"cxgrad_fast: cannot use the cache folder '{cache}' "
            f"(others can write '{cache}': chmod go-w '{cache}'): going on without"
        )

    @pytest.mark.slow
    def test_a_pipe_is_built_anew(self, cache: Path) -> None:
        """Nobody writes into it: opening it the usual way would wait for ever."""
        cached("thing", 1, Built(), fits)
        (path,) = cache.iterdir()
        path.unlink()
        os.mkfifo(path)
        command = "import test_pool as t; t.check_whole(t.cached('thing', 1, t.Built(), t.fits))"
        subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent, check=True, timeout=100)
        assert path.is_file()

    def test_what_a_killed_process_left_goes(self, cache: Path) -> None:
        command = (
            "import os, signal, numpy as np, test_pool as t\n"
            "np.savez = lambda file, **arrays: os.kill(os.getpid(), signal.SIGKILL)\n"
            "t.cached('thing', 1, t.Built(), t.fits)"
        )
        done = subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent, timeout=100)
        assert done.returncode == -signal.SIGKILL
        (left,) = cache.iterdir()
        cached("other", 1, Built(), fits)
        assert not left.exists()

    @pytest.mark.slow
    def test_two_processes_at_once(self, cache: Path) -> None:
        context = multiprocessing.get_context("spawn")  # fork may deadlock beside torch's threads
        processes = [context.Process(target=_store_and_delete, args=(40,)) for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert {path.suffix for path in cache.iterdir()} <= {".npz"}

    def test_where_it_lives(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder() == tmp_path / "cache"
        monkeypatch.delenv("CXGRAD_CACHE")
        assert cache_folder() == tmp_path / "xdg" / "cxgrad_fast"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert cache_folder() == tmp_path / "home" / ".cache" / "cxgrad_fast"


def sampler(sizes: list[int], split: str = "train", **settings: object) -> EpisodeSampler:
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    return EpisodeSampler(numbered_pool(sizes, split), preset("glyphs-5w1s", {**SMALL, **overrides}))


SAMPLERS = pytest.mark.parametrize("kind", ["counter", "released"])


class TestEpisodes:
    @SAMPLERS
    def test_labels_and_sets(self, kind: str) -> None:
        sizes = [9, 6, 12, 7, 10]
        pool = numbered_pool(sizes)
        episodes = sampler(sizes, data__sampler=kind).sample(0, 40)
        assert episodes.support_x.shape == (40, 6, 3, 16, 16)
        assert episodes.query_x.shape == (40, 12, 3, 16, 16)
        assert episodes.support_y.tolist() == [[0, 0, 1, 1, 2, 2]] * 40
        assert episodes.query_y.tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 40
        support, query = rows_of(episodes.support_x), rows_of(episodes.query_x)
        for task in range(40):
            drawn = [*support[task], *query[task]]
            assert len(set(drawn)) == 18  # no image twice, so none in both sets
            classes = pool.labels[support[task]].view(3, 2)
            assert len(set(classes[:, 0].tolist())) == 3
            assert (classes[:, 0] == classes[:, 1]).all()
            assert torch.equal(pool.labels[query[task]].view(3, 4), classes[:, :1].expand(3, 4))

    @SAMPLERS
    def test_every_image_of_every_class_is_drawn_in_every_place(self, kind: str) -> None:
        rows = sampler([7, 6, 8, 9], data__sampler=kind).indices(0, 400)
        for place in range(6):
            assert set(rows[:, :, place].reshape(-1).tolist()) == set(range(30))

    @SAMPLERS
    def test_a_task_depends_on_its_index_alone(self, kind: str) -> None:
        draw = sampler([9] * 6, data__sampler=kind)
        alone, among = draw.sample(3, 1), draw.sample(0, 4)[3:4]
        assert torch.equal(alone.support_x, among.support_x)
        assert torch.equal(alone.query_x, among.query_x)
        assert not np.array_equal(draw.indices(3, 1), draw.indices(4, 1))

    @SAMPLERS
    def test_a_task_depends_on_the_seed(self, kind: str) -> None:
        first, second = (sampler([9] * 6, data__sampler=kind, run__seed=seed).indices(0, 5) for seed in (0, 1))
        assert not np.array_equal(first, second)

    def test_a_task_depends_on_the_split(self) -> None:
        train, test = (sampler([9] * 6, split).indices(0, 5) for split in ("train", "test"))
        assert not np.array_equal(train, test)

    def test_counter_draws_never_change(self) -> None:
        """Recorded: a change would silently make old runs impossible to repeat."""
        assert sampler([9] * 6, task__queries=1).indices(7, 1)[0].tolist() == [
            [13, 14, 10],
            [24, 22, 19],
            [29, 34, 30],
        ]

    @pytest.mark.parametrize("seed", [0, 3])
    def test_released_draws(self, seed: int) -> None:
        sizes = [11, 9, 30, 25, 8, 20]
        rows = sampler(sizes, data__sampler="released", run__seed=seed).indices(5, 20)
        first = np.cumsum([0, *sizes])
        for index in range(20):
            rng = np.random.RandomState(np.random.RandomState(seed).randint(1, 999999) + 5 + index)
            classes = rng.choice(list(range(len(sizes))), 3, False)
            rng.shuffle(classes)
            rng.randint(0, 4, 3)  # the rotations
            expected = [[first[c] + k for k in rng.choice(sizes[c], 2 + 4, False)] for c in classes]
            assert rows[index].tolist() == expected

    def test_too_few_classes(self) -> None:
        with pytest.raises(InputError, match=r"task.ways \(=3\) is more than the 2 classes of numbers, split 'train'"):
            sampler([9, 9])

    def test_too_few_images(self) -> None:
        with pytest.raises(InputError, match=r"class 'class 1' of numbers.* has 5 images; .*\(=2 \+ 4\) needs 6"):
            sampler([9, 5, 9])

    def test_exactly_enough(self) -> None:
        rows = sampler([6, 6, 6]).indices(0, 1)
        assert sorted(rows.reshape(-1).tolist()) == list(range(18))


class TestUnits:
    def episode(self, **settings: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Drawn support images, and the pool's images they came from, ``[6, 3, 16, 16]`` in [0, 1]."""
        pool = numbered_pool([30] * 4)
        generator = torch.Generator().manual_seed(0)
        pool.images[:] = torch.randint(0, 256, pool.images.shape, dtype=torch.uint8, generator=generator)
        overrides = {name.replace("__", "."): value for name, value in settings.items()}
        config: Config = preset("glyphs-5w1s", {**SMALL, **overrides})
        draw = EpisodeSampler(pool, config, torch.float64)
        rows = torch.from_numpy(draw.indices(0, 1)[0, :, :2].reshape(-1))
        return draw.sample(0, 1).support_x[0], pool.images[rows].permute(0, 3, 1, 2).double() / 255

    def test_plain(self) -> None:
        drawn, images = self.episode()
        assert torch.equal(drawn, images)

    def test_normalised(self) -> None:
        drawn, images = self.episode(data__normalize="imagenet")
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(
            drawn, (images - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1), atol=1e-6, rtol=0
        )

    def test_normalised_as_relationnet_does(self) -> None:
        drawn, images = self.episode(data__normalize="relationnet")
        torch.testing.assert_close(drawn, (images - 0.92206) / 0.08426, atol=1e-12, rtol=1e-12)

    def test_one_channel_is_the_mean_of_three(self) -> None:
        drawn, images = self.episode(model__channels=1)
        assert torch.equal(drawn, images.mean(1, keepdim=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_every_byte_is_the_nearest_quotient(self, dtype: torch.dtype) -> None:
        drawing = EpisodeSampler(numbered_pool([64] * 4), preset("glyphs-5w1s", SMALL), dtype)
        drawn = drawing._gather(torch.arange(256)[None])[0, :, 0, 0, 0].numpy()
        for byte, value in enumerate(drawn):
            exact = Fraction(byte, 255)
            distance = abs(Fraction(float(value)) - exact)
            for other in (np.nextafter(value, value.dtype.type(side)) for side in (-1, 2)):
                assert distance < abs(Fraction(float(other)) - exact), byte

    @pytest.mark.parametrize("settings", [{}, {"data.normalize": "imagenet"}, {"model.channels": 1}])
    def test_no_number_of_the_host_divides(self, settings: dict[str, object]) -> None:
        """A device would multiply with its reciprocal, which has other bits: 126 of the bytes in float32."""
        pool = numbered_pool([7] * 5)
        elsewhere = SimpleNamespace(
            **{name: getattr(pool, name) for name in ("class_sizes", "class_names", "split", "source")},
            images=pool.images.to("meta"),
        )
        drawing = EpisodeSampler(elsewhere, preset("glyphs-5w1s", SMALL | settings))
        with Divisions() as divisions:
            drawing._gather(torch.zeros(1, 6, dtype=torch.int64, device="meta"))
        assert divisions.by
        assert all(isinstance(divisor, torch.Tensor) and divisor.is_meta for divisor in divisions.by)


class Divisions(TorchDispatchMode):
    """What the calls of a block divide by; ``by`` has a number for a mean, which divides by a count."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2].removesuffix("_")
        if name in ("div", "mean", "reciprocal"):
            self.by.append(args[1])
        return func(*args, **(kwargs or {}))


class TestPool:
    def test_fingerprint_tells_any_change(self) -> None:
        pool = numbered_pool([3, 3])
        other = numbered_pool([3, 3])
        assert pool.fingerprint() == other.fingerprint()
        other.images[5, 15, 15, 2] += 1
        assert pool.fingerprint() != other.fingerprint()
        assert pool.fingerprint() != numbered_pool([2, 4]).fingerprint()

    def test_a_class_without_images_is_refused(self) -> None:
        pool = numbered_pool([3, 3])
        with pytest.raises(ValueError, match="every class must have an image"):
            ImagePool(pool.images, pool.labels, ("a", "b", "c"), "train", "numbers")

    def test_an_empty_split_is_bad_input(self) -> None:
        with pytest.raises(InputError, match="numbers has no images in its split 'val'"):
            numbered_pool([], "val")


class TestUpcoming:
    def test_gives_what_the_sampler_gives(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawing = sampler([7] * 5)
        drawn: list[tuple[int, int]] = []
        sample = drawing.sample
        monkeypatch.setattr(drawing, "sample", lambda *what: drawn.append(what) or sample(*what))
        upcoming = Upcoming(drawing)
        upcoming.prepare(4, 2)
        for start, count in ((4, 2), (4, 2), (6, 1)):  # the second time nothing is ready
            found, expected = upcoming.take(start, count), sample(start, count)
            assert found.ways == expected.ways
            assert list(found.tensors()) == ["support_x", "support_y", "query_x", "query_y"]
            for name, tensor in found.tensors().items():
                assert torch.equal(tensor, expected.tensors()[name]), name
        upcoming.prepare(9, 2)
        assert len(upcoming.take(9, 1)) == 1  # not what was prepared
        assert drawn == [(4, 2), (4, 2), (6, 1), (9, 2), (9, 1)]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_on_cuda_beside_other_work(self) -> None:
        config = preset("glyphs-5w1s", SMALL)
        pool = numbered_pool([7] * 5)
        there, here = EpisodeSampler(pool.to("cuda"), config), EpisodeSampler(pool, config)
        upcoming, work = Upcoming(there), torch.rand(2048, 2048, device="cuda")
        for step in range(20):
            upcoming.prepare(2 * step, 2)
            work = (work @ work).tanh()
            found, expected = upcoming.take(2 * step, 2).to("cpu"), here.sample(2 * step, 2)
            assert torch.equal(found.query_x, expected.query_x)
            assert torch.equal(found.support_y, expected.support_y)
