import argparse
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast.cli import (
    DEFAULT_PRESET,
    Parser,
    Progress,
    add_config_options,
    build_config,
    clock_time,
    run_command,
    split_settings,
)
from cxgrad_fast.config import PRESETS, Config, InputError, preset
from cxgrad_fast.runs import check_writable


def _raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.fixture
def parser() -> Parser:
    made = Parser("train", "what it does", preset("glyphs-5w1s"))
    add_config_options(made)
    made.add_argument("--resume")
    return made


def test_a_setting_is_given_with_a_space_or_an_equals_sign() -> None:
    settings, rest = split_settings(["--task.shots", "5", "--out", "a.b", "--model.slope=-1", "--inner.order", "-1e-3"])
    assert settings == {"task.shots": "5", "model.slope": "-1", "inner.order": "-1e-3"}
    assert rest == ["--out", "a.b"]


@pytest.mark.parametrize("argv", [["--task.shots"], ["--task.shots", "--task.ways", "5"]])
def test_a_setting_without_a_value_is_named(argv: list[str]) -> None:
    with pytest.raises(InputError, match=r"^setting 'task.shots' needs a value: --task.shots VALUE$"):
        split_settings(argv)


def test_every_setting_of_the_config_is_accepted_as_text() -> None:
    changed = preset("released-mini-5w1s", {"model.pool_padding": (0, 0, 1, 1), "run.recompute": True}).flat()
    text = {
        name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in changed.items()
    }
    assert build_config("glyphs-5w1s", None, dict(text)).flat() == changed


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('preset = "glyphs-5w5s"\n[task]\nqueries = 7\n[run]\nseed = 3\n[outer]\nmeta_batch = 5\n')
    config = build_config(None, str(file), {"outer.meta_batch": "6", "data.seed": "4"})
    assert config.preset == "glyphs-5w5s"
    assert (config.task.shots, config.task.queries) == (5, 7)
    assert (config.outer.meta_batch, config.run.seed) == (6, 4)
    named = build_config("glyphs-5w1s", str(file), {})
    assert (named.preset, named.task.shots, named.outer.meta_batch) == ("glyphs-5w1s", 1, 5)
    assert build_config(None, None, {}) == preset("glyphs-5w1s")


def test_a_written_config_is_read_back(tmp_path) -> None:
    config = preset("paper-mini-5w5s", {"run.seed": 9})
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert build_config(None, str(tmp_path / "config.toml"), {}) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = 5\n", "'preset' in the settings file '.*' must be text, got 5"),
        ("[task]\nshot = 5\n", "unknown setting 'task.shot': did you mean 'task.shots'?"),
        ("[task\n", "is not TOML"),
    ],
)
def test_a_bad_file_is_told(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        build_config(None, str(file), {})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--shots", "unknown option '--shots': did you mean '--task.shots'?"),
        ("--resum=x", "unknown option '--resum': did you mean '--resume'?"),
        ("glyphs", "unexpected word 'glyphs': options start with --, see --help"),
        ("--resume", "argument --resume: expected one argument"),
        ("--lr", "unknown option '--lr': did you mean '--outer.learning_rate'?"),
        ("--epochs=3", "unknown option '--epochs': did you mean '--outer.iterations'?"),
        ("--batch-size", "unknown option '--batch-size': did you mean '--outer.meta_batch'?"),
        ("--gpu", "unknown option '--gpu': did you mean '--run.device'?"),
        ("--num_workers", "unknown option '--num_workers': images are in memory, no process loads them"),
        ("\x1b[31m", r"unexpected word '\x1b[31m': options start with --, see --help"),
        ("--resume\x1b[2J", r"unknown option '--resume\x1b[2J': did you mean '--resume'?"),
    ],
)
def test_an_unknown_word_is_told_with_the_nearest_option(parser: Parser, word: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parser.parse([word])
    assert str(caught.value) == message


def test_a_command_without_settings_offers_none() -> None:
    with pytest.raises(InputError, match=r"^unknown option '--lr': did you mean '--help'\?$"):
        Parser("info", "what it does").parse(["--lr"])


@pytest.mark.parametrize("word", ["--" + "x" * 5000, "x" * 5000, "--task." + "x" * 5000, "--compile=" + "x" * 5000])
def test_long_words_are_cut_in_messages(parser: Parser, word: str) -> None:
    parser.add_argument("--compile", choices=["yes", "no"])
    with pytest.raises(InputError, match=r"x\.\.\.x") as told:
        parser.parse([word])
    assert len(str(told.value)) <= 300


@examples(300)
@given(
    st.lists(
        st.text(st.characters(), max_size=20)
        | st.sampled_from(["--resume", "--preset", "--task.ways", "--config=", "--", "=", "--.", "--run.device", "mps"])
        | st.from_regex(r"--[a-z.]{0,8}(=[0-9a-z]{0,5})?", fullmatch=True),
        max_size=5,
    )
)
@example(["--"])
@example(["--=", "--.=", "-"])
def test_any_words_are_taken_or_refused_in_one_line(words: list[str]) -> None:
    made = Parser("train", "what it does", preset("glyphs-5w1s"))
    add_config_options(made)
    made.add_argument("--resume")

    def main(argv) -> int:
        options, settings = made.parse(argv)
        build_config(options.preset, None, settings)
        return 0

    if not {"-h", "--help"} & set(words):
        assert run_command(main, words) in (0, 2)


def test_help_lists_every_setting_with_its_default_and_choices(parser: Parser, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parser.parse(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name, value in preset("glyphs-5w1s").flat().items():
        value = ",".join(map(str, value)) if isinstance(value, list) else value
        assert f"  --{name} {value}" in shown
    assert "--inner.algorithm cxgrad   (alfa | " in shown
    assert "with --inner.algorithm anil also: --inner.joint False" in shown


def test_help_has_the_names_of_all_presets(parser: Parser, capsys) -> None:
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    shown = capsys.readouterr().out
    algorithms = re.search(r"ALGORITHM is one of (.*)\n", shown)
    assert algorithms
    words = {"ALGORITHM": algorithms[1].split(", "), "{1,5}": ["1", "5"], "{mini,tiered}": ["mini", "tiered"]}
    names = re.findall(r"^  (\S+-5w\{1,5\}s)  ", shown, re.MULTILINE)
    for word, values in words.items():
        names = [name.replace(word, value) for name in names for value in (values if word in name else [word])]
    assert sorted(names) == sorted(PRESETS)
    assert f"(default: {DEFAULT_PRESET})" in shown


def test_parse_takes_options_and_settings_in_any_order(parser: Parser) -> None:
    options, settings = parser.parse(["--task.ways", "3", "--resume", "runs/a", "--run.seed=1"])
    assert isinstance(options, argparse.Namespace)
    assert options.resume == "runs/a"
    assert settings == {"task.ways": "3", "run.seed": "1"}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("no such\nthing"), "error: no such thing"),
        (InputError("no '\x1b[31m\udcff'"), r"error: no '\x1b[31m\udcff'"),
        (OSError(errno.EISDIR, "Is a directory", "\x1b[2J"), r"error: cannot write or read '\x1b[2J': Is a directory"),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/latest.pt"),
            "error: cannot write or read 'run/latest.pt': No space left on device "
            "(free some space; the checkpoints written before are whole)",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", b"x"),
            "error: cannot write or read 'x': No such file or directory",
        ),
        (OSError(errno.ESTALE, "Stale file handle"), "error: cannot write or read: Stale file handle"),
        (OSError("cannot identify\nimage file"), "error: cannot write or read: cannot identify image file"),
        (TimeoutError(), "error: cannot write or read: TimeoutError"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "error: cannot write or read 'x': Permission denied"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "error: the device's memory is full: try --run.tasks_per_chunk 1, --run.recompute true or fewer tasks",
        ),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(error: Exception, line: str, capsys) -> None:
    assert run_command(_raising(error)) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", line + "\n")


def test_a_name_that_the_terminal_cannot_show_is_printed_as_it_can(monkeypatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdout", terminal)
    assert run_command(lambda argv: print("run", os.fsdecode(b"runs/\xff"), "± 1 %") or 0) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == rb"run runs/\udcff \xb1 1 %" + b"\n"


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_every_error_of_the_system_is_one_line(code: int, capsys) -> None:
    error = OSError(code, os.strerror(code), "run/latest.pt")
    if isinstance(error, BrokenPipeError):
        return  # the reader of stdout has had enough: nothing is said
    assert run_command(_raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write or read 'run/latest.pt': {os.strerror(code)}")


def test_a_removed_working_directory_is_named(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    told = "error: the working directory was removed (No such file or directory): change to one that exists\n"
    monkeypatch.chdir(folder)

    folder.rmdir()
    for main in (
        lambda argv: len(os.getcwd()),
        lambda argv: len(Path("run/latest.pt").read_bytes()),
        lambda argv: check_writable(Path("run")) or 0,
    ):
        assert run_command(main) == 2
        assert capsys.readouterr().err == told
    assert run_command(_raising(FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"))) == 2
    assert "'/x'" in capsys.readouterr().err


def _allocate_by_torch(argv: object) -> int:
    return len(torch.empty(1 << 60, dtype=torch.uint8))


def _allocate_by_numpy(argv: object) -> int:
    return len(np.empty(1 << 60, dtype=np.uint8))


@pytest.mark.parametrize(
    ("main", "asked"),
    [
        (_allocate_by_torch, " (1152921504606846976 bytes more were asked for)"),
        (_allocate_by_numpy, " (1.00 EiB more were asked for)"),
        (_raising(MemoryError()), ""),
        (_raising(RuntimeError("can't start new thread")), ""),
        (_raising(ImportError("libXau.so: failed to map segment from shared object")), ""),
    ],
)
def test_full_memory_is_one_line(main, asked: str, capsys) -> None:
    assert run_command(main) == 2
    assert capsys.readouterr().err == (
        f"error: memory is full{asked}: try --run.tasks_per_chunk 1, --run.recompute true, fewer tasks "
        "(outer.meta_batch, evaluation.tasks_per_batch) or a smaller model\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_one_line() -> None:
    program = (
        "import sys; from cxgrad_fast.cli import run_command; sys.exit(run_command(lambda argv: print(argv) or 0))"
    )
    command = [sys.executable, "-c", program]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == (
        "error: cannot write or read: No space left on device (free some space; the checkpoints written before are "
        "whole)\n"
    )


@pytest.mark.parametrize("error", [KeyError("a fault of ours"), RuntimeError("shapes"), ImportError("no module")])
def test_a_fault_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(_raising(error))


def test_exit_codes_pass_through(capsys) -> None:
    assert run_command(lambda argv: len(argv or ()), ["a", "b", "c"]) == 3
    assert run_command(_raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_progress_prints_plain_lines_now_and_then_where_there_is_no_terminal(capsys) -> None:
    now = [0.0]
    progress = Progress("training", 100, done=10, every=20, clock=lambda: now[0])
    for done, seconds in ((11, 5.0), (20, 20.0), (21, 25.0), (40, 60.0)):
        now[0] = seconds
        progress.update(done, "loss 1.0")
    progress.note("validated")
    progress.close()
    out, err = capsys.readouterr()
    assert out == "validated\n"
    assert err.splitlines() == [
        "training 20/100  loss 1.0  2:40 remaining",
        "training 40/100  loss 1.0  2:00 remaining",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress("training", 4, done=1)
    progress.update(4, "loss 1.0")
    progress.note("validated")
    progress.close()
    assert "4/4" in terminal.getvalue()
    assert "loss 1.0" in terminal.getvalue()
    assert capsys.readouterr().out == "validated\n"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (83.4, "1:23"), (3723, "1:02:03")])
def test_clock_time(seconds: float, shown: str) -> None:
    assert clock_time(seconds) == shown


def test_defaults_of_help_are_optional(capsys) -> None:
    with pytest.raises(SystemExit):
        Parser("info", "what it does").parse(["--help"])
    shown = capsys.readouterr().out
    assert not any(f"--{name}" in shown for name in Config().flat())
