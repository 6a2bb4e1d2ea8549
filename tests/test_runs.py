import dataclasses
import errno
import os
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cxgrad_fast import runs
from cxgrad_fast.checkpoints import Best, Checkpoint, read_checkpoint, write_checkpoint
from cxgrad_fast.config import InputError, preset
from cxgrad_fast.learner import Learner
from cxgrad_fast.runs import Run, check_writable, draw_curves, load, read_metrics, source_version

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


def with_iteration(start: Checkpoint, iteration: int, *best: Best) -> Checkpoint:
    return dataclasses.replace(start, iteration=iteration, validated=iteration, best=best)


# opening a run to use it


def test_load_opens_the_best_the_latest_or_a_file(start, tmp_path) -> None:
    def shifted(by: float) -> dict:
        parameters = {name: tensor + by for name, tensor in start.state["parameters"].items()}
        return start.state | {"parameters": parameters}

    write_checkpoint(tmp_path / "best-4.pt", dataclasses.replace(start, state=shifted(4)))
    write_checkpoint(tmp_path / "latest.pt", dataclasses.replace(start, state=shifted(5)))
    name, base = "head.bias", start.state["parameters"]["head.bias"]
    assert torch.equal(load(tmp_path).meta_parameters[name], base + 4)
    assert torch.equal(load(str(tmp_path), "latest").meta_parameters[name], base + 5)
    assert torch.equal(load(tmp_path / "best-4.pt").meta_parameters[name], base + 4)
    assert load(tmp_path, overrides={"evaluation.statistics": "support"}).config.evaluation.statistics == "support"


def test_load_takes_the_latest_before_the_first_validation(start, tmp_path) -> None:
    write_checkpoint(tmp_path / "latest.pt", dataclasses.replace(start, best=()))
    assert torch.equal(load(tmp_path).meta_parameters["head.bias"], start.state["parameters"]["head.bias"])


def test_load_tells_what_is_missing(saved, tmp_path) -> None:
    with pytest.raises(InputError, match=r"no run at '.*/none': there is no such file or folder"):
        load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"'.*/empty' holds no run: there is no latest.pt in it"):
        load(tmp_path / "empty")
    with pytest.raises(InputError, match=r"'.*/best-4.pt', the best model of the run, was deleted: name another file"):
        load(tmp_path)
    with pytest.raises(InputError, match="checkpoint must be 'best' or 'latest', got 'newest'"):
        load(tmp_path, "newest")


# the folder of a run


def test_a_new_run_has_a_checkpoint_and_what_made_it_from_the_start(start, tmp_path) -> None:
    folder = tmp_path / "a" / "run"
    with Run.create(folder, start):
        assert read_checkpoint(folder / "latest.pt").iteration == 5
        assert (folder / "config.toml").read_text() == CONFIG.to_toml()
        lines = (folder / "source.txt").read_text().splitlines()
        assert lines[0] == "commit a commit"
        assert f"torch {torch.__version__.partition('+')[0]}" in [line.partition("+")[0] for line in lines]


@pytest.mark.parametrize("name", ["latest.pt", "config.toml", "metrics.csv", "best-3.pt"])
def test_a_folder_that_holds_a_run_is_not_written_over(start, tmp_path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(InputError, match="holds a run already: continue it with --resume"):
        Run.create(tmp_path, start)
    assert os.listdir(tmp_path) == [name]


def test_a_run_that_cannot_be_created_leaves_no_folder(start, tmp_path, monkeypatch) -> None:
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        Run.create(tmp_path / "run", start)
    assert os.listdir(tmp_path) == []


def test_one_process_trains_a_run_at_a_time(start, tmp_path) -> None:
    with Run.create(tmp_path / "run", start), pytest.raises(InputError, match="is being trained by another process"):
        Run(tmp_path / "run", start)
    with Run(tmp_path / "run", start):
        pass


def test_metrics_have_a_row_a_step_and_a_row_a_validation(start, tmp_path) -> None:
    with Run.create(tmp_path / "run", with_iteration(start, 0)) as run:
        run.log(1, "train", loss=0.1, accuracy=0.5, first_support_loss=1.5, last_support_loss=1 / 3)
        run.log(1, "val", loss=2.0, accuracy=0.25, interval=0.125)
    assert (tmp_path / "run" / "metrics.csv").read_text() == (
        "iteration,split,loss,accuracy,interval,first_support_loss,last_support_loss\n"
        "1,train,0.1,0.5,,1.5,0.3333333333333333\n"
        "1,val,2.0,0.25,0.125,,\n"
    )
    table = read_metrics(tmp_path / "run")
    assert table["train"]["last_support_loss"] == [1 / 3]
    assert table["val"]["interval"] == [0.125]


@pytest.mark.parametrize("broken", ["", "7,tra", "7,train,0.5,0.", "7,train,0.5,0.5,,1.0,1.0\n8"])
def test_a_resumed_run_drops_the_rows_after_its_checkpoint(start, tmp_path, broken: str) -> None:
    header = "iteration,split,loss,accuracy,interval,first_support_loss,last_support_loss\n"
    rows = [f"{i},train,0.5,0.5,,1.0,1.0\n" for i in range(1, 7)]
    kept = [*rows[:4], "4,val,1.0,0.5,0.1,,\n", rows[4]]
    folder = tmp_path / "run"
    with Run.create(folder, start):
        pass
    # validated is 4: the row of a validation at 5 came after the checkpoint, as did iteration 6
    (folder / "metrics.csv").write_text("".join([header, *kept, "5,val,1.0,0.5,0.1,,\n", rows[5], broken]))
    with Run(folder, start):
        assert (folder / "metrics.csv").read_text() == "".join([header, *kept])


def test_a_best_model_is_deleted_only_when_the_latest_no_longer_names_it(start, tmp_path, monkeypatch) -> None:
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def names() -> set[str]:
        return {path.name for path in tmp_path.glob("run/best-*.pt")}

    folder = tmp_path / "run"
    with Run.create(folder, with_iteration(start, 0)) as run:
        first = with_iteration(start, 1, Best(1, 0.3))
        write_checkpoint(folder / "best-1.pt", first)
        run.save(first)
        second = with_iteration(start, 2, Best(2, 0.4))
        write_checkpoint(folder / "best-2.pt", second)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", refuse)
            with pytest.raises(OSError, match="No space left"):
                run.save(second)
        assert names() == {"best-1.pt", "best-2.pt"}
        run.save(second)
        assert names() == {"best-2.pt"}
    (folder / "best-9.pt").touch()  # written by a process that was killed before latest.pt named it
    (folder / ".latest.pt.1.tmp").touch()
    with Run(folder, second):
        assert names() == {"best-2.pt"}
        assert not list(folder.glob(".*.tmp"))


def test_tensorboard_reads_the_events_and_forgets_what_a_resumed_run_repeats(start, tmp_path) -> None:
    folder = tmp_path / "run"
    with Run.create(folder, with_iteration(start, 0)) as run:
        for iteration in range(1, 6):
            run.log(iteration, "train", loss=float(iteration), accuracy=0.5)
    with Run(folder, with_iteration(start, 3)) as run:
        run.log(4, "train", loss=40.0, accuracy=0.5)
        run.log_scalars(4, {"speed/seconds": 0.25})
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [event.value for event in events.Scalars("speed/seconds")] == [0.25]


def test_tensorboard_forgets_the_validation_that_a_resumed_run_repeats(start, tmp_path) -> None:
    """Killed between the row of the validation after iteration 8 and its checkpoint."""
    folder = tmp_path / "run"
    with Run.create(folder, with_iteration(start, 0)) as run:
        for iteration in range(1, 9):
            run.log(iteration, "train", loss=float(iteration), accuracy=0.5)
            if iteration % 4 == 0:
                run.log(iteration, "val", loss=float(iteration), accuracy=0.5)
    for _ in range(2):
        with Run(folder, dataclasses.replace(with_iteration(start, 8), validated=4)) as run:
            run.log(8, "val", loss=8.0, accuracy=0.5)
    with Run(folder, with_iteration(start, 8)) as run:
        run.log(9, "train", loss=9.0, accuracy=0.5)
    points = {}
    for name in ("", "val"):
        events = EventAccumulator(str(folder / "tensorboard" / name)).Reload()
        points |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert points["train/loss"] == list(range(1, 10))
    assert points["val/loss"] == points["val/accuracy"] == [4, 8]


def test_a_full_disk_stops_metrics_in_one_error(start, tmp_path, monkeypatch) -> None:
    write = os.write

    def half(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    folder = tmp_path / "run"
    with Run.create(folder, with_iteration(start, 0)) as run:
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OSError) as caught:
            run.log(1, "train", loss=0.1, accuracy=0.5)
    assert caught.value.filename == str(folder / "metrics.csv")


def test_curves_are_drawn_from_the_metrics(start, tmp_path) -> None:
    with Run.create(tmp_path / "run", with_iteration(start, 0)) as run:
        draw_curves(run.folder)  # of a run that was stopped at once
        empty = (run.folder / "curves.png").read_bytes()
        for iteration in range(1, 40):
            run.log(iteration, "train", loss=1 / iteration, accuracy=0.5)
        run.log(39, "val", loss=0.5, accuracy=0.5, interval=0.1)
        draw_curves(run.folder)
    image = (run.folder / "curves.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert image != empty


def test_smoothed_values_are_a_running_mean() -> None:
    assert runs._smooth([1.0, 3.0, 5.0]) == [1.0, 2.0, 3.0]
    assert runs._smooth([float(i) for i in range(12)])[-1] == pytest.approx(6.5)


# before a run


def test_check_writable_leaves_nothing_behind(tmp_path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_told(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the run folder '.*file/run': Not a directory \('.*file'\)"):
        check_writable(tmp_path / "file" / "run")


def test_the_source_is_a_commit_or_unknown(monkeypatch) -> None:
    commit, _, dirty = source_version().partition("-")
    assert commit == "unknown" or (len(commit) == 40 and dirty in ("", "dirty"))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 128, "", "not a repository"))
    assert source_version() == "unknown"

    def missing(*args, **options):
        raise FileNotFoundError(errno.ENOENT, "no git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert source_version() == "unknown"
