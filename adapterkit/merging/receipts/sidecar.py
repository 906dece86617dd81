"""The binary file that a receipt keeps beside each shard: a safetensors file of bytes, written as they come.

It holds the header of the base's shard, and by tensor and rows what restores them. How many entries there will be is
known beforehand, so room for the header is left at the start.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from adapterkit.errors import FormatError
from adapterkit.files import system
from adapterkit.files.jsonfile import MAX_HEADER_BYTES
from adapterkit.files.safetensors import DTYPE_BITS, Header, TensorInfo, encode_header, parse_header
from adapterkit.merging.plan.edits import Recorded
from adapterkit.merging.plan.types import FilePlan

HEADER = "header"
GAINS, NUMBERS = ".gains", ".numbers"  # beside an entry
LARGEST = 2**63 - 1  # no size and no offset in a file has more digits
MOST = 100  # times its size that a header is inflated to, which a stranger's sidecar would else fill memory with
_Entry = tuple[str, str, tuple[int, ...]]


def kept(number: int) -> str:
    """What the base's tensor of that number is called that the output has not."""
    return f"kept:{number}"


def entry(number: int, first: int, last: int) -> str:
    """What rows `first:last` of the shard's tensor of that number are called."""
    return f"{number}:{first}-{last}"


def not_in_output(base: Header, plan: FilePlan) -> dict[int, TensorInfo]:
    """By number the tensors of the base's file that have no place in the output: the parts of quantized weights."""
    there = set(plan.tensors)
    return {number: info for number, info in enumerate(base.tensors.values()) if info.name not in there}


class SidecarWriter:
    """A sidecar on its way to the disk; entries come from any thread."""

    def __init__(self, file: Path, header: bytes, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Create `file`, to hold the header of the base's shard, and at most all that is `expected`.

        That is the shape of every entry, or where it is not known yet the largest of as many dimensions. Raises
        FormatError where the header would become too large to be read.
        """
        self.room = room_for({HEADER: (LARGEST,), **expected})
        if self.room > MAX_HEADER_BYTES:
            raise FormatError(
                f"{file.name}: {len(expected):,} entries are too many for one file of a receipt; merge with "
                "`receipt=False`, or into a base in more files"
            )
        self._fd = os.open(file, system.NEW_FLAGS, 0o666)
        self._entries: list[_Entry] = []
        self._size = self.room
        self._lock = threading.Lock()
        self.add(HEADER, _deflate(header))

    def add(self, name: str, data: bytes, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> None:
        """Append one entry."""
        self.add_all([(name, dtype, (len(data),) if shape is None else shape)], data)

    def add_all(self, entries: Sequence[_Entry], data: bytes) -> None:
        """Append entries whose bytes, one after the other, are `data`."""
        with self._lock:
            at, self._size = self._size, self._size + len(data)
            self._entries += entries
        system.write_at(self._fd, data, at)

    def finish(self) -> int:
        """Write the header, wait for the disk, and return the size of the file."""
        raw, _ = encode_header(self._entries, {})
        text = raw[8:].ljust(self.room - 8)
        system.write_at(self._fd, len(text).to_bytes(8, "little") + text, 0)
        system.flush(self._fd)
        return self._size

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def room_for(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The bytes that the header of tensors of these shapes takes at most, whatever their dtypes and offsets."""
    longest = max(DTYPE_BITS, key=len)
    entries = {
        name: {"dtype": longest, "shape": shape, "data_offsets": [LARGEST, LARGEST]} for name, shape in shapes.items()
    }
    size = 8 + len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return size + -size % 8


def _deflate(header: bytes) -> bytes:
    """A header in what inflates to `MOST` times as much; real ones do to some ten times, one that is padded to more."""
    packed = zlib.compress(header)
    return packed if len(header) <= MOST * len(packed) else zlib.compress(header, 0)


def base_header(sidecar: Header, file: Path, size: int) -> tuple[bytes, Header]:
    """The header of the base's shard, as bytes and checked, as if it stood in `file` of `size` bytes."""
    info = sidecar.tensors.get(HEADER)
    if info is None:
        raise FormatError(f"{sidecar.file}: holds no header of the base's shard")
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(bytes(info.read_bytes()), min(MAX_HEADER_BYTES + 8, MOST * info.nbytes))
    except zlib.error as error:
        raise FormatError(f"{sidecar.file}: the header of the base's shard is broken: {error}") from error
    if not inflater.eof or len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise FormatError(f"{sidecar.file}: the header of the base's shard is broken")
    return raw, parse_header(file, raw[8:], size)


def recorded(sidecar: Header) -> dict[int, list[Recorded]]:
    """By number of the tensor what restores its rows, in their order."""
    found: dict[int, list[Recorded]] = {}
    tensors = sidecar.tensors
    for name, info in tensors.items():
        if name == HEADER or name.startswith("kept:") or name.endswith((GAINS, NUMBERS)):
            continue
        number, _, rows = name.partition(":")
        first, _, last = rows.partition("-")
        if not all(part.isdecimal() and len(part) < 16 for part in (number, first, last)):
            raise FormatError(f"{sidecar.file}: {name!r} is not the name of an entry")
        block = Recorded(int(first), int(last), info, tensors.get(name + GAINS), tensors.get(name + NUMBERS))
        found.setdefault(int(number), []).append(block)
    for blocks in found.values():
        blocks.sort(key=lambda block: block.first)
    return found
