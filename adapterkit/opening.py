"""Open strangers' files: regular files only, since others may block or never end, and whole ones up to a size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path

from adapterkit.errors import FormatError


def open_regular(file: Path) -> BufferedReader:
    """Open a file, or where a link leads; raises FormatError for anything but a regular file that can be read."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a FIFO would wait for a writer
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FormatError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    found = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "a FIFO or device, expected a regular file"
    raise FormatError(f"{file}: cannot be read: {found}")


def read_whole(file: Path, limit: int) -> bytes:
    """All bytes of a regular file; raises FormatError where there are more than `limit`."""
    with open_regular(file) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise FormatError(f"{file}: is larger than {limit:,} bytes, the most that is read")
    return data


def sha256_of(file: Path) -> str:
    """The SHA-256 of a regular file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
