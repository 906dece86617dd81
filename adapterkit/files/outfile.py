"""Write one output file: reserve its space, write large spans by direct I/O, the header last.

Direct I/O saves a copy of every byte and the kernel's page handling, and writes at once instead of at the final flush.
On Linux it needs offset, length and memory address in whole pages; the ends of a span, which share a page with their
neighbours, go through the page cache.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.files import os_calls
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import PAGE

if TYPE_CHECKING:
    from mmap import mmap


class PageBuffer:
    """A reusable page-aligned buffer that grows to the largest span requested."""

    def __init__(self) -> None:
        self._memory = self._map(PAGE)

    def view(self, size: int, at: int) -> memoryview:
        """Return `size` bytes at the page offset of `at`, so that pages of the buffer and the file line up."""
        begin = at % PAGE
        if len(self._memory) < begin + size:
            self._memory = self._map(begin + size + PAGE)
        return memoryview(self._memory)[begin : begin + size]

    def _map(self, size: int) -> mmap:
        return os_calls.page_aligned_memory(size)


class OutputFile:
    """A file of known size, invalid until `finish` writes its header."""

    def __init__(self, path: Path, size: int) -> None:
        """Create `path` and reserve `size` bytes, so that a full disk fails now. Raises OSError."""
        self.path, self._fd, self._direct = path, -1, -1
        fd = os.open(path, os_calls.NEW_FLAGS, 0o666)
        try:
            if size:
                os_calls.reserve(fd, size)
        finally:
            os.close(fd)

    def open(self) -> None:
        """Open the file for writing. Raises OSError."""
        self._fd = os.open(self.path, os_calls.WRITE_FLAGS)
        self._direct = os_calls.open_direct(self.path)

    def write(self, data: memoryview, at: int) -> None:
        """Write `data` at offset `at`, its whole pages by direct I/O where the file system and the buffer allow it."""
        first, last = -at % PAGE, (at + len(data)) // PAGE * PAGE - at
        if self._direct < 0 or last <= first:
            os_calls.write_at(self._fd, data, at)
            os_calls.start_writeback(self._fd, len(data), at)
            return
        os_calls.write_at(self._fd, data[:first], at)
        done = first
        while done < last:
            try:
                done += os.pwrite(self._direct, data[done:last], at + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # misaligned for this file system, for example after a short write
        os_calls.write_at(self._fd, data[done:], at + done)

    def finish(self, header: bytes) -> None:
        """Write the header and flush the file to the disk."""
        os_calls.write_at(self._fd, memoryview(header), 0)
        os_calls.flush(self._fd)

    def fileno(self) -> int:
        """Return the file descriptor, which can also be read from."""
        return self._fd

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


class LinkedFile(OutputFile):
    """A file that shares the bytes of another, by a reflink, or by a hard link where reflinks aren't supported."""

    def __init__(self, path: Path, source: Path) -> None:
        """Link `path` to the contents of `source`. Raises OSError if neither kind of link is possible."""
        self.path, self._fd, self._direct = path, -1, -1
        with open_regular(source) as stream:
            if not os_calls.clone(stream.fileno(), path):
                os.link(source.resolve(), path)

    def open(self) -> None:
        """Do nothing: the file is complete."""

    def write(self, data: memoryview, at: int) -> None:
        """Do nothing: the file is complete."""

    def finish(self, header: bytes) -> None:
        """Do nothing: the file is complete."""
