"""safetensors as bytes: writing, and all kinds of invalid headers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from handmade import packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapterkit.errors import FormatError
from adapterkit.files.jsonfile import MAX_HEADER_BYTES, read_json
from adapterkit.files.opening import read_whole
from adapterkit.files.safetensors import (
    DTYPE_BITS,
    MAX_DIMS,
    MAX_NAME,
    TORCH_NAMES,
    encode_header,
    read_header,
    tensor_bytes,
    write_tensors,
)


def one(**changes: object) -> dict[str, object]:
    """The header of one F32 tensor of 8 bytes, with some fields changed."""
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, object]:
    return {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in (("a", first), ("b", second))
    }


BROKEN = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "claims 100 bytes in a file of 10"),
    "header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "claims 18,446,744,073,709,551,615 bytes"),
    "no JSON at all": (packed(b""), "not valid JSON"),
    "not JSON": (packed(b"{hello}"), "not valid JSON"),
    "two JSON values": (packed(b"{}{}"), "not valid JSON"),
    "a JSON array": (packed([]), "expected a JSON object, found list"),
    "invalid UTF-8": (packed(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (packed("{}".encode("utf-16")), "not valid JSON"),
    "half a surrogate pair": (packed(b'{"__metadata__": {"a": "\\ud800"}}'), "not valid JSON"),
    "deep nesting": (packed(b'{"t":' + b"[" * 100_000), "not valid JSON"),
    "nesting in an entry": (packed(b'{"t":' + b"[" * 90 + b"]" * 90 + b"}"), "'t' is malformed"),
    "a number of 5000 digits": (packed(b'{"t":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a number of 4000 digits": (packed(b'{"t":{"dtype":"F32","shape":[' + b"9" * 4000 + b"]}}"), "malformed"),
    "duplicate tensors": (packed(b'{"a": {}, "t": {}, "t": {}}'), "duplicate key 't'"),
    "duplicate fields": (packed(b'{"t": {"dtype": "F32", "dtype": "U8"}}'), "duplicate key 'dtype'"),
    "entry is null": (packed({"t": None}), "'t' is malformed"),
    "entry is a list": (packed({"t": ["F32", [2], [0, 8]]}), "'t' is malformed"),
    "no dtype": (packed({"t": {"shape": [2], "data_offsets": [0, 8]}}), "'t' is malformed"),
    "no shape": (packed({"t": {"dtype": "F32", "data_offsets": [0, 8]}}), "'t' is malformed"),
    "no offsets": (packed({"t": {"dtype": "F32", "shape": [2]}}), "'t' is malformed"),
    "unknown dtype": (packed(one(dtype="F31"), b"\0" * 8), "unknown dtype 'F31'"),
    "dtype is a number": (packed(one(dtype=32)), "malformed"),
    "shape is a number": (packed(one(shape=2)), "malformed"),
    "shape is a string": (packed(one(shape="")), "malformed"),
    "shape is an object": (packed(one(shape={})), "malformed"),
    "shape holds a bool": (packed(one(shape=[2, True]), b"\0" * 8), "malformed"),
    "shape holds a float": (packed(one(shape=[2.0]), b"\0" * 8), "malformed"),
    "shape holds NaN": (packed(one(shape=[float("nan")])), "malformed"),
    "shape holds Infinity": (packed(one(shape=[float("inf")])), "malformed"),
    "shape is negative": (packed(one(shape=[-1, -2]), b"\0" * 8), "malformed"),
    "shape beyond 63 bits": (packed(one(shape=[2**63])), "malformed"),
    "too many dimensions": (packed(one(shape=[2**62] * (MAX_DIMS + 1))), "malformed"),
    "absurd shape": (packed(one(shape=[2**62, 2**62])), "but its offsets span 8"),
    "absurd shape, many dimensions": (packed(one(shape=[2**62] * MAX_DIMS)), "but its offsets span 8"),
    "shape of more bytes": (packed(one(shape=[3]), b"\0" * 8), r"F32 \(3,\), 12 bytes, but its offsets span 8"),
    "shape of fewer bytes": (packed(one(shape=[1]), b"\0" * 8), "4 bytes, but its offsets span 8"),
    "three offsets": (packed(one(data_offsets=[0, 4, 8]), b"\0" * 8), "malformed"),
    "offsets the wrong way round": (packed(one(data_offsets=[8, 0]), b"\0" * 8), "offsets span -8"),
    "offsets outside the file": (packed(one(data_offsets=[2**40, 2**40 + 8]), b"\0" * 8), "t leaves a hole after"),
    "truncated data": (packed(one(), b"\0" * 7), "is truncated"),
    "trailing bytes": (packed(one(), b"\0" * 9), "was appended"),
    "trailing bytes without tensors": (packed({}, b"\0"), "was appended"),
    "overlap": (packed(two((0, 4), (3, 8)), b"\0" * 8), "b overlaps a"),
    "the same bytes twice": (packed(two((0, 8), (0, 8)), b"\0" * 8), "b overlaps a"),
    "a hole": (packed(two((0, 4), (5, 8)), b"\0" * 8), "b leaves a hole after a"),
    "a hole at the start": (packed(two((1, 4), (4, 8)), b"\0" * 8), "a leaves a hole after the header"),
    "metadata is a list": (packed({"__metadata__": []}), "must map strings to strings"),
    "metadata holds a number": (packed({"__metadata__": {"a": 1}}), "must map strings to strings"),
    "a line break in a name": (
        packed({"a\nb": one()["t"]}, b"\0" * 8),
        r"the tensor name 'a\\nb' has the unprintable character U\+000A",
    ),
    "an escape in a name": (packed({"\x1b[2J": one()["t"]}, b"\0" * 8), r"has the unprintable character U\+001B"),
    "an endless name": (
        packed({"a" * (MAX_NAME + 1): one()["t"]}, b"\0" * 8),
        "has 1,001 characters, expected at most 1,000",
    ),
}


@pytest.mark.parametrize(("raw", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_a_format_error(tmp_path: Path, raw: bytes, message: str) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < 4000
    assert "\n" not in str(caught.value)


def test_a_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with open(file, "r+b") as stream:
        stream.truncate(MAX_HEADER_BYTES + 9)  # a sparse file
    with pytest.raises(FormatError, match="has 67,108,865 bytes, expected at most 67,108,864"):
        read_header(file)


@pytest.mark.parametrize("read", [read_header, read_json])
def test_reading_a_special_file_is_a_format_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    """A FIFO without a writer would block, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path, tmp_path / "missing", tmp_path / "fifo", Path("/dev/zero"), Path("a\0b")):
        with pytest.raises(FormatError, match="cannot be read: "):
            read(file)


def test_a_whole_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_whole(tmp_path / "file", 5) == b"12345"
    with pytest.raises(FormatError, match=r"file: is too large, expected at most 4 bytes"):
        read_whole(tmp_path / "file", 4)


VALID = {
    "no tensors": ({}, b""),
    "0-d": ({"t": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no elements": ({"t": {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]}}, b""),
    "no elements, large": ({"t": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}}, b""),
    "4-bit": ({"t": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}, b"\0" * 3),
    "6-bit": ({"t": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"\0" * 3),
    "in no order": (two((4, 8), (0, 4)), b"\0" * 8),
    "an empty one between": ({"z": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}} | two((0, 4), (4, 8)), b"\0" * 8),
    "metadata only": ({"__metadata__": {"format": "pt"}}, b""),
    "a name in Cyrillic": ({"вес": one()["t"]}, b"\0" * 8),
}  # fmt: skip


@pytest.mark.parametrize(("header", "data"), VALID.values(), ids=VALID)
def test_unusual_but_valid(tmp_path: Path, header: dict[str, object], data: bytes) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes(packed(header, data))
    assert sorted(read_header(file).tensors) == sorted(header.keys() - {"__metadata__"})


def test_read_zero_dimensions_and_zero_elements(tmp_path: Path) -> None:
    header = {
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F16", "shape": [0, 3], "data_offsets": [4, 4]},
    }
    (tmp_path / "t.safetensors").write_bytes(packed(header, b"\0\0\x80\x3f"))
    tensors = read_header(tmp_path / "t.safetensors").tensors
    assert tensors["scalar"].read() == torch.tensor(1.0)
    assert (tensors["empty"].read().shape, tensors["empty"].read().dtype) == ((0, 3), torch.float16)


def test_a_dtype_that_torch_lacks_is_listed_but_not_read(tmp_path: Path) -> None:
    header = {"t": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    (tmp_path / "t.safetensors").write_bytes(packed(header, b"\0"))
    with pytest.raises(FormatError, match="t has dtype F4, which torch does not support"):
        read_header(tmp_path / "t.safetensors").tensors["t"].read()


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    file.write_bytes(packed(one(), b"\0" * 8))
    info = read_header(file).tensors["t"]
    with open(file, "r+b") as stream:
        stream.truncate(info.stop - 1)
    with pytest.raises(FormatError, match=f"ended at byte {info.stop - 1} while being read"):
        info.read()


# --- writing ---------------------------------------------------------------------------------------------------------


def test_encode_header_by_its_bytes() -> None:
    raw, spans = encode_header([("a", "F32", (1, 2)), ("b", "F4", (3,)), ("c", "U8", ())], {"k": "ü"})
    text = (
        '{"__metadata__":{"k":"ü"},'
        '"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        '"b":{"dtype":"F4","shape":[3],"data_offsets":[8,10]},'
        '"c":{"dtype":"U8","shape":[],"data_offsets":[10,11]}}'
    ).encode()
    padding = b" " * (-len(text) % 8)
    assert raw == len(text + padding).to_bytes(8, "little") + text + padding
    base = len(raw)
    assert base % 8 == 0
    assert spans == [(base, base + 8), (base + 8, base + 10), (base + 10, base + 11)]


def test_encode_an_empty_header() -> None:
    assert encode_header([], {}) == (b"\x08\0\0\0\0\0\0\0{}      ", [])


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", (), 4), ("F64", (0, 7), 0), ("F4", (1,), 1), ("F4", (3,), 2), ("F6_E3M2", (4,), 3), ("BOOL", (5,), 5)],
)
def test_tensor_bytes(dtype: str, shape: tuple[int, ...], size: int) -> None:
    assert tensor_bytes(dtype, shape) == size


def sample(dtype: str) -> torch.Tensor:
    """Three rows of bytes that are valid in every dtype."""
    raw = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.uint8).repeat_interleave(DTYPE_BITS[dtype] // 8)
    return raw.view(getattr(torch, TORCH_NAMES[dtype])).reshape(3, 2)


@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_round_trips_with_the_safetensors_library(tmp_path: Path, dtype: str) -> None:
    tensors = {"t": sample(dtype), "scalar": sample(dtype)[0, 1], "empty": sample(dtype)[:0]}
    write_tensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    theirs_of_ours, header = load_file(tmp_path / "ours"), read_header(tmp_path / "theirs")
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        assert header.tensors[name].dtype == dtype
        for other in (
            theirs_of_ours[name],
            header.tensors[name].read(),
            read_header(tmp_path / "ours").tensors[name].read(),
        ):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert other.view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))


def test_a_view_is_written_as_its_own_elements(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    write_tensors(tmp_path / "t", {"t": whole.T[1:3], "double": whole[:, :1].double()}, {})
    loaded = load_file(tmp_path / "t")
    assert loaded["t"].equal(whole.T[1:3])
    assert loaded["double"].equal(whole[:, :1].double())


# --- random edits ----------------------------------------------------------------------------------------------------

GOOD = packed(two((0, 4), (4, 8)) | {"__metadata__": {"format": "pt"}}, bytes(8))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 4), st.binary(max_size=6)), min_size=1, max_size=4
    )
)
def test_mutations_are_read_or_refused(tmp_path: Path, cuts: list[tuple[int, int, bytes]]) -> None:
    raw = GOOD
    for at, length, new in cuts:
        raw = raw[:at] + new + raw[at + length :]
    file = tmp_path / "t.safetensors"
    file.write_bytes(raw)
    try:
        header = read_header(file)
    except FormatError as error:
        assert "\n" not in str(error)
        return
    assert header.nbytes + sum(info.nbytes for info in header.tensors.values()) == len(raw)


def test_the_library_accepts_all_that_we_accept(tmp_path: Path) -> None:
    """With random edits of the JSON values; our reader may be stricter, never laxer."""
    rng = random.Random(0)
    values = [0, 1, 4, 8, -1, 2.0, True, None, "U8", "F4", [], [4], [0, 4], [4, 8], {}, 2**64]
    file, accepted = tmp_path / "t.safetensors", 0
    for _ in range(400):
        header = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])
        entry = header[rng.choice("ab")]
        entry[rng.choice(["dtype", "shape", "data_offsets"])] = rng.choice(values)
        file.write_bytes(packed(header, bytes(8)))
        try:
            read_header(file)
        except FormatError:
            continue
        accepted += 1
        with safetensors.safe_open(file, "pt") as opened:
            assert set(opened.keys()) == {"a", "b"}
    assert accepted


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested 101 levels deep"),
        (b"[1]", "expected a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"", "not valid"),
        (b'{"a": [' + b"{}," * 300_000 + b"{}]}", "the JSON has up to 600,003 values, expected at most 500,000"),
        (b" " * ((1 << 24) + 1), "is too large, expected at most 16,777,216 bytes"),
    ],
)
def test_read_json_refuses(tmp_path: Path, raw: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(FormatError, match=message):
        read_json(tmp_path / "a.json")


def test_a_large_index_is_read(tmp_path: Path) -> None:
    """It may have more entries than a config, up to the limits of a header."""
    weight_map = dict.fromkeys(map(str, range(510_000)), "x")
    (tmp_path / "a.json").write_text(json.dumps(weight_map))
    assert read_json(tmp_path / "a.json", large=True) == weight_map
    (tmp_path / "a.json").write_bytes(b"[" + b"{}," * 1_000_000 + b"{}]")
    with pytest.raises(FormatError, match="up to 2,000,002 values, expected at most 2,000,000"):
        read_json(tmp_path / "a.json", large=True)
    (tmp_path / "t.safetensors").write_bytes(packed((tmp_path / "a.json").read_bytes()))
    with pytest.raises(FormatError, match="up to 2,000,002 values, expected at most 2,000,000"):
        read_header(tmp_path / "t.safetensors")


def test_read_json_accepts_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"r": 8}')
    assert read_json(tmp_path / "a.json") == {"r": 8}
