"""The residual codec: the largest errors of subtraction, the limits of each count, and invalid streams."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch

from adapterkit.algebra.residual import Residual
from adapterkit.errors import FormatError
from adapterkit.merging.blocks import residual_codec
from adapterkit.merging.blocks.residual_codec import (
    correct,
    correct_bytes,
    encode,
    encode_bytes,
    encode_difference,
    restore_difference,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
FAR = 2**14


def every(dtype: torch.dtype) -> torch.Tensor:
    """All 16-bit values, or as many wider ones with 0, ±1 and the extremes."""
    integer = INTEGERS[dtype]
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).short().view(dtype)
    limits = torch.iinfo(integer)
    return torch.randint(limits.min, limits.max, (2**12,), dtype=integer).view(dtype)


def beside(values: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Move each value up by `steps` in the order of all values, where −0 precedes 0."""
    bits = values.view(INTEGERS[values.dtype]).numpy().astype(object)
    least = -(2 ** (8 * values.element_size() - 1))
    rank = np.where(bits >= 0, bits, least - 1 - bits) + steps.numpy().astype(object)
    moved = np.where(rank >= 0, rank, least - 1 - rank)
    return torch.tensor(moved.tolist(), dtype=INTEGERS[values.dtype]).view(values.dtype)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_values_within_reach_are_corrected(dtype: torch.dtype) -> None:
    """Up to the largest distance, to either side and across zero; values stored whole are restored from anything."""
    values = every(dtype)[:: 7 if dtype.itemsize == 2 else 1]
    values = values[values.isfinite() & (values.abs() < torch.finfo(dtype).max / 2)]
    reach = torch.tensor([0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 65, 1000, FAR])[torch.arange(len(values)) % 16]
    code = encode(Residual(torch.arange(len(values)).int(), values, reach.short()))
    for share in (-1.0, -0.4, 0.0, 0.7, 1.0):
        anywhere = torch.randint(0, 2**13, reach.shape) * torch.where(values > 0, -1, 1)
        steps = (reach * share).trunc().long().where(reach < 64, anywhere)
        out = beside(values, steps)
        correct(code, out, "here")
        assert torch.equal(out.view(INTEGERS[dtype]), values.view(INTEGERS[dtype])), share
    assert len(code) < 1.3 * dtype.itemsize * len(values)


def test_two_bits_are_enough_for_most() -> None:
    """Values at most one step off take two bits, those further off more, and whole ones all of theirs."""
    values, at = torch.rand(2**16).add_(1).float(), torch.arange(2**16).int()
    sizes = []
    for reach in (1, 3, 7, 15, 31, 63, 64):
        sizes.append(8 * len(encode(Residual(at, values, torch.full((2**16,), reach).short()))) / 2**16)
    assert sizes == pytest.approx([2, 3, 4, 5, 6, 7, 23], abs=0.5)


@pytest.mark.parametrize("gap", [1, 255, 256, 65_535, 65_536, 2**24])
def test_positions_however_far_apart(gap: int) -> None:
    at = torch.tensor([0, gap, gap + 1])
    out = torch.zeros(gap + 2).bfloat16()
    correct(
        encode(Residual(at, torch.tensor([1.0, 2.0, 3.0]).bfloat16(), torch.tensor([FAR] * 3).short())), out, "here"
    )
    assert out.nonzero()[:, 0].tolist() == at.tolist() and out[at].tolist() == [1.0, 2.0, 3.0]
    some = torch.zeros(gap + 2, dtype=torch.uint8)
    wanted = some.clone()
    wanted[at] = torch.tensor([255, 1, 128], dtype=torch.uint8)
    correct_bytes(encode_bytes(wanted, some), some, "here")
    assert torch.equal(some, wanted) and encode_bytes(wanted, some) == b""


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_difference_restores_every_bit_from_anything(dtype: torch.dtype) -> None:
    before = every(dtype)
    for after in (before, before.flip(0), before.roll(1), torch.zeros_like(before)):
        code, out = encode_difference(before, after), torch.empty_like(before)
        restore_difference(code, after, out, "here")
        assert torch.equal(out.view(INTEGERS[dtype]), before.view(INTEGERS[dtype]))
    near = encode_difference(before, beside(before, torch.zeros(len(before), dtype=torch.long)))
    assert residual_codec.is_difference(near) and len(near) < 9 + 8 * (
        dtype.itemsize + 1
    )  # planes of zeros take nothing
    wide = before.double() * 1.1
    restore_difference(encode_difference(before, wide), wide, out := torch.empty_like(before), "here")
    assert torch.equal(out.view(INTEGERS[dtype]), before.view(INTEGERS[dtype]))


def test_steps_to_neighbours_take_few_bits() -> None:
    """Of either sign: only the lowest bytes are not zero."""
    before = torch.randn(2**14)
    after = beside(before, torch.randint(-1, 2, before.shape))
    assert 8 * len(encode_difference(before, after)) < 2.5 * len(before)


# --- what is read may be a stranger's ---------------------------------------------------------------------------------


def stream(kind: int, many: int, whole: int, *planes: Any, after: bytes = b"") -> bytes:
    """A code written by hand, each plane by its bytes or by its encoding."""
    code = struct.pack("<BII", kind, many, whole)
    for plane in planes:
        _, size, packed = plane if isinstance(plane, tuple) else (plane, len(plane), zstd.compress(plane))
        code += struct.pack("<II", len(packed), size) + packed
    return code + after


NOTHING = (b"", 0, b"")  # a plane without bytes
GAPS = [b"\1\2", b"\0\0", b"\0\0", b"\0\0"]  # of elements 0 and 2
ZEROS = (b"", 2, b"")  # of which two are zero, not stored
GOOD = [*GAPS, b"\1\xff", b"\x34", b"\x12"]  # the lowest two bits of one, and the other whole


@pytest.mark.parametrize("gaps", [GAPS, [b"\1\2", ZEROS, ZEROS, ZEROS]])
def test_a_code_that_is_written_by_hand_is_read(gaps: list[Any]) -> None:
    out = torch.tensor([2, 7, 5], dtype=torch.int16).view(torch.bfloat16)
    correct(stream(1, 2, 1, *gaps, *GOOD[4:]), out, "here")
    assert out.view(torch.int16).tolist() == [1, 7, 0x1234]
    data = torch.tensor([2, 7, 5], dtype=torch.uint8)
    correct_bytes(stream(3, 2, 0, *gaps, b"\x09\x08"), data, "here")
    assert data.tolist() == [9, 7, 8]
    after = torch.tensor([2, 7, 5], dtype=torch.int16).view(torch.bfloat16)
    restore_difference(stream(2, 3, 0, b"\1\2\xff", b"\0\0\1"), after, out, "here")  # −1, 1, −256
    assert out.view(torch.int16).tolist() == [1, 8, -32_518]


BAD = {
    "of another kind": stream(3, 2, 1, *GOOD),
    "more whole than there are": stream(1, 2, 3, *GOOD),
    "more than there are elements": stream(1, 4, 1, b"\1\1\1\1", *[b"\0" * 4] * 3, b"\1\1\1\xff", b"\x34", b"\x12"),
    "fewer gaps than elements": stream(1, 2, 1, *[b"\1"] * 1, *[b"\0"] * 3, *GOOD[4:]),
    "gaps of different lengths": stream(1, 2, 1, b"\1\2", b"\0", b"\0\0", b"\0\0", *GOOD[4:]),
    "a gap of zero": stream(1, 2, 1, b"\1\0", *GAPS[1:], *GOOD[4:]),
    "a position beyond": stream(1, 2, 1, b"\1\3", *GAPS[1:], *GOOD[4:]),
    "a position far beyond": stream(1, 2, 1, *GAPS[:3], b"\0\xff", *GOOD[4:]),
    "a symbol too few": stream(1, 2, 1, *GAPS, b"\xff", b"\x34", b"\x12"),
    "a symbol too many": stream(1, 2, 1, *GAPS, b"\1\1\xff", b"\x34", b"\x12"),
    "symbols that mean nothing": stream(1, 2, 1, *GAPS, b"\xfc\xff", b"\x34", b"\x12"),
    "fewer whole than counted": stream(1, 2, 1, *GAPS, b"\1\1", b"\x34", b"\x12"),
    "fewer values than counted": stream(1, 2, 1, *GAPS, b"\1\1", NOTHING, NOTHING),
    "values of different lengths": stream(1, 2, 1, *GAPS, b"\1\xff", b"\x34", NOTHING),
    "a plane too few": stream(1, 2, 1, *GOOD[:-1]),
    "a plane too many": stream(1, 2, 1, *GOOD, NOTHING),
    "a byte too many": stream(1, 2, 1, *GOOD, after=b"\0"),
    "cut": stream(1, 2, 1, *GOOD)[:-1],
    "no counts": b"\1\0",
    "a plane of more": stream(1, 2, 1, *GAPS, (b"", 1, zstd.compress(b"\1\xff")), *GOOD[5:]),
    "a plane of less": stream(1, 2, 1, *GAPS, (b"", 2, zstd.compress(b"\1")), *GOOD[5:]),
    "a plane of two frames": stream(1, 2, 1, *GAPS, (b"", 2, zstd.compress(b"\1\xff") + zstd.compress(b"")), *GOOD[5:]),
    "a plane that is cut": stream(1, 2, 1, *GAPS, (b"", 2, zstd.compress(b"\1\xff")[:-1]), *GOOD[5:]),
    "a plane of anything": stream(1, 2, 1, *GAPS, (b"", 2, b"\1\xff"), *GOOD[5:]),
}


@pytest.mark.parametrize("what", BAD)
def test_invalid_codes_are_refused(what: str) -> None:
    out = torch.tensor([2, 7, 5], dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(FormatError, match="^here: cannot restore 3 elements of torch.bfloat16: "):
        correct(BAD[what], out, "here")
    assert out.view(torch.int16).tolist() == [2, 7, 5]


@pytest.mark.parametrize(
    "code",
    [
        stream(2, 2, 0, b"\0\0", b"\0\0"), stream(2, 3, 0, b"\0\0", b"\0\0"), stream(2, 3, 0, b"\0\0\0", b"\0\0"),
        stream(2, 3, 0, b"\0\0\0"), stream(2, 3, 0, *[b"\0\0\0"] * 3), stream(1, 3, 0, *[b"\0\0\0"] * 2),
        stream(2, 4, 0, *[b"\0\0\0\0"] * 2),
    ],
)  # fmt: skip
def test_differences_that_do_not_fit_are_refused(code: bytes) -> None:
    after, out = torch.ones(3).bfloat16(), torch.full((3,), 7.0).bfloat16()
    with pytest.raises(FormatError, match="here"):
        restore_difference(code, after, out, "here")
    assert out.tolist() == [7.0] * 3


@pytest.mark.parametrize(
    "code",
    [
        stream(1, 2, 0, *GAPS, b"\x09\x08"), stream(3, 2, 0, *GAPS, b"\x09"), stream(3, 2, 0, *GAPS),
        stream(3, 2, 0, *GAPS, b"\x09\x08", after=b"\0"), stream(3, 2, 0, b"\1\3", *GAPS[1:], b"\x09\x08"),
    ],
)  # fmt: skip
def test_bytes_that_do_not_fit_are_refused(code: bytes) -> None:
    out = torch.tensor([2, 7, 5], dtype=torch.uint8)
    with pytest.raises(FormatError, match="here"):
        correct_bytes(code, out, "here")
    assert out.tolist() == [2, 7, 5]
