"""A folder is one process's at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from cxgrad_fast.config import InputError

_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})  # what file systems without them answer


class FolderLock:
    """A lock on a folder, held until it is closed; the system drops it with the process, however that ends.

    Raises:
        InputError: another process has it.
        OSError: there is no such folder, or not any more.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._lock(folder)
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(folder)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        except BaseException:
            self.close()
            raise

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"run '{folder}' is being trained by another process: wait for its end, or take another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(folder)) from error
            print(f"note: '{folder}' cannot be locked ({error.strerror}): train it by one process", file=sys.stderr)

    @classmethod
    def of_made(cls, folder: Path) -> FolderLock:
        """The lock on a folder, which is made where there is none."""
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process could not create its run there and has just removed it
                return cls(folder)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop it; once it is dropped nothing happens."""
        descriptor, self._descriptor = self._descriptor, -1  # it is closed even where closing it is an error
        if descriptor >= 0:
            os.close(descriptor)
