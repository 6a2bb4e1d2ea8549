"""The on-disk cache of finished arrays: decoded folders, rendered glyphs."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cxgrad_fast.cache_folder import cache_folder
from cxgrad_fast.files import open_own, own_folder, write_whole
from cxgrad_fast.printable import one_line

Arrays = dict[str, np.ndarray]


def cached(name: str, facts: object, build: Callable[[], Arrays], fits: Callable[[Arrays], bool]) -> Arrays:
    """The arrays of ``build()``, from the cache where the same name and facts have been built before.

    Args:
        name: says what it is, and begins the file's name; letters, digits and dashes.
        facts: everything that decides the arrays, as JSON values; equal facts, equal arrays.
        build: called on a miss.
        fits: whether arrays from a file have the names, types and shapes that ``build()`` gives.

    A file that is damaged, that holds other arrays, or that another user owns or can write counts as a miss. A folder
    that cannot be written, or that another user owns or can write, costs one line on stderr, no more.
    Processes may share a cache: a file appears whole or not at all.
    """
    digest = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()
    folder = _folder()
    path = folder / f"{name}-{digest[:32]}.npz" if folder else None
    if path and (arrays := _read(path)) is not None and fits(arrays):
        return arrays
    arrays = build()
    if path:
        try:
            write_whole(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # not allow_pickle
        except OSError as error:
            _warn_once(f"cannot write the cache folder '{path.parent}' ({error.strerror}): going on without")
    return arrays


def is_array(array: object, dtype: Any, *shape: int | None) -> bool:
    """Whether something is an array of a type and shape; None stands for any length."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != len(shape):
        return False
    return all(wanted in (None, found) for found, wanted in zip(array.shape, shape, strict=True))


def _folder() -> Path | None:
    """The cache's folder, made where it is not there; None, and one line on stderr, where it cannot be used."""
    folder = cache_folder()
    if folder is None:
        _warn_once("no home folder to cache data in: set CXGRAD_CACHE to one; going on without")
        return None
    try:
        own_folder(folder)
    except OSError as error:
        _warn_once(f"cannot use the cache folder '{folder}' ({error.strerror}): going on without")
        return None
    return folder


def _read(path: Path) -> Arrays | None:
    try:
        with open_own(path) as file, zipfile.ZipFile(file) as archive:
            return {entry.removesuffix(".npy"): _read_entry(archive, entry) for entry in archive.namelist()}
    except Exception:  # there is none, or whatever a damaged one makes zipfile and numpy say
        return None


def _read_entry(archive: zipfile.ZipFile, entry: str) -> np.ndarray:
    with archive.open(entry) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading on to the end is what makes zipfile compare its checksum
            raise ValueError(f"'{entry}' is longer than its array")
    return array


@functools.cache
def _warn_once(message: str) -> None:
    print(one_line(f"cxgrad_fast: {message}"), file=sys.stderr)
