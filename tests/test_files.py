"""Files and folders that somebody else may have left: what is refused; and files are written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from helpers import give_away

from cxgrad_fast import files
from cxgrad_fast.files import (
    check_folder,
    locked,
    move_whole,
    open_own,
    open_regular,
    own_folder,
    read_own,
    write_whole,
)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    return str(caught.value.strerror)


def put(path: Path, content: bytes = b"content") -> Path:
    path.write_bytes(content)
    return path


# --- reading ---


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "file")
    (tmp_path / "link").symlink_to(path)
    for call in (lambda: open_regular(path), lambda: open_regular(tmp_path / "link"), lambda: open_own(path)):
        with call() as file:
            assert file.read() == b"content"
    assert read_own(path) == read_own(tmp_path / "link", follow=True) == b"content"


@pytest.mark.parametrize("call", [open_regular, open_own, read_own])
def test_other_kinds_of_files_are_refused(call: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # which nobody writes into: opening it the usual way would wait for ever
    os.mkdir(tmp_path / "folder")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name in ("pipe", "folder", "socket"):
            assert refusal(lambda name=name: call(tmp_path / name)) == "it is not a regular file"
    assert refusal(lambda: call(Path("/dev/zero"))) == "it is not a regular file"
    assert refusal(lambda: call(tmp_path / "nothing")) == "No such file or directory"


@pytest.mark.parametrize(
    ("swap", "message"),
    [(os.mkfifo, "it is not a regular file"), (lambda path: path.symlink_to("precious"), os.strerror(errno.ELOOP))],
    ids=["pipe", "link"],
)
def test_what_takes_a_file_s_place_is_looked_at_too(
    swap: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at a path and its opening another file may get its name."""
    path, usual = put(tmp_path / "file"), os.open
    put(tmp_path / "precious")

    def swapping(name: Path, flags: int) -> int:
        path.unlink()
        swap(path)
        return usual(name, flags)

    monkeypatch.setattr(os, "open", swapping)
    assert refusal(lambda: open_own(path)) == message


def test_a_link_is_followed_where_it_is_named_alone(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(put(tmp_path / "file"))
    for call in (open_own, read_own):
        assert refusal(lambda call=call: call(tmp_path / "link")) == "it is a link"


def test_large_files_are_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "file")
    os.truncate(path, files.LARGEST + 1)  # takes no place on the disk
    for call in (open_regular, read_own):
        assert refusal(lambda call=call: call(path)) == "it has 268435457 bytes, more than 268435456"
    with open_own(path) as file:
        assert file.read(7) == b"content"


@pytest.mark.parametrize("bits", [0o620, 0o602, 0o666])
def test_files_that_others_can_write_are_refused(bits: int, tmp_path: Path) -> None:
    path = put(tmp_path / "file")
    path.chmod(bits)
    assert refusal(lambda: open_own(path)) == "others can write it: chmod go-w"
    path.chmod(0o644)
    open_own(path).close()


def test_files_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "file")
    path.chmod(0o644)
    give_away(path, monkeypatch)
    assert refusal(lambda: open_own(path)) == "it belongs to another user, number 65534"
    with open_regular(path) as file:
        assert file.read() == b"content"


# --- folders ---


def test_folders_are_made_for_the_user_alone(tmp_path: Path) -> None:
    own_folder(tmp_path / "a" / "b")
    own_folder(tmp_path / "a" / "b")
    assert mode(tmp_path / "a") == mode(tmp_path / "a" / "b") == 0o700


@pytest.mark.parametrize("bits", [0o720, 0o702, 0o1777])
def test_folders_that_others_can_write_are_refused(bits: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    own_folder(folder)
    folder.chmod(bits)
    for call in (own_folder, check_folder):
        assert refusal(lambda call=call: call(folder)) == f"others can write '{folder}': chmod go-w '{folder}'"
    folder.chmod(0o755)
    own_folder(folder)


def test_folders_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    own_folder(folder)
    link.symlink_to(folder)
    own_folder(link)  # a link of the user's own
    assert refusal(lambda: check_folder(link, follow=False)) == f"'{link}' is a link"
    with monkeypatch.context() as patch:
        give_away(link, patch)
        assert refusal(lambda: own_folder(link)) == f"'{link}' belongs to another user, number 65534"
    give_away(folder, monkeypatch)
    assert refusal(lambda: own_folder(folder)) == f"'{folder}' belongs to another user, number 65534"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(lambda: own_folder(put(tmp_path / "file"))) == "Not a directory"
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    assert refusal(lambda: own_folder(tmp_path / "link")) == "No such file or directory"
    assert refusal(lambda: own_folder(Path("/proc/nowhere/folder"))) == "No such file or directory"


# --- writing ---


def test_a_written_file_takes_the_place_of_whatever_is_there(tmp_path: Path) -> None:
    path, precious = tmp_path / "file", put(tmp_path / "precious")
    path.symlink_to(precious)
    write_whole(path, lambda file: file.write(b"first"))
    assert not path.is_symlink()
    assert (path.read_bytes(), mode(path), precious.read_bytes()) == (b"first", 0o600, b"content")
    write_whole(path, lambda file: file.write(b"second"), mode=0o644)
    assert (path.read_bytes(), mode(path)) == (b"second", 0o644)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["file", "precious"]


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = put(tmp_path / "file")

    def failing(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert refusal(lambda: write_whole(path, failing)) == "No space left on device"
    assert [found.read_bytes() for found in tmp_path.iterdir()] == [b"content"]


def _write_and_die(path: Path) -> None:
    def dying(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    write_whole(path, dying)


def test_what_a_killed_write_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(tmp_path / "killed",))
    child.start()
    child.join(100)
    assert child.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    other = put(tmp_path / "notes.unfinished-by-me")  # not a name of ours

    def meanwhile(file: IO[bytes]) -> None:
        write_whole(tmp_path / "second", lambda second: second.write(b"2"))
        assert Path(file.name).exists()
        file.write(b"1")

    write_whole(tmp_path / "first", meanwhile)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", other.name, "second"]
    assert (tmp_path / "first").read_bytes() == b"1"


def test_an_unfinished_file_that_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", usual)
        files._remove_unfinished(tmp_path)
        usual(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    write_whole(tmp_path / "file", lambda file: file.write(b"content"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_where_no_locks_are_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a process still writes a file, nothing tells."""
    left = put(tmp_path / "file.unfinished-abcdefgh")
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        monkeypatch.setattr(fcntl, "flock", lambda *arguments, number=number: raise_error(number))
        write_whole(tmp_path / "file", lambda file: file.write(b"written"))
        assert left.exists()
        with locked(tmp_path / "lock") as is_locked:
            assert not is_locked
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: raise_error(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / "lock"):
        pass


def raise_error(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_moved_file_keeps_its_content(tmp_path: Path) -> None:
    path = put(tmp_path / "a")
    path.chmod(0o666)
    move_whole(path, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert mode(tmp_path / "b") == 0o600
    assert not path.exists()


def test_a_lock_is_held_by_one_and_its_file_keeps_its_content(tmp_path: Path) -> None:
    path = put(tmp_path / "lock")
    with locked(path) as is_locked:
        assert is_locked
        with open(path, "rb+") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(path) as is_locked:
        assert is_locked
    assert path.read_bytes() == b"content"


def test_a_lock_that_is_a_link_or_no_file_is_refused(tmp_path: Path) -> None:
    precious, link = put(tmp_path / "precious"), tmp_path / "link"
    link.symlink_to(precious)
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((link, f"'{link}' is a link"), (tmp_path / "pipe", "it is not a regular file")):
        with pytest.raises(OSError) as caught, locked(path):
            pass
        assert caught.value.strerror == message
    assert precious.read_bytes() == b"content"
