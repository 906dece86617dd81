"""Encode residuals: gaps between positions, and the lowest bits of each value, in compressed planes.

Subtraction lands within a few steps of the original value, so its lowest bits identify it, whatever arithmetic
subtracts: two bits for most. Values that may land further off are stored whole. The bytes may be a stranger's: every
count is checked against their number, and nothing inflates beyond it.
"""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from adapterkit.algebra.residual import Residual, from_ordered, integers, ordered
from adapterkit.errors import FormatError
from adapterkit.packages import needed

RESIDUAL, DIFFERENCE, BYTES = 1, 2, 3
LEVEL = 1  # of zstd: only the frequencies of bytes are redundant, and higher levels find nothing more
_COUNTS = struct.Struct("<BII")  # kind, number of elements, number of those stored whole
_PLANE = struct.Struct("<II")  # compressed and inflated size in bytes
_BITS = range(2, 8)  # numbers of lowest bits that a symbol can hold
_WHOLE = 255  # the symbol of a value that is stored whole
_FIRST = np.array(
    [_WHOLE, 0, *(2**bits - 4 for bits in _BITS)], np.uint8
)  # the symbol of all zero bits, by their number
_ENOUGH = np.array([next((b for b in _BITS if reach < 2 ** (b - 1)), 0) for reach in range(65)], np.uint8)  # bits
_MASKS = np.array([2**bits - 1 for bits in range(_BITS.stop)], np.uint8)
_SYMBOL_BITS = np.repeat(np.array([*_BITS, 0], np.uint8), [*(2**bits for bits in _BITS), 4])


def encode(residual: Residual) -> bytes:
    """Encode a residual of up to 2³² elements."""
    return encode_each(residual, [0])[0]


def encode_each(residual: Residual, starts: Sequence[int]) -> list[bytes]:
    """Encode each part of a residual, with positions relative to the part's start."""
    residual = residual.to(torch.device("cpu"))
    bits = _ENOUGH[np.minimum(residual.reach.numpy(), len(_ENOUGH) - 1)]
    lowest = _bits(ordered(residual.values)).astype(np.uint8)
    symbols = _FIRST[bits] + (lowest & _MASKS[bits])
    whole = bits == 0
    at = residual.at.numpy()
    ends = [*np.searchsorted(at, starts).tolist(), len(at)]  # number of elements before each part, and of all
    whole_ends = np.append(0, np.cumsum(whole))[ends].tolist()
    gaps = np.diff(at, prepend=-1)
    for start, first, last in zip(starts, ends, ends[1:], strict=False):
        if first < last:
            gaps[first] = at[first] - start + 1
    planes = [(plane, ends) for plane in (*_planes(gaps.astype(np.uint32)), symbols.tobytes())]
    planes += [(plane, whole_ends) for plane in _planes(_bits(residual.values)[whole])]
    counts = zip(np.diff(ends).tolist(), np.diff(whole_ends).tolist(), strict=True)
    heads = [_COUNTS.pack(RESIDUAL, *count) for count in counts]
    return [b"".join(parts) for parts in zip(heads, *(_deflate_each(*plane) for plane in planes), strict=True)]


def encode_difference(before: torch.Tensor, after: torch.Tensor) -> bytes:
    """Encode every element of `before` by its steps from `after`, if no residual restores it."""
    steps = ordered(before.reshape(-1)) - ordered(after.to(before.dtype).reshape(-1))  # wraps around, as decoding does
    planes = _planes(_zigzag(steps.cpu()))
    return _COUNTS.pack(DIFFERENCE, before.numel(), 0) + b"".join(map(_deflate, planes))


def is_difference(data: bytes) -> bool:
    """Whether the code restores every element, not only those that subtraction does not."""
    return data[:1] == bytes([DIFFERENCE])


def restore_difference(data: bytes, after: torch.Tensor, out: torch.Tensor, where: str) -> None:
    """Restore `out` from `after` by the code of `encode_difference`.

    Raises FormatError, naming `where`, for any other code.
    """
    width, count = out.dtype.itemsize, out.numel()
    with _errors(where, out):
        reader = _Reader(data, DIFFERENCE, count)
        steps = _unzigzag(_joined([reader.plane(count) for _ in range(width)]))
        reader.end(len(steps) == reader.many == count)
    back = ordered(after.to(out.dtype).reshape(-1)) + torch.from_numpy(steps).to(out.device)
    integers(out.view(-1)).copy_(integers(from_ordered(back, out.dtype)))


def correct(data: bytes, out: torch.Tensor, where: str) -> None:
    """Correct the elements of `out`, the rounded result of subtraction, that `encode` recorded.

    Raises FormatError, naming `where`, for any other code.
    """
    width, count = out.dtype.itemsize, out.numel()
    with _errors(where, out):
        reader = _Reader(data, RESIDUAL, count)
        positions = reader.positions()
        symbols = reader.plane(reader.many)
        values = _joined([reader.plane(reader.whole) for _ in range(width)])
        whole, bits = symbols == _WHOLE, _SYMBOL_BITS[symbols]
        fits = len(symbols) == reader.many and whole.sum() == len(values) == reader.whole
        reader.end(bool(fits) and bool((bits[~whole] > 0).all()))
    flat, at = out.view(-1), torch.from_numpy(positions).to(out.device)
    found = _bits(ordered(flat[at]).cpu())
    half, step = (_MASKS[bits] + 1) >> 1, symbols - _FIRST[bits] - found.astype(np.uint8)
    near = ((step + half) & _MASKS[bits]).astype(found.dtype) - half  # the nearest value with those lowest bits
    restored = integers(from_ordered(torch.from_numpy((found + near).view(f"<i{width}")), out.dtype))
    restored[torch.from_numpy(whole)] = torch.from_numpy(values.view(f"<i{width}"))
    integers(flat)[at] = restored.to(out.device)


def encode_bytes(wanted: torch.Tensor, found: torch.Tensor) -> bytes:
    """Encode the bytes of `wanted` that differ from `found`; empty if none does."""
    at = (wanted != found).nonzero()[:, 0].cpu().numpy()
    if not len(at):
        return b""
    planes = [*_planes(np.diff(at, prepend=-1).astype(np.uint32)), wanted.cpu().numpy()[at].tobytes()]
    return _COUNTS.pack(BYTES, len(at), 0) + b"".join(map(_deflate, planes))


def correct_bytes(data: bytes, out: torch.Tensor, where: str) -> None:
    """Correct the bytes of `out` that `encode_bytes` recorded. Raises FormatError as `correct` does."""
    with _errors(where, out):
        reader = _Reader(data, BYTES, out.numel())
        positions = reader.positions()
        values = reader.plane(reader.many)
        reader.end(len(values) == reader.many)
    out[torch.from_numpy(positions).to(out.device)] = torch.from_numpy(values).to(out.device)


@contextmanager
def _errors(where: str, out: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except (ValueError, struct.error, _zstd().ZstdError) as error:
        raise FormatError(f"{where}: cannot restore {out.numel()} elements of {out.dtype}: {error}") from error


@cache
def _zstd() -> Any:
    """Python's zstd or its backport, imported only if needed: a merge without a receipt works without it."""
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return needed(module, "a receipt", instead="merge with `receipt=False`")


_of_thread = threading.local()


def _compressor() -> Any:
    """A compressor of this thread: creating one takes longer than compressing a small plane."""
    if not hasattr(_of_thread, "compressor"):
        _of_thread.compressor = _zstd().ZstdCompressor(LEVEL)
    return _of_thread.compressor


# --- planes ----------------------------------------------------------------------------------------------------------


def _deflate_each(plane: bytes, ends: Sequence[int]) -> list[bytes]:
    """The parts of a plane between `ends`."""
    if plane == bytes(len(plane)):
        return [_PLANE.pack(0, last - first) for first, last in pairwise(ends)]
    return [_deflate(plane[first:last]) for first, last in pairwise(ends)]


def _deflate(plane: bytes) -> bytes:
    packed = b""  # for all zeros
    if plane != bytes(len(plane)):
        compressor = _compressor()
        packed = compressor.compress(plane, compressor.FLUSH_FRAME)
    return _PLANE.pack(len(packed), len(plane)) + packed


class _Reader:
    """Reads the planes of a code for `count` elements. Raises ValueError for an invalid one."""

    def __init__(self, data: bytes, kind: int, count: int) -> None:
        self.data, self.at = memoryview(data), _COUNTS.size
        self.count = count
        found, self.many, self.whole = _COUNTS.unpack_from(self.data)
        if found != kind or not self.whole <= self.many <= count:
            raise ValueError(f"invalid counts: kind {found}, {self.many} positions, {self.whole} whole values")

    def plane(self, most: int) -> np.ndarray:
        """Read the next plane, of at most `most` bytes."""
        packed, size = _PLANE.unpack_from(self.data, self.at)
        self.at += _PLANE.size
        if size > most or packed > len(self.data) - self.at:
            raise ValueError(f"a plane of {size} bytes, compressed to {packed}, does not fit")
        if not packed:
            return np.zeros(size, np.uint8)
        inflater = _zstd().ZstdDecompressor()
        plane = inflater.decompress(self.data[self.at : self.at + packed], size)
        if len(plane) != size or not inflater.eof or inflater.unused_data:
            raise ValueError(f"a plane does not inflate to {size} bytes")
        self.at += packed
        return np.frombuffer(bytearray(plane), np.uint8)

    def positions(self) -> np.ndarray:
        """Read the positions: increasing, and below the number of elements."""
        gaps = _joined([self.plane(self.many) for _ in range(4)])
        found: np.ndarray = np.cumsum(gaps, dtype=np.int64) - 1
        if len(gaps) != self.many or not bool((gaps > 0).all()) or (self.many and int(found[-1]) >= self.count):
            raise ValueError(f"positions out of range of {self.count} elements")
        return found

    def end(self, fits: bool) -> None:
        """Check that the planes fit together, and that no bytes are left."""
        if not fits or self.at != len(self.data):
            raise ValueError(f"planes of wrong sizes, or {len(self.data) - self.at} bytes too many")


def _bits(values: torch.Tensor) -> np.ndarray:
    return integers(values.contiguous()).numpy().view(f"<u{values.element_size()}")


def _zigzag(steps: torch.Tensor) -> np.ndarray:
    """Map signed integers to unsigned ones by magnitude: 0, −1, 1, −2 …"""
    return _bits((steps << 1) ^ (steps >> 8 * steps.element_size() - 1))


def _unzigzag(values: np.ndarray) -> np.ndarray:
    one = values.dtype.type(1)
    signed: np.ndarray = ((values >> one) ^ -(values & one)).view(f"<i{values.itemsize}")
    return signed


def _planes(values: np.ndarray) -> list[bytes]:
    """Split values into planes: the lowest byte of each, then the next …"""
    return [plane.tobytes() for plane in values.view(np.uint8).reshape(-1, values.itemsize).T]


def _joined(planes: list[np.ndarray]) -> np.ndarray:
    if len({len(plane) for plane in planes}) > 1:
        raise ValueError("planes have different lengths")
    return np.ascontiguousarray(np.stack(planes, axis=1)).view(f"<u{len(planes)}").reshape(-1)
