"""The reader of torch files against torch's own, and against files that were made to be read wrong."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples

from cxgrad_fast.config import InputError
from cxgrad_fast.torch_files import Unread, read_torch_file

DTYPES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "complex64",
    "complex128",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def saved(file: Path, content: object) -> Any:
    """What is read of a saved content."""
    torch.save(content, file)
    return read_torch_file(file)


def told(file: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_torch_file(file)
    text = str(caught.value)
    assert text.startswith(f"cannot read the checkpoint '{file}': ")
    assert text.isprintable()
    return text


def write(file: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """A torch file with any data.pkl; ``_0=b"..."`` is the storage 0."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/version", b"3\n")
        for name, data in members.items():
            archive.writestr(f"x/data/{name[1:]}" if name[0] == "_" else f"x/{name}", data)


# what a file holds


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_type_and_layout(file: Path, name: str) -> None:
    whole = torch.arange(24).to(getattr(torch, name)).view(2, 3, 4)
    content = {
        "whole": whole,
        "turned": whole.permute(2, 0, 1),
        "part": whole[1, :, 1:3],
        "every other": whole[..., ::2],
    }
    content |= {"none": whole[:0], "one": whole[1, 2, 3], "row": whole[1, 2, 3].expand(3)}
    back = saved(file, content)
    assert back.keys() == content.keys()
    for key, tensor in content.items():
        assert type(back[key]) is torch.Tensor
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert torch.equal(back[key].to(torch.complex128), tensor.to(torch.complex128)), key


def test_state_dicts_and_parameters_are_plain(file: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    content = {"network": state, "parameter": torch.nn.Parameter(torch.ones(2)), "optimizer": optimizer.state_dict()}
    back = saved(file, content)
    assert type(back["network"]) is dict
    assert all(torch.equal(back["network"][name], tensor) for name, tensor in state.items())
    assert not back["parameter"].requires_grad
    assert torch.equal(back["optimizer"]["state"][0]["exp_avg"], content["optimizer"]["state"][0]["exp_avg"])
    assert back["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


def test_what_is_neither_tensor_nor_plain_is_not_made(file: Path) -> None:
    content = {
        "a": np.float64(0.5),
        "b": [np.int64(1)],
        "c": b"bytes",
        "d": {1, 2},
        "e": Path("x"),
        "f": torch.float32,
        "g": 1,
    }
    back = saved(file, content)
    assert back.pop("g") == 1
    assert isinstance(back["b"][0], Unread)
    assert all(isinstance(value, Unread) for name, value in back.items() if name != "b")
    assert back["c"].name == "_codecs encode"


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(),
    lambda part: (
        st.lists(part, max_size=4)
        | st.tuples(part, part)
        | st.dictionaries(st.text(max_size=5) | st.integers(0, 9), part, max_size=4)
    ),
    max_leaves=20,
)


@examples(200)
@given(_PLAIN)
def test_plain_content_comes_back_as_it_was(tmp_path_factory, content: object) -> None:
    assert saved(tmp_path_factory.getbasetemp() / "plain.pt", content) == content


def test_a_file_from_before_torch_1_6_is_told_apart(file: Path) -> None:
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert "torch's format from before version 1.6; if you trust it, torch.save(torch.load(FILE), FILE)" in told(file)


# files that ask for more than they have


def test_a_tensor_with_more_elements_than_the_file_is_refused(file: Path) -> None:
    for tensor in (
        torch.ones(1).expand(4_000_000_000),
        torch.ones(1).expand(100_000, 1_000_000),
        torch.ones(2, 1).expand(2, 10**9).t(),
        torch.empty(0).expand(10**9, 0),
        torch.empty(2**31, 0, 2**31),
    ):
        torch.save({"a": tensor}, file)
        assert file.stat().st_size < 4000
        assert "a tensor has more elements than the file holds" in told(file)


def test_compressed_members_are_refused(file: Path) -> None:
    write(file, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, _0=bytes(100_000_000))
    assert file.stat().st_size < 200_000
    tracemalloc.start()
    try:
        assert "its members are compressed, those of torch.save are not" in told(file)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_members_that_share_their_bytes_or_names_are_refused(file: Path) -> None:
    write(file, pickle.dumps({}, 2), _0=bytes(1000))
    data = file.read_bytes()
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    (count,) = struct.unpack("<H", data[end + 10 : end + 12])
    entries = data[start:end]
    for copies in (2, 100):
        numbers = struct.pack("<HHLL", count * copies, count * copies, len(entries) * copies, start)
        file.write_bytes(data[:start] + entries * copies + data[end : end + 8] + numbers + b"\0\0")
        assert "its members are larger than the file" in told(file)


class _Call:
    """Pickles to a call of something by its name."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "call",
    [
        _Call(bytearray, 10**12),
        _Call(torch.UntypedStorage, 10**12),
        _Call(torch.FloatTensor, 10**12),
        _Call(torch.Size, [10**12]),
        _Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (10**12,), (1,), False),
        _Call(OrderedDict, [["a", 1]]),
        _Call(print, "called"),
    ],
)
def test_nothing_that_a_file_names_is_called(file: Path, call: _Call, capsys) -> None:
    back = saved(file, {"a": call, "b": 1})
    assert isinstance(back["a"], Unread)
    assert back["b"] == 1
    assert capsys.readouterr().out == ""


def _pid(kind: bytes, key: str, length: int) -> bytes:
    return (
        b"(X\x07\0\0\0storagec"
        + kind
        + b"\nX"
        + struct.pack("<I", len(key))
        + key.encode()
        + b"X\x03\0\0\0cpu"
        + (b"J" + struct.pack("<i", length) + b"tQ")
    )


def _tensor(offset: bytes = b"K\0", size: bytes = b"K\x04\x85", stride: bytes = b"K\x01\x85", length: int = 4) -> bytes:
    pid = _pid(b"torch\nFloatStorage", "0", length)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + pid + offset + size + stride + b"\x89NtR."


def test_a_tensor_made_by_hand(file: Path) -> None:
    write(file, _tensor(), _0=torch.arange(4.0).numpy().tobytes())
    assert torch.equal(read_torch_file(file), torch.arange(4.0))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (_tensor(length=5), "storage 0 has another size than the file says"),
        (_tensor(length=-4), "storage 0 has another size than the file says"),
        (_tensor(offset=b"K\1"), ""),
        (_tensor(offset=b"J\xff\xff\xff\xff"), "a tensor has an impossible shape"),
        (_tensor(offset=b"X\x01\0\0\x000"), "a tensor has an impossible shape"),
        (_tensor(size=b"K\x05\x85"), "a tensor has more elements than the file holds"),
        (_tensor(size=b"J\xff\xff\xff\xff\x85"), "a tensor has an impossible shape"),
        (_tensor(size=b"K\x02K\x02\x86"), ""),
        (_tensor(size=b"(" + b"K\1" * 65 + b"t", stride=b"(" + b"K\1" * 65 + b"t"), "a tensor has an impossible shape"),
        (_tensor(stride=b"K\x02\x85"), ""),
        (_tensor(stride=b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85"), ""),
        (_tensor(stride=b"\x8a\x10" + b"\xff" * 15 + b"\x7f\x85"), ""),
        (_tensor(stride=b"G" + struct.pack(">d", 1.0) + b"\x85"), "a tensor has an impossible shape"),
        (_tensor().replace(b"\x01\0\0\x000", b"\x01\0\0\x001"), ""),
        (b"", ""),
        (b".", ""),
        (b"\x80\x02}(]]u.", "keys must be text or numbers"),
        (b"\x80\x02}K\x01K\x01\x86K\x01s.", "keys must be text or numbers"),
        (b"\x80\x02}(K\x01u.", ""),
        (b"\x80\x02h\x07.", ""),
        (b"\x80\x02cos\nsystem\n0.", "torch.save does not write POP"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "torch.save does not write FRAME"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", ""),
        (b"\x80\x02X\xff\xff\xff\xffabc.", ""),
        (b"\x80\x02L" + b"9" * 5000 + b"L\n.", ""),
        (b"\x80\x02K\x01Q.", ""),
        (b"\x80\x02K\x01)R.", ""),
        (b"\x80\x02K\x01)\x81.", ""),
    ],
    ids=str,
)
def test_odd_pickles_are_told(file: Path, pickled: bytes, message: str) -> None:
    write(file, pickled, _0=torch.arange(4.0).numpy().tobytes())
    text = told(file)
    assert text.endswith(f"it is truncated or damaged ({message})" if message else "it is truncated or damaged")


def test_a_memo_far_away_takes_no_memory(file: Path) -> None:
    write(file, b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\xff\x86.")
    assert read_torch_file(file) == ([], [])


def _nested(depth: int) -> list[Any]:
    content: list[Any] = []
    for _ in range(depth):
        content = [content]
    return content


def test_content_without_end_is_refused(file: Path) -> None:
    own: dict[str, Any] = {}
    own["own"] = own
    doubled: list[Any] = []
    for _ in range(45):
        doubled = [doubled, doubled]
    many = "x" * 1000
    for content in (own, doubled, {"a": [many] * 1000}, {str(i): torch.ones(1000).expand(1000) for i in range(3)}):
        torch.save(content, file)
        if content is not own and "0" in content:
            assert len(read_torch_file(file)) == 3
        else:
            assert "it contains itself, or the same things over and over" in told(file)
    one = torch.ones(1000)
    torch.save([one] * 200, file)
    assert "it contains itself, or the same things over and over" in told(file)
    for depth in (60, 100_000):
        write(file, b"\x80\x02]" + b"]" * depth + b"a" * depth + b".")
        assert "it contains itself, or the same things over and over" in told(file)
    assert saved(file, _nested(40)) == _nested(40)


def test_keys_whose_hash_has_no_end_are_refused(file: Path) -> None:
    """A tuple of twice itself, sixty times: nobody may ask for its hash."""
    doubled = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
    write(file, b"\x80\x02})" + doubled + b"K\x01s.")
    assert "keys must be text or numbers" in told(file)


# archives


def test_an_archive_of_another_kind_is_told(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "x")
    assert "it holds no data.pkl" in told(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", "x")
        archive.writestr("b/data.pkl", "x")
    assert "it holds no data.pkl" in told(file)
    write(file, b"\x80\x02].", byteorder=b"big")
    assert "it was written on a big-endian machine" in told(file)
    file.write_bytes(b"")
    assert told(file).endswith("it is not a torch file")


def test_a_member_whose_checksum_is_wrong_is_told(file: Path) -> None:
    write(file, _tensor(), _0=torch.arange(4.0).numpy().tobytes())
    data = file.read_bytes()
    file.write_bytes(data.replace(torch.arange(4.0).numpy().tobytes(), bytes(16)))
    assert "it is truncated or damaged" in told(file)


@examples(300)
@given(st.data())
def test_any_bytes_are_told_or_read(tmp_path_factory, data) -> None:
    """A changed archive, a changed pickle in a whole archive, a pickle of any operations: never another error."""
    file = tmp_path_factory.getbasetemp() / "any.pt"
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": [1, 2.0, "c"], "d": OrderedDict(e=torch.zeros(2, 2))}, buffer)
    whole = buffer.getvalue()
    archive = zipfile.ZipFile(buffer)
    folder = archive.namelist()[0].partition("/")[0]
    storages = {f"_{key}": archive.read(f"{folder}/data/{key}") for key in "01"}
    pickled = archive.read(f"{folder}/data.pkl")
    chance = random.Random(data.draw(st.integers(0, 2**32)))

    def changed(original: bytes) -> bytes:
        flipped = bytearray(original)
        for _ in range(chance.randrange(1, 6)):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        return bytes(flipped)

    operations = b"NI\x88\x89]})(tu\x85\x86\x87easQRbh\x00h\x01q\x00q\x01K\x01K\x02.X\x01\x00\x00\x00a" + b"\x81" * 2
    kind = data.draw(st.sampled_from(["archive", "pickle", "operations", "cut"]))
    if kind == "archive":
        file.write_bytes(changed(whole))
    elif kind == "cut":
        file.write_bytes(whole[: chance.randrange(len(whole))])
    elif kind == "pickle":
        write(file, changed(pickled), **storages)
    else:
        write(file, bytes(chance.choices(operations, k=chance.randrange(60))) + b".", **storages)
    try:
        read_torch_file(file)
    except InputError as error:
        text = str(error)
    else:
        return
    assert text.startswith(f"cannot read the checkpoint '{file}': ")
