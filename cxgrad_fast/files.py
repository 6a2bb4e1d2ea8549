"""Files and folders that somebody else, or a killed process, may have left: looked at before they are used.

What decides which code runs, or is read as if this program had written it, must belong to the user (or to root) and be
writable by nobody else. And everything that is read must be a regular file: opening a pipe waits for who writes into
it, and a device may have no end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO

LARGEST = 1 << 28  # bytes: no image, font, table or library has more

_UNFINISHED = ".unfinished-"  # in the name of a file that is being written
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # what a file system without locks answers


def open_regular(path: Path, largest: int = LARGEST) -> BufferedReader:
    """Open a regular file to read it, whoever owns it; links are followed.

    Args:
        path: the file.
        largest: the most bytes that it may have.

    Raises:
        OSError: it cannot be opened, is another kind of file, or is larger; ``strerror`` says so.
    """

    def check(status: os.stat_result) -> None:
        _check_regular(path, status)
        _check_size(path, status, largest)

    return _open(path, check, follow=True)


def open_own(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file to read it, which belongs to the user or to root and which nobody else can write.

    Args:
        path: the file.
        follow: open what a link leads to, for a path that a person has named; otherwise a link is refused.

    Raises:
        OSError: it cannot be opened or is not such a file; ``strerror`` says why.
    """

    def check(status: os.stat_result) -> None:
        _check_regular(path, status)
        _check_owner(path, status)
        if _others_write(status):
            raise PermissionError(errno.EPERM, "others can write it: chmod go-w", str(path))

    return _open(path, check, follow)


def _open(path: Path, check: Callable[[os.stat_result], None], follow: bool) -> BufferedReader:
    check(os.stat(path, follow_symlinks=follow))  # before it is opened, which has effects on some devices
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    try:
        check(os.fstat(descriptor))  # another file may have taken its place
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def own_folder(path: Path) -> None:
    """Make a folder that only the user can enter, and those above it, where it is not there; check it either way.

    Raises:
        OSError: it cannot be made, or is not what :func:`check_folder` wants.
    """
    if not os.path.lexists(path):
        _make(path)
    check_folder(path)


def _make(path: Path) -> None:
    if not os.path.lexists(path.parent):
        _make(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)


def check_folder(path: Path, follow: bool = True) -> None:
    """Check that a folder belongs to the user or to root, and that nobody else can write it.

    Args:
        path: the folder.
        follow: check what a link of the user's leads to; otherwise a link is refused.

    Raises:
        OSError: it is not so; ``strerror`` says why and names the folder.
    """
    found = os.stat(path, follow_symlinks=follow)
    if stat.S_ISLNK(found.st_mode):
        raise OSError(errno.ELOOP, f"'{path}' is a link", str(path))
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    for status in (os.lstat(path), found):
        _check_owner(path, status, f"'{path}'")
    if _others_write(found):
        what = f"others can write '{path}': chmod go-w '{path}'"
        raise PermissionError(errno.EPERM, what, str(path))


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "not a regular file"
        raise OSError(errno.EINVAL, f"it is {what}", str(path))


def _check_size(path: Path, status: os.stat_result, largest: int) -> None:
    if status.st_size > largest:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {largest}", str(path))


def _check_owner(path: Path, status: os.stat_result, name: str = "it") -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(errno.EPERM, f"{name} belongs to another user, number {status.st_uid}", str(path))


def _others_write(status: os.stat_result) -> bool:
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def read_own(path: Path, follow: bool = False) -> bytes:
    """The content of a file that :func:`open_own` opens, of at most ``LARGEST`` bytes.

    Raises:
        OSError: as there, or it is larger.
    """
    with open_own(path, follow) as file:
        _check_size(path, os.fstat(file.fileno()), LARGEST)
        return file.read()


def sha256(file: BufferedReader) -> str:
    """The SHA-256 of an open file's content, in hexadecimal."""
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, write: Callable[[IO[bytes]], object], mode: int = 0o600) -> None:
    """Put a file into a folder, in the place of an old one: at any moment the old one or the new one is there, whole.

    A process that is killed here leaves an unfinished file, which the next call for the same folder removes.

    Args:
        path: the file.
        write: writes the content into an open file.
        mode: the file's permissions.

    Raises:
        OSError: the disk refuses; the old file is still there.
    """
    _remove_unfinished(path.parent)
    with _unfinished(path) as file:
        try:
            write(file)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    sync_folder(path.parent)


def move_whole(path: Path, target: Path, mode: int = 0o600) -> None:
    """Move a finished file to another name on the same disk, its content first, so that no power cut leaves a part.

    Raises:
        OSError: the disk refuses.
    """
    os.chmod(path, mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(path, target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside another, locked as long as it is open: this tells a process that writes from one that died."""
    while True:
        with tempfile.NamedTemporaryFile(prefix=f"{path.name}{_UNFINISHED}", dir=path.parent, delete=False) as file:
            _lock(file.fileno())
            if os.fstat(file.fileno()).st_nlink:  # else another process removed it before it was locked
                yield file
                return


def _remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of processes that died."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"*{_UNFINISHED}????????"):
            with contextlib.suppress(OSError):  # another process removes it, or moves it to its place
                descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    if _lock(descriptor, wait=False) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                        path.unlink()
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file, which is made where it is not there and keeps its content; others wait.

    Gives whether the lock is held: not on a file system that has no locks.

    Raises:
        OSError: the file cannot be opened, or is a link or no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"'{path}' is a link", str(path)) from None
        raise
    try:
        _check_regular(path, os.fstat(descriptor))
        yield _lock(descriptor)  # the system takes it back from a process that dies
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool = True) -> bool:
    """Lock an open file; False where the file system has no locks, or where another process holds this one."""
    import fcntl  # not on every system that may import this

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
