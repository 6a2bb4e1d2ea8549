"""The on-disk cache of finished arrays: decoded folders, rendered glyphs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cxgrad_fast.cache_folder import cache_folder


def cached(name: str, facts: object, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of ``build()``, from the cache where the same name and facts have been built before.

    Args:
        name: says what it is, and begins the file's name; letters, digits and dashes.
        facts: everything that decides the arrays, as JSON values; equal facts, equal arrays.
        build: called on a miss.

    A file that is damaged counts as a miss. A folder that cannot be written costs one line on stderr, no more.
    Processes may share a cache: a file appears whole or not at all.
    """
    digest = hashlib.sha256(json.dumps([name, facts], sort_keys=True).encode()).hexdigest()
    folder = cache_folder()
    if folder is None:
        _warn_once("no home folder to cache data in: set CXGRAD_CACHE to one; going on without")
    path = folder / f"{name}-{digest[:32]}.npz" if folder else None
    if path and (arrays := _read(path)) is not None:
        return arrays
    arrays = build()
    if path:
        try:
            _write(path, arrays)
        except OSError as error:
            _warn_once(f"cannot write the cache folder '{path.parent}' ({error.strerror}): going on without")
    return arrays


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.removesuffix(".npy"): _read_entry(archive, entry) for entry in archive.namelist()}
    except Exception:  # there is none, or whatever a damaged one makes zipfile and numpy say
        return None


def _read_entry(archive: zipfile.ZipFile, entry: str) -> np.ndarray:
    with archive.open(entry) as file:
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):  # reading on to the end is what makes zipfile compare its checksum
            raise ValueError(f"'{entry}' is longer than its array")
    return array


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for allow_pickle
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _warn_once(message: str) -> None:
    print(f"cxgrad_fast: {message}", file=sys.stderr)
