"""The sidecar of a shard: a safetensors file with everything that restores the base's file.

It holds the header of the base's shard, the tensors that the output lacks, and residuals by tensor and rows. Its
entries are known beforehand, so space for its own header is reserved at the start. The data follows in the plan's
order, so that equal merges write equal bytes, whichever thread is first.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from adapterkit.errors import FormatError
from adapterkit.files import os_calls
from adapterkit.files.jsonfile import MAX_HEADER_BYTES
from adapterkit.files.safetensors import DTYPE_BITS, Header, encode_header, parse_header
from adapterkit.merging.plan.edits import Recorded

HEADER = "header"
DROPPED = "kept:"  # prefix of a base tensor that the output lacks, or of its last rows
GAINS, NUMBERS = ".gains", ".numbers"  # suffixes of an entry's further tensors
MAX_OFFSET = 2**63 - 1  # no size or offset in a file has more digits
MAX_INFLATION = 100  # of a compressed header: a stranger's sidecar must not fill memory
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def dropped_name(number: int) -> str:
    """The entry of the base's tensor `number`, which the output lacks or shortens."""
    return f"{DROPPED}{number}"


def entry_name(number: int, first: int, last: int) -> str:
    """The entry that restores rows `first:last` of the shard's changed tensor `number`."""
    return f"{number}:{first}-{last}"


class SidecarWriter:
    """Writes a sidecar. Pieces come from any thread in any order, and are written in the order that is expected."""

    def __init__(self, file: Path, header: bytes, expected: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Create `file` with the compressed `header` of the base's shard.

        `expected` has the possible entries of every piece, each with its largest shape; the first one of a piece is
        always written. Raises FormatError if the sidecar's own header could become too large to read.
        """
        entries = {HEADER: (MAX_OFFSET,)} | {name: shape for piece in expected for name, shape in piece.items()}
        self.room = room_for(entries)
        if self.room > MAX_HEADER_BYTES:
            raise FormatError(
                f"{file.name}: {len(entries):,} entries are too many for one sidecar",
                hint="use `receipt=False`, or a base in more files",
            )
        self._turns = {name: turn for turn, name in enumerate([HEADER, *(next(iter(piece)) for piece in expected)])}
        self._turn = 0
        self._early: dict[int, tuple[Sequence[Entry], bytes]] = {}  # by turn, until all earlier ones are written
        self._entries: list[Entry] = []
        self._size = self.room
        self._lock = threading.Lock()
        self._fd = os.open(file, os_calls.NEW_FLAGS, 0o666)
        packed = _deflate(header)
        self.add([(HEADER, "U8", (len(packed),))], packed)

    def add(self, entries: Sequence[Entry], data: bytes) -> None:
        """Add the entries of one piece, whose bytes are `data`."""
        with self._lock:
            self._early[self._turns[entries[0][0]]] = entries, data
            due = list(self._due())
        for at, part in due:
            os_calls.write_at(self._fd, part, at)

    def _due(self) -> Iterator[tuple[int, bytes]]:
        """Offset and bytes of the pieces whose turn it is."""
        while self._turn in self._early:
            entries, data = self._early.pop(self._turn)
            self._turn += 1
            self._entries += entries
            at, self._size = self._size, self._size + len(data)
            yield at, data

    def finish(self) -> int:
        """Write the header, flush the file to disk, and return its size."""
        assert not self._early
        raw, _ = encode_header(self._entries, {})
        text = raw[8:].ljust(self.room - 8)
        os_calls.write_at(self._fd, len(text).to_bytes(8, "little") + text, 0)
        os_calls.flush(self._fd)
        return self._size

    def close(self) -> None:
        """Close the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def room_for(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest size of a header of tensors with these shapes, for any dtypes and offsets."""
    longest = max(DTYPE_BITS, key=len)
    entries = {
        name: {"dtype": longest, "shape": shape, "data_offsets": [MAX_OFFSET, MAX_OFFSET]}
        for name, shape in shapes.items()
    }
    size = 8 + len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return size + -size % 8


def _deflate(header: bytes) -> bytes:
    """Compress a header, unless it would inflate by more than `MAX_INFLATION`, as one with much padding does."""
    packed = zlib.compress(header)
    return packed if len(header) <= MAX_INFLATION * len(packed) else zlib.compress(header, 0)


def base_header(sidecar: Header, file: Path, size: int) -> tuple[bytes, Header]:
    """Read the header of the base's shard, as bytes and parsed as that of a `file` of `size` bytes."""
    info = sidecar.tensors.get(HEADER)
    if info is None:
        raise FormatError(f"{sidecar.file}: no header of the base's shard")
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(bytes(info.read_bytes()), min(MAX_HEADER_BYTES + 8, MAX_INFLATION * info.nbytes))
    except zlib.error as error:
        raise FormatError(f"{sidecar.file}: the base's header is corrupt: {error}") from error
    if not inflater.eof or len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise FormatError(f"{sidecar.file}: the base's header is corrupt")
    return raw, parse_header(file, raw[8:], size)


def recorded_rows(sidecar: Header) -> dict[int, list[Recorded]]:
    """The records of each changed tensor, by its number, in the order of rows."""
    found: dict[int, list[Recorded]] = {}
    tensors = sidecar.tensors
    for name, info in tensors.items():
        if name == HEADER or name.startswith(DROPPED) or name.endswith((GAINS, NUMBERS)):
            continue
        number, _, rows = name.partition(":")
        first, _, last = rows.partition("-")
        if not all(part.isdecimal() and len(part) < 16 for part in (number, first, last)):
            raise FormatError(f"{sidecar.file}: invalid entry name {name!r}, expected NUMBER:FIRST-LAST")
        block = Recorded(int(first), int(last), info, tensors.get(name + GAINS), tensors.get(name + NUMBERS))
        found.setdefault(int(number), []).append(block)
    for blocks in found.values():
        blocks.sort(key=lambda block: block.first)
    return found
