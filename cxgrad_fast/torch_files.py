"""What ``torch.save`` wrote, read as data: no code runs, and no more memory is taken than the file has bytes.

``torch.load(weights_only=True)`` runs no foreign code either, but it calls what the file names out of a list that
holds bytearray, storages and codecs, and it unpacks compressed members: a kilobyte can make it ask for any amount of
memory. Here nothing that a file names is called. Its pickle is gone through one operation at a time: plain values,
lists and dictionaries are made, tensors are views of the bytes that the file holds for them, everything else is
:class:`Unread`.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cxgrad_fast.config import InputError
from cxgrad_fast.files import open_regular

_ANY_SIZE = 2**62
_DEEPEST = 50  # lists in lists in ...
_REPEATS = 16  # how many times the same content may be met in different places
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch before 1.6 starts

# what zipfile and pickletools were seen to raise over damaged files, and what this reader finds wrong with them
_UNREADABLE = (
    zipfile.BadZipFile,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OverflowError,
    struct.error,
)

_DTYPES: dict[str, torch.dtype] = {
    f"torch {name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
        ("ComplexFloat", torch.complex64),
        ("ComplexDouble", torch.complex128),
    )
} | {"torch.storage UntypedStorage": torch.uint8}

_VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NEW_DTYPES = {f"torch {name}": getattr(torch, name) for name in ("uint16", "uint32", "uint64")}
_NOTHING = torch.empty(0, dtype=torch.uint8)


class _Damaged(ValueError):
    """What is wrong with a file, for its reader."""


@dataclass(frozen=True)
class Unread:
    """Something in a file that is neither a tensor nor a plain value; ``name`` is what the file calls it."""

    name: str


def read_torch_file(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``: tensors on the CPU, plain values, lists, tuples and dictionaries.

    Ordered dictionaries come as plain ones, parameters as tensors, everything else as :class:`Unread`. All of it is a
    tree, of a depth and a size that a recursive function can go through.

    Raises:
        InputError: missing, no regular file, truncated, not a torch file, or one from before torch 1.6.
    """
    try:
        with open_regular(path, _ANY_SIZE) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(len(_LEGACY))
            if start == _LEGACY:
                raise InputError(
                    f"cannot read the checkpoint '{path}': it has torch's format from before version 1.6; if you trust "
                    "it, torch.save(torch.load(FILE), FILE) makes it a new one"
                )
            try:
                content = _Archive(file, size).content()
                _check_tree(content, _REPEATS * size)
                return content
            except _UNREADABLE as error:
                reason = f" ({error})" if isinstance(error, _Damaged) else ""
                what = f"is truncated or damaged{reason}" if start[:2] == b"PK" else "is not a torch file"
                raise InputError(f"cannot read the checkpoint '{path}': it {what}") from error
    except OSError as error:
        raise InputError(f"cannot read the checkpoint '{path}': {error.strerror}") from error


class _Archive:
    """The zip file that ``torch.save`` writes: ``<name>/data.pkl``, and ``<name>/data/<key>`` for every storage."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._size = size
        self._zip = zipfile.ZipFile(file)
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise _Damaged("its members are compressed, those of torch.save are not")
        if sum(member.file_size for member in members) > size or len(self._members) != len(members):
            raise _Damaged("its members are larger than the file")
        pickles = [name for name in self._members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Damaged("it holds no data.pkl")
        self._folder = pickles[0].partition("/")[0]
        if self._bytes("byteorder", b"little") != b"little":
            raise _Damaged("it was written on a big-endian machine")
        self._storages: dict[str, Tensor] = {}

    def content(self) -> Any:
        return _content(self._bytes("data.pkl"), self._storage, self._size)

    def _bytes(self, name: str, otherwise: bytes | None = None) -> bytes:
        name = f"{self._folder}/{name}"
        return otherwise if otherwise is not None and name not in self._members else self._zip.read(self._members[name])

    def _storage(self, kind: str, key: str, length: int) -> Tensor:
        """The numbers ``[length]`` of a storage."""
        if key not in self._storages:
            data = self._bytes(f"data/{key}")
            self._storages[key] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else _NOTHING
        values, dtype = self._storages[key], _DTYPES[kind]
        if len(values) != length * dtype.itemsize:
            raise _Damaged(f"storage {key} has another size than the file says")
        return values.view(dtype)


def _content(pickled: bytes, storage: Callable[[str, str, int], Tensor], most: int) -> Any:
    """What a pickle of ``torch.save`` holds; ``most`` is the largest number of elements of a tensor."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def items() -> list[Any]:
        """What was put on the stack after the last mark."""
        start = marks.pop()
        found = stack[start:]
        del stack[start:]
        return found

    argument: Any
    for operation, argument, _ in pickletools.genops(pickled):
        match operation.name:
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(tuple(items()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "GLOBAL":
                stack.append(Unread(argument))
            case "BINPERSID":
                _, kind, key, _, length = stack.pop()
                stack.append(storage(kind.name, key, length) if kind.name in _DTYPES else kind)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop().name, arguments, most))
            case "NEWOBJ":
                stack.pop()
                stack.append(Unread(stack.pop().name))
            case "BUILD":
                stack.pop()  # attributes; those of an ordered dictionary are of no use here
            case "APPEND" | "APPENDS" as name:
                added = items() if name == "APPENDS" else [stack.pop()]
                if isinstance(stack[-1], list):
                    stack[-1].extend(added)
            case "SETITEM" | "SETITEMS" as name:
                added = items() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if isinstance(stack[-1], dict):
                    stack[-1].update(_pairs(added))
            case "PROTO":
                pass
            case "STOP":
                (content,) = stack
                return content
            case name:
                raise _Damaged(f"torch.save does not write {name}")
    raise _Damaged("it has no end")


def _check_tree(content: Any, most: int) -> None:
    """That nothing contains itself, and that it has at most ``most`` bytes where repetitions are counted too."""

    def count(part: Any, depth: int) -> None:
        nonlocal most
        most -= 1
        if isinstance(part, Tensor):
            most -= part.numel() * part.itemsize
        elif isinstance(part, str):
            most -= len(part)
        if depth > _DEEPEST or most < 0:
            raise _Damaged("it contains itself, or the same things over and over")
        if isinstance(part, dict):
            for key in part:
                count(key, depth)
        if isinstance(part, dict | list | tuple):
            for child in part.values() if isinstance(part, dict) else part:
                count(child, depth + 1)

    count(content, 0)


def _pairs(flat: list[Any]) -> dict[Any, Any]:
    keys = flat[::2]
    if not all(type(key) is str or (type(key) is int and abs(key) < 2**31) for key in keys):
        raise _Damaged("keys must be text or numbers")  # the hash of nested tuples may never end
    return dict(zip(keys, flat[1::2], strict=True))


def _made(name: str, arguments: tuple[Any, ...], most: int) -> Any:
    """What calling ``name`` would make, if it is a tensor or a dictionary."""
    match name:
        case "collections OrderedDict" if not arguments:
            return {}
        case "torch._utils _rebuild_parameter":
            return arguments[0]
        case "torch._utils _rebuild_tensor_v2":
            values, offset, size, stride = arguments[:4]
            return _tensor(values, offset, size, stride, most)
        case "torch._utils _rebuild_tensor_v3":  # of types that have no storage of their own, such as uint16
            values, offset, size, stride, _, _, dtype = arguments[:7]
            return _tensor(values.view(_NEW_DTYPES[dtype.name]), offset, size, stride, most)
    return Unread(name)


def _tensor(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], most: int) -> Tensor:
    """A view of a storage's numbers, which has no more elements than they are."""
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)) or len(size) > 64:
        raise _Damaged("a tensor has an impossible shape")
    if math.prod(size) > len(values) or math.prod(max(number, 1) for number in size) > most:
        raise _Damaged("a tensor has more elements than the file holds")
    return values.as_strided(size, stride, offset)
