import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast.config import PRESETS, Config, InputError, all_settings, preset
from cxgrad_fast.near_words import SYNONYMS, advice, nearest

SETTINGS = list(Config().flat())
OPTIONS = ["-h", "--help", "--preset", "--config", "--out", "--resume", "--compile", "--checkpoint"]


@pytest.mark.parametrize(
    ("word", "setting"),
    [
        ("outer.lr", "outer.learning_rate"),
        ("inner.lr", "inner.learning_rate"),
        ("lr", "outer.learning_rate"),
        ("train.lr", "outer.learning_rate"),
        ("learning_rate", "outer.learning_rate"),
        ("meta-lr", "outer.learning_rate"),
        ("inner-lr", "inner.learning_rate"),
        ("inner.learning-rate", "inner.learning_rate"),
        ("alpha", "inner.learning_rate"),
        ("beta", "inner.context_learning_rate"),
        ("epochs", "outer.iterations"),
        ("batch-size", "outer.meta_batch"),
        ("evaluation.batch_size", "evaluation.tasks_per_batch"),
        ("gpu", "run.device"),
        ("cuda", "run.device"),
        ("n-way", "task.ways"),
        ("num_ways", "task.ways"),
        ("k-shot", "task.shots"),
        ("n_query", "task.queries"),
        ("steps", "inner.steps"),
        ("outer.steps", "outer.iterations"),
        ("number_of_training_steps_per_iter", "inner.steps"),
        ("seed", "run.seed"),
        ("train_seed", "run.seed"),
        ("dataset", "data.source"),
        ("root", "data.root"),
        ("data-dir", "data.root"),
        ("num_filters", "model.filters"),
        ("Task.Shots", "task.shots"),
        # no other word for it: the nearest spelling
        ("task.shot", "task.shots"),
        ("modle.filters", "model.filters"),
        ("modle.filtres", "model.filters"),
    ],
)
def test_the_fields_own_words_lead_to_the_setting(word: str, setting: str) -> None:
    assert advice(word, SETTINGS) == f"did you mean '{setting}'?"
    assert advice(f"--{word}", SETTINGS, OPTIONS) == f"did you mean '--{setting}'?"
    with pytest.raises(InputError) as told:
        preset("glyphs-5w1s", {word: 1})
    assert str(told.value) == f"unknown setting '{word}': did you mean '{setting}'?"


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("workers", "images are in memory, no process loads them"),
        ("wd", "the outer loop has no weight decay"),
        ("outer.weight_decay", "the outer loop has no weight decay"),
        ("nproc", "start several processes with torchrun --nproc-per-node=N"),
    ],
)
def test_what_there_is_instead_of_a_setting(word: str, answer: str) -> None:
    assert advice(word, SETTINGS) == advice(word, SETTINGS, OPTIONS) == answer


def test_options_are_meant_only_where_there_are_such() -> None:
    assert advice("--save_dir", SETTINGS, OPTIONS) == "did you mean '--out'?"
    assert advice("--restore", SETTINGS, OPTIONS) == "did you mean '--resume'?"
    assert advice("--restore", SETTINGS, ["--checkpoint"]) == "did you mean '--checkpoint'?"
    assert advice("--save_dir", SETTINGS).startswith("did you mean '")
    assert "--" not in advice("--save_dir", SETTINGS)


def test_every_meaning_is_a_setting_an_option_or_a_sentence() -> None:
    known = {*all_settings(), *OPTIONS}
    for word, meanings in SYNONYMS.items():
        assert word.isalnum(), word
        assert word == word.lower(), word
        for meaning in meanings:
            assert meaning in known or " " in meaning, (word, meaning)


def test_a_settings_last_word_leads_to_a_setting_of_that_name() -> None:
    for setting in SETTINGS:
        last = setting.partition(".")[2]
        assert advice(last, SETTINGS).endswith(f".{last}'?"), setting
        assert advice(setting.replace("_", "-").upper(), SETTINGS) == f"did you mean '{setting}'?"


def test_the_nearest_preset() -> None:
    assert nearest("glyph-5w5s", PRESETS) == "glyphs-5w5s"


@examples(100)
@given(st.text(max_size=300))
def test_any_word_is_answered(word: str) -> None:
    assert advice(word, SETTINGS, OPTIONS)
