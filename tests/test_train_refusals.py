"""What the train command refuses: one line, exit code 2, nothing half-written."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import Launched
from tiny_runs import train, words, write_images

from cxgrad_fast import Learner
from cxgrad_fast import train as train_module

pytest_plugins = ("tiny_runs_fixtures",)


def refused(capsys, *arguments: object) -> str:
    code = train(*arguments)
    err = capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").strip()


def test_an_unknown_setting_ends_the_real_command_in_one_line(tmp_path) -> None:
    command = [sys.executable, "-m", "cxgrad_fast.train", "--out", str(tmp_path / "run"), "--task.shot", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "error: unknown setting 'task.shot': did you mean 'task.shots'?\n"
    assert done.stdout == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__root": "/no/such/folder"}, "/no/such/folder"),
        ({"task__ways": 6}, "task.ways (=6) is more than the 5 classes of folder"),
        ({"task__queries": 7}, "task.shots + task.queries (=1 + 7) needs 8"),
        ({"model__image_size": 8}, "'model.image_size' (=8) pools to nothing in conv4"),
        ({"run__device": "gpu"}, "setting 'run.device' takes auto, cpu or cuda[:index], got 'gpu'"),
        ({"run__backend": "triton"}, "triton cannot run here"),
        (
            {"run__precision": "tf32"},
            "setting 'run.precision' (=tf32) is not for this machine: it needs the Triton",
        ),
        ({"task__shots": "many"}, "setting 'task.shots' takes a value of type int, got 'many'"),
    ],
)
def test_bad_settings_are_told_and_no_folder_is_made(images, tmp_path, capsys, changes, told: str) -> None:
    assert told in refused(capsys, "--out", tmp_path / "run", *words(images, **changes))
    assert os.listdir(tmp_path) == []


def test_an_unknown_preset_is_told(capsys) -> None:
    assert refused(capsys, "--preset", "glyph-5w1s") == "unknown preset 'glyph-5w1s': did you mean 'glyphs-5w1s'?"


def test_an_unwritable_folder_is_told_before_any_work(images, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_module, "open_pool", None)  # calling it would be long work
    (tmp_path / "file").write_text("")
    assert "cannot write the run folder" in refused(capsys, "--out", tmp_path / "file" / "run", *words(images))


def test_a_run_is_not_written_over(copy, images, capsys) -> None:
    before = (copy / "latest.pt").read_bytes()
    assert "holds a run already: continue it with --resume" in refused(capsys, "--out", copy, *words(images))
    assert (copy / "latest.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--outer.learning_rate=0.1", "setting 'outer.learning_rate' (=0.1) cannot change in a resumed run (there: "),
        ("--run.seed=3", "setting 'run.seed' (=3) cannot change"),
        ("--task.shots=2", "setting 'task.shots' (=2) cannot change"),
        ("--evaluation.ensemble=1", "setting 'evaluation.ensemble' (=1) cannot change"),
        ("--inner.algorithm=maml", "setting 'inner.algorithm' (=maml) cannot change"),
        ("--outer.schedule=linear", "setting 'outer.schedule' (=linear) cannot change"),
        ("--out=elsewhere", "--out does not go with --resume"),
        ("--preset=glyphs-5w5s", "--preset does not go with --resume"),
    ],
)
def test_a_resumed_run_keeps_its_settings(copy, capsys, word: str, told: str) -> None:
    before = {path: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    assert told in refused(capsys, "--resume", copy, word)
    assert {path: path.read_bytes() for path in copy.iterdir() if path.is_file()} == before


def test_a_schedule_that_ends_with_the_run_fixes_its_length(images, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert train("--out", run, *words(images, outer__schedule="cosine")) == 0
    assert "setting 'outer.iterations' (=99) cannot change" in refused(capsys, "--resume", run, "--outer.iterations=99")


def test_a_resumed_run_may_name_a_setting_it_has(copy) -> None:
    assert train("--resume", copy, "--outer.learning_rate=0.003", "--evaluation.tasks_per_batch=1") == 0


def test_a_resumed_run_wants_the_images_it_was_trained_with(copy, tmp_path, capsys) -> None:
    other = write_images(tmp_path / "other", seed=1)
    told = refused(capsys, "--resume", copy, "--data.root", other)
    assert f"the images of folder {other}, split 'train', are not those that run '{copy}' was trained with" in told


def test_a_moved_data_folder_is_no_other_data(copy, images, tmp_path) -> None:
    moved = shutil.copytree(images, tmp_path / "moved")
    assert train("--resume", copy, "--data.root", moved) == 0


@pytest.mark.parametrize("resumed", ["none", ""])
def test_resuming_no_run_is_told(tmp_path, capsys, resumed: str) -> None:
    assert "no run" in refused(capsys, "--resume", tmp_path / resumed)


def test_resuming_from_a_truncated_checkpoint_is_told(copy, capsys) -> None:
    data = (copy / "latest.pt").read_bytes()
    (copy / "latest.pt").write_bytes(data[: len(data) // 2])
    assert "latest.pt': it is truncated or damaged" in refused(capsys, "--resume", copy)


# memory that is full


def train_in_little_memory(*arguments: object) -> int:
    """The second rank, or the only one, has none for its images."""
    if os.environ.get("RANK", "1") == "1":
        train_module.open_pool = lambda *arguments: np.empty(1 << 60, dtype=np.uint8)
    return train(*arguments)


def test_full_memory_of_one_rank_is_told_once(images, tmp_path) -> None:
    launched = Launched(tmp_path / "ranks", 2, train_in_little_memory, "--out", tmp_path / "run", *words(images))
    assert launched.wait() == [2, 2], launched.err()
    assert launched.err().startswith("error: memory is full (1.00 EiB more were asked for): try ")
    assert launched.err().count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["start_step", "predict"])
def test_memory_that_is_full_in_a_run_is_one_line(copy, capsys, monkeypatch, place: str) -> None:
    before = (copy / "latest.pt").read_bytes()
    monkeypatch.setattr(Learner, place, lambda *arguments: torch.empty(1 << 60))
    told = refused(capsys, "--resume", copy, "--outer.iterations", 10)
    assert told.startswith("memory is full (4611686018427387904 bytes more were asked for): try ")
    assert (copy / "latest.pt").read_bytes() == before
