import dataclasses
import errno
import os
import random

import pytest
import torch

from cxgrad_fast import checkpoints
from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_atomic, write_checkpoint
from cxgrad_fast.config import InputError, preset
from cxgrad_fast.learner import Learner
from cxgrad_fast.torch_files import read_torch_file

CONFIG = preset(
    "glyphs-5w1s",
    {"model.filters": 2, "model.image_size": 16, "task.ways": 2, "inner.context_dim": 3, "run.device": "cpu"},
)


@pytest.fixture
def start() -> Checkpoint:
    return Checkpoint(
        config=CONFIG,
        state=Learner(CONFIG).state_dict(),
        iteration=5,
        validated=4,
        best=(Best(4, 0.5), Best(2, 0.25)),
        fingerprints={"train": "abc"},
        rng={"cpu": torch.get_rng_state()},
        source="a commit",
        episode={"tasks": [10, 11], "query_y": torch.tensor([[0, 1]])},
    )


@pytest.fixture
def saved(start, tmp_path):
    write_checkpoint(tmp_path / "latest.pt", start)
    return tmp_path / "latest.pt"


def message(path) -> str:
    with pytest.raises(InputError) as caught:
        read_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# the file of a checkpoint


def test_a_checkpoint_comes_back_as_it_was(start, saved) -> None:
    back = read_checkpoint(saved)
    for name in ("config", "iteration", "validated", "best", "fingerprints", "source"):
        assert getattr(back, name) == getattr(start, name)
    assert back.config.preset == "glyphs-5w1s"
    assert isinstance(back.best[0], Best)
    assert back.episode["tasks"] == [10, 11]
    assert torch.equal(back.rng["cpu"], start.rng["cpu"])
    assert back.state["parameters"].keys() == start.state["parameters"].keys()
    for name, tensor in start.state["parameters"].items():
        assert torch.equal(back.state["parameters"][name], tensor)
        assert back.state["parameters"][name].dtype == tensor.dtype


def test_the_file_says_where_the_sampler_stands(saved) -> None:
    content = torch.load(saved, weights_only=True)
    assert content["next_task"] == 5 * CONFIG.outer.meta_batch
    assert content["config"] == CONFIG.flat()


def test_the_learner_of_a_checkpoint_has_its_weights(start, saved) -> None:
    other = CONFIG.override({"run.seed": 7})
    learner = read_checkpoint(saved).learner(saved, other, optimizer=True)
    assert learner.config == other
    for name, tensor in start.state["parameters"].items():
        assert torch.equal(learner.meta_parameters[name], tensor)


def test_a_checkpoint_that_does_not_fit_its_settings_is_told(saved) -> None:
    with pytest.raises(InputError, match=r"checkpoint '.*latest.pt' does not fit the settings: .*"):
        read_checkpoint(saved).learner(saved, CONFIG.override({"model.filters": 3}))


def test_a_checkpoint_holds_nothing_that_needs_code_to_read(start, saved, tmp_path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match="plain values only, got PosixPath"):
        write_checkpoint(saved, dataclasses.replace(start, episode={"root": tmp_path}))
    assert saved.read_bytes() == before


def test_a_missing_checkpoint_is_told(tmp_path) -> None:
    assert message(tmp_path / "no.pt").endswith("No such file or directory")
    assert message(tmp_path).endswith("it is not a regular file")
    os.mkfifo(tmp_path / "pipe.pt")
    assert message(tmp_path / "pipe.pt").endswith("it is not a regular file")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02garbage", os.urandom(300)])
def test_a_file_of_another_kind_is_told(tmp_path, data: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(data)
    assert message(tmp_path / "x.pt").endswith("it is not a torch file")


@pytest.mark.parametrize("content", [{"weight": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_a_torch_file_of_another_program_is_told(tmp_path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "is not a checkpoint of cxgrad_fast" in message(tmp_path / "x.pt")


def test_a_file_that_would_run_code_is_not_run(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({"format": checkpoints.FORMAT, "trap": Trap()}, tmp_path / "x.pt")
    assert "does not match its SHA-256" in message(tmp_path / "x.pt")
    assert not (tmp_path / "trapped").exists()


def test_a_checkpoint_of_a_newer_program_is_told(saved) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save(content | {"version": 2}, saved)
    assert message(saved).endswith("has format version 2, this program reads 1: update it")


def _flip_weight(content) -> None:
    weight = content["state"]["parameters"]["features.0.weight"].view(torch.int32)
    weight.view(-1)[3] ^= 1


def _change_setting(content) -> None:
    content["config"]["inner.steps"] = 4


def _change_moment(content) -> None:
    content["state"]["optimizer"]["param_groups"][0]["betas"] = (0.9, 0.99)


def _drop_fingerprint(content) -> None:
    content["fingerprints"].clear()


@pytest.mark.parametrize("tamper", [_flip_weight, _change_setting, _change_moment, _drop_fingerprint])
def test_an_altered_checkpoint_is_told(saved, tamper) -> None:
    content = torch.load(saved, weights_only=True)
    tamper(content)
    torch.save(content, saved)
    assert "is damaged: its content does not match its SHA-256" in message(saved)


def test_a_checkpoint_without_its_digest_is_told(saved) -> None:
    content = torch.load(saved, weights_only=True)
    del content["sha256"]
    torch.save(content, saved)
    assert "does not match its SHA-256" in message(saved)


def test_a_truncated_checkpoint_is_told_at_any_length(saved) -> None:
    data = saved.read_bytes()
    for length in (1, 10, 100, len(data) // 2, len(data) - 100, len(data) - 1):
        saved.write_bytes(data[:length])
        assert "cannot read the checkpoint" in message(saved)


def test_no_flipped_bit_is_taken_for_a_whole_checkpoint(start, saved) -> None:
    data, chance = saved.read_bytes(), random.Random(0)
    whole = checkpoints._digest(read_torch_file(saved))
    told = 0
    for position in chance.sample(range(len(data)), 150):
        flipped = bytearray(data)
        flipped[position] ^= 1 << chance.randrange(8)
        saved.write_bytes(flipped)
        try:
            read_checkpoint(saved)  # an error of any other kind fails the test
        except InputError:
            told += 1
        else:  # padding, time stamps: what was read is what was written
            assert checkpoints._digest(read_torch_file(saved)) == whole
    assert told > 20


def test_odd_strides_and_objects_in_a_damaged_file_are_only_a_mismatch(saved) -> None:
    content = torch.load(saved, weights_only=True)
    content["state"]["parameters"]["head.bias"] = torch.ones(4)[::3][:1].as_strided((1,), (7,))
    content["source"] = torch.float32
    torch.save(content, saved)
    assert "does not match its SHA-256" in message(saved)


# atomic replacement


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(monkeypatch, tmp_path) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1])
    write_atomic(tmp_path / "x", b"new")
    assert done == ["fsync", "replace", "fsync"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path, call: str) -> None:
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "latest.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError) as caught:
        write_atomic(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["latest.pt"]
