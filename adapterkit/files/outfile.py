"""One output file while it is written: its space reserved, large spans straight to the disk, the header last.

Writing past the page cache spares a copy of every byte and the kernel's work on its pages, and starts the
disk at once instead of at the final flush. Linux wants offset, length and memory address in whole pages for that; the
ends of a span, which share a page with their neighbours, go through the page cache.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.files import system
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import PAGE

if TYPE_CHECKING:
    from mmap import mmap


class PageBuffer:
    """Memory that starts on a page and grows to the largest span asked of it."""

    def __init__(self) -> None:
        self._memory = self._map(PAGE)

    def view(self, size: int, at: int) -> memoryview:
        """`size` bytes as far into a page as `at` is in the file, so that whole pages of the two coincide."""
        begin = at % PAGE
        if len(self._memory) < begin + size:
            self._memory = self._map(begin + size + PAGE)
        return memoryview(self._memory)[begin : begin + size]

    def _map(self, size: int) -> mmap:
        return system.private_memory(size)


class OutputFile:
    """A file of known size that loads as nothing until `finish` has written its header."""

    def __init__(self, path: Path, size: int) -> None:
        """Create `path` and reserve `size` bytes, so that a full disk shows itself now. Raises OSError."""
        self.path, self._fd, self._direct = path, -1, -1
        fd = os.open(path, system.NEW, 0o666)
        try:
            if size:
                system.reserve(fd, size)
        finally:
            os.close(fd)

    def open(self) -> None:
        """Open the file to be written, until `close`. Raises OSError."""
        self._fd = os.open(self.path, system.WRITE)
        self._direct = system.open_direct(self.path)

    def write(self, data: memoryview, at: int) -> None:
        """Write `data` at `at`; its whole pages past the page cache where file system and buffer allow it."""
        first, last = -at % PAGE, (at + len(data)) // PAGE * PAGE - at
        if self._direct < 0 or last <= first:
            system.write_at(self._fd, data, at)
            system.start_disk(self._fd, len(data), at)
            return
        system.write_at(self._fd, data[:first], at)
        done = first
        while done < last:
            try:
                done += os.pwrite(self._direct, data[done:last], at + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # not aligned as this file system wants it, as after a short write
        system.write_at(self._fd, data[done:], at + done)

    def finish(self, header: bytes) -> None:
        """Write the header, and return when everything is on the disk."""
        system.write_at(self._fd, memoryview(header), 0)
        system.flush(self._fd)

    def fileno(self) -> int:
        """The open file, to read what was written."""
        return self._fd

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1


class LinkedFile(OutputFile):
    """A file that shares the bytes of another: by a reflink, or where the file system has none by a hard link."""

    def __init__(self, path: Path, source: Path) -> None:
        """Make `path` the same file as `source`. Raises OSError where it can be neither."""
        self.path, self._fd, self._direct = path, -1, -1
        with open_regular(source) as stream:
            if not system.clone(stream.fileno(), path):
                os.link(source.resolve(), path)

    def open(self) -> None:
        """Nothing: it is there."""

    def write(self, data: memoryview, at: int) -> None:
        """Nothing: it is there."""

    def finish(self, header: bytes) -> None:
        """Nothing: it is there."""
