import json
import math
import shutil

import numpy as np
import pytest
import torch
from tiny_runs import words, write_images

from cxgrad_fast.checkpoints import read_checkpoint
from cxgrad_fast.cli import run_command
from cxgrad_fast.data import open_pool
from cxgrad_fast.episodes import EpisodeSampler
from cxgrad_fast.evaluate import explain_statistics, main, predict_tasks, score
from cxgrad_fast.learner import Learner, NonFiniteError

pytest_plugins = ("tiny_runs_fixtures",)


@pytest.fixture(scope="module")
def sampler(finished):
    config = read_checkpoint(finished / "latest.pt").config
    return EpisodeSampler(open_pool(config, "test"), config, torch.float64)


def evaluate(capsys, *arguments: object) -> str:
    """What the command prints; it must succeed."""
    capsys.readouterr()
    code = run_command(main, [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    code = run_command(main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1), err
    return err.removeprefix("error: ").strip()


# scores


def logits_with(right: list[int], images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tasks with so many right answers each, of two classes."""
    labels = torch.zeros(len(right), images, dtype=torch.int64)
    logits = torch.zeros(len(right), images, 2)
    for task, count in enumerate(right):
        logits[task, :count, 0] = 1
        logits[task, count:, 1] = 1
    return logits, labels


def test_the_intervals_are_their_closed_forms() -> None:
    result = score(*logits_with([1, 2, 4], 4))
    accuracies = [0.25, 0.5, 1.0]
    mean = sum(accuracies) / 3
    spread = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / 2)
    assert result.accuracy == pytest.approx(mean)
    assert result.tasks_interval == pytest.approx(1.96 * spread / math.sqrt(3))
    assert result.images_interval == pytest.approx(1.96 * math.sqrt(mean * (1 - mean) / 12))
    assert (result.tasks, result.images) == (3, 12)
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.e)
    assert result.loss == pytest.approx(mean * right + (1 - mean) * wrong)


def test_the_released_interval_of_600_tasks() -> None:
    result = score(*logits_with([45] * 600, 75))
    assert result.images == 45000
    assert result.images_interval == pytest.approx(1.96 * math.sqrt(0.4 * 0.6 / 45000))
    assert result.tasks_interval == pytest.approx(0, abs=1e-12)


def test_one_task_has_no_interval_over_tasks() -> None:
    result = score(*logits_with([3], 4))
    assert math.isnan(result.tasks_interval)
    assert result.plain()["tasks_interval"] is None
    assert "needs two tasks" in result.lines()[1]


@pytest.mark.parametrize("right", [0, 4])
def test_all_right_and_all_wrong_have_no_spread(right: int) -> None:
    result = score(*logits_with([right, right], 4))
    assert (result.accuracy, result.images_interval, result.tasks_interval) == (right / 4, 0, 0)


class Answering:
    """A learner that gives every query image the same logits."""

    def __init__(self, *logits: float) -> None:
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def check_finite(self, what="this learner"):
        pass

    def predict(self, episodes, statistics=None):
        return self.logits.expand(*episodes.query_y.shape, -1)


def test_an_ensemble_is_the_mean_of_raw_logits_not_of_probabilities(sampler) -> None:
    # by logits class 0 wins, by probabilities class 1
    learners = [Answering(9.0, 0.0, 0.0), Answering(0.0, 3.0, 0.0), Answering(0.0, 3.0, 0.0)]
    logits, labels = predict_tasks(learners, sampler, 3, tasks_per_batch=2)
    assert torch.equal(logits, torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64).expand(3, 9, 3))
    probabilities = torch.stack([learner.logits.softmax(0) for learner in learners]).mean(0)
    assert probabilities.argmax() == 1
    assert torch.equal(labels, sampler.sample(0, 3).query_y)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_is_no_answer(sampler, value: float) -> None:
    """Whatever the class that it would seem to choose: the first, for a NaN."""

    class Diverging(Answering):
        def predict(self, episodes, statistics=None):
            logits = super().predict(episodes).clone()
            if torch.equal(episodes.query_x, sampler.sample(2, 2).query_x):
                logits[1, 4, 2] = value
            return logits

    learners = [Answering(1.0, 0.0, 0.0), Diverging(1.0, 0.0, 0.0)]
    with pytest.raises(NonFiniteError, match=r"the logits of task 3 of folder .*, split 'test', are not finite"):
        predict_tasks(learners, sampler, 5, tasks_per_batch=2)


def test_batches_of_tasks_do_not_change_the_answers(finished, sampler) -> None:
    saved = read_checkpoint(finished / "latest.pt")
    learner = saved.learner(finished)
    done: list[int] = []
    one, _ = predict_tasks([learner], sampler, 5, tasks_per_batch=1)
    some, _ = predict_tasks([learner], sampler, 5, tasks_per_batch=2, report=done.append)
    torch.testing.assert_close(one, some, rtol=1e-9, atol=1e-12)
    assert done == [2, 4, 5]
    direct = learner.predict(sampler.sample(3, 1))
    torch.testing.assert_close(one[3:4], direct, rtol=1e-9, atol=1e-12)


# the command


def test_a_run_is_evaluated_as_at_the_end_of_its_training(finished, images, capsys) -> None:
    result = json.loads((finished / "result.json").read_text())
    told = json.loads(evaluate(capsys, finished, "--json"))
    assert told["models"] == result["models"]
    for name in ("accuracy", "loss", "tasks_interval", "images_interval", "tasks", "images"):
        assert told[name] == result["test"][name]
    assert (told["ways"], told["shots"], told["queries"], told["split"]) == (3, 1, 3, "test")
    out = evaluate(capsys, finished)
    assert f"folder {images}, split 'test': 3-way 1-shot, 3 queries a class" in out
    assert f"accuracy                       {100 * told['accuracy']:.2f} %" in out
    assert f"95 % interval over tasks       ± {100 * told['tasks_interval']:.2f} %" in out
    assert f"binomial interval over images  ± {100 * told['images_interval']:.2f} %" in out


def test_source_split_tasks_queries_and_ensemble_are_chosen(finished, capsys) -> None:
    words = ("--source", "digits", "--tasks", 7, "--queries", 4, "--ensemble", 1, "--task.shots", 2, "--json")
    told = json.loads(evaluate(capsys, finished, *words))
    assert (told["source"], told["tasks"], told["images"], told["shots"]) == ("digits", 7, 7 * 12, 2)
    assert len(told["models"]) == 1
    assert json.loads(evaluate(capsys, finished, "--split", "val", "--json"))["split"] == "val"


def test_a_deleted_model_is_told_and_the_next_best_is_evaluated(finished, tmp_path, capsys) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    first, second = (best.file for best in read_checkpoint(copy / "latest.pt").best)
    (copy / first).unlink()
    for options, expected in (((), [second]), (("--ensemble", "1"), [second])):
        assert run_command(main, [str(copy), "--json", *options]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["models"] == expected
        assert err == f"note: '{copy / first}', one of the best models, was deleted: going on without it\n"


def test_one_checkpoint_is_evaluated_by_either_name(finished, capsys) -> None:
    best = read_checkpoint(finished / "latest.pt").best[0].file
    alone = evaluate(capsys, finished / best, "--json")
    assert evaluate(capsys, "--checkpoint", finished / best, "--json") == alone
    assert evaluate(capsys, finished, "--ensemble=1", "--json") == alone


@pytest.mark.parametrize(
    ("kind", "meaning"),
    [
        ("transductive", "the query images of a task are normalised together, as the released program does"),
        ("support", "with the statistics of their task's support images"),
        ("running", "with averages that meta-training gathered over its query passes"),
    ],
)
def test_the_statistics_are_chosen_and_explained_in_one_line(
    finished, sampler, capsys, kind: str, meaning: str
) -> None:
    out = evaluate(capsys, finished, "--eval-bn", kind, "--tasks", 20)
    assert f"BatchNorm, {kind}: " in out.splitlines()[-1]
    assert meaning in out.splitlines()[-1]
    told = json.loads(evaluate(capsys, finished, "--eval-bn", kind, "--tasks", 20, "--ensemble=1", "--json"))
    saved = read_checkpoint(finished / "latest.pt")
    learner = read_checkpoint(finished / saved.best[0].file).learner(finished)
    episodes = sampler.sample(0, 20)
    by_hand = score(learner.predict(episodes, kind), episodes.query_y)
    assert told["loss"] == pytest.approx(by_hand.loss, rel=1e-9)
    assert told["accuracy"] == by_hand.accuracy


def test_a_norm_without_a_choice_says_so(finished) -> None:
    config = read_checkpoint(finished / "latest.pt").config.override({"model.norm": "layer"})
    assert explain_statistics(config) == "layer norm: every image is normalised by itself"


def test_changed_images_are_told(finished, images, tmp_path, capsys) -> None:
    evaluate(capsys, finished)
    moved = shutil.copytree(images, tmp_path / "moved")
    run_command(main, [str(finished), "--root", str(moved)])
    assert "note:" not in capsys.readouterr().err
    run_command(main, [str(finished), "--root", str(write_images(tmp_path / "other", seed=1))])
    assert "split 'test', has changed since the run was made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "evaluate one thing: a run's folder, --checkpoint FILE or --released FILE"),
        (["RUN", "--checkpoint", "x.pt"], "evaluate one thing"),
        (["RUN", "--preset", "glyphs-5w1s"], "--preset and --config go with --released"),
        (["RUN", "--model.filters", "5"], "setting 'model.filters' (=5) is fixed by the checkpoint"),
        (["RUN", "--task.ways", "2"], "does not fit the settings: "),
        (["RUN", "--eval-bn", "batch"], "'evaluation.statistics' takes one of 'transductive', 'support', 'running'"),
        (["RUN", "--tasks", "0"], "setting 'evaluation.test_tasks' must be at least 1"),
        (["RUN", "--split", "all"], "argument --split: invalid choice: 'all'"),
        (["RUN", "--root", "/no/such/folder"], "'/no/such/folder' does not exist"),
        (["RUN/none"], "no run at"),
        (["RUN/metrics.csv"], "it is not a torch file"),
    ],
)
def test_bad_input_is_one_line(finished, capsys, arguments: list[str], told: str) -> None:
    assert told in refused(capsys, *(word.replace("RUN", str(finished)) for word in arguments))


# checkpoints of the released program


@pytest.fixture
def released(finished, tmp_path):
    """A file as the released program writes it, with the weights of the run's best model, and that model's file."""
    best = finished / read_checkpoint(finished / "latest.pt").best[0].file
    learner = read_checkpoint(best).learner(best)
    network = {theirs: learner.meta_parameters[ours].detach() for ours, theirs in learner.released_names().items()}
    network["classifier.layer_dict.conv0.norm_layer.running_mean"] = torch.zeros(4)
    state = {"network": network, "best_val_acc": np.float64(0.5), "best_val_iter": np.int64(3), "current_iter": 7}
    torch.save(state, tmp_path / "train_model_3")
    return tmp_path / "train_model_3", best


def released_words(images) -> list[str]:
    return ["--preset", "released-mini-5w1s", *words(images), "--json"]


def test_a_released_checkpoint_is_evaluated(released, images, finished, capsys) -> None:
    file, best = released
    told = json.loads(evaluate(capsys, "--released", file, *released_words(images), "--data.sampler=counter"))
    ours = json.loads(evaluate(capsys, best, "--json", "--model.slope", 0.01))
    assert told["models"] == ["train_model_3"]
    assert {**told, "models": 0} == {**ours, "models": 0}
    bare = file.with_name("bare.pt")
    torch.save(torch.load(file, weights_only=False)["network"], bare)
    again = json.loads(evaluate(capsys, "--released", bare, *released_words(images), "--data.sampler=counter"))
    assert {**again, "models": 0} == {**ours, "models": 0}


def test_a_released_checkpoint_that_cannot_be_used_is_told(released, images, tmp_path, capsys) -> None:
    file, best = released
    told = refused(capsys, "--released", file, *released_words(images), "--model.filters=5")
    assert told.startswith(f"cannot use '{file}' with preset released-mini-5w1s: ")
    assert "cannot use" in refused(capsys, "--released", best, *released_words(images))
    torch.save([1, 2], tmp_path / "list.pt")
    told = refused(capsys, "--released", tmp_path / "list.pt", *released_words(images))
    assert told.endswith("it holds neither 'network' nor a state dict")
    (tmp_path / "text").write_text("hello")
    assert "it is not a torch file" in refused(capsys, "--released", tmp_path / "text", *released_words(images))


def test_a_released_checkpoint_is_no_run(released, capsys) -> None:
    told = refused(capsys, released[0])
    assert told.endswith("is not a checkpoint of cxgrad_fast (evaluate reads the paper's with --released)")


def test_a_learner_made_from_settings_alone_is_at_chance(finished, sampler) -> None:
    """What the tests above compare would be equal too if both sides ignored the weights."""
    saved = read_checkpoint(finished / "latest.pt")
    fresh, _ = predict_tasks([Learner(saved.config)], sampler, 4, tasks_per_batch=4)
    trained, _ = predict_tasks([saved.learner(finished)], sampler, 4, tasks_per_batch=4)
    assert not torch.allclose(fresh, trained)
