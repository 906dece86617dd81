"""Open untrusted files: regular files only, up to a size limit, and never outside their folder.

An untrusted folder can hold named pipes, which block the reader, devices, which never end, and links to private files,
such as the environment of this process.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePath
from typing import BinaryIO

from adapterkit.errors import AdapterkitError, FormatError, MissingFileError, UnreadableError, UnsafeFileError
from adapterkit.files import os_calls

CHUNK_BYTES = 1 << 20
MAX_FOLDER_DEPTH = 100
# Errors of the system that have a kind of their own.
ERRORS: dict[type[Exception], type[FormatError]] = {
    FileNotFoundError: MissingFileError,
    PermissionError: UnreadableError,
}
FILE_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link",
}  # fmt: skip


def open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading, following links; raises FormatError if it isn't one or can't be read."""
    return os.fdopen(open_descriptor(file), "rb")


def open_descriptor(file: Path) -> int:
    """Open a regular file as `open_regular` does; returns a file descriptor, which the caller closes."""
    with _map_errors(file):
        return _open(file)


def open_inside(folder: Path, name: str | PurePath) -> BufferedReader:
    """Open the regular file `name` in `folder`; the only links followed are those of the Hub cache to its own blobs.

    Raises UnsafeFileError for other links, FormatError if it isn't a regular file or can't be read.
    """
    *inner, last = PurePath(name).parts
    with _map_errors(folder / name):
        with _folder(folder, inner) as (path, at):
            if not stat.S_ISLNK(os.stat(path / last, dir_fd=at, follow_symlinks=False).st_mode):
                return os.fdopen(_open(path / last, at, links=False), "rb")
        if (blob := cache_blob(folder / name)) is None:
            raise UnsafeFileError(f"{folder / name}: is a link and could point to any file; replace it with the file")
        with _folder(blob.parent.parent, [blob.parent.name]) as (path, at):
            return os.fdopen(_open(path / blob.name, at, links=False), "rb")


def read_whole(file: Path, limit: int) -> bytes:
    """Read a whole regular file; raises FormatError if it has more than `limit` bytes."""
    with open_regular(file) as stream:
        return read_up_to(stream, limit, file)


def read_up_to(stream: BinaryIO, limit: int, file: Path) -> bytes:
    """Read the rest of `stream`, which reads `file`; raises FormatError if it has more than `limit` bytes."""
    data = bytearray()
    with _map_errors(file):
        while len(data) <= limit and (more := stream.read(CHUNK_BYTES)):
            data += more  # in chunks, since read(limit) would allocate `limit` bytes first
    if len(data) > limit:
        raise FormatError(f"{file}: is too large, expected at most {limit:,} bytes")
    return bytes(data)


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield every file below `folder`, sorted, as its relative path and its `unsafe_kind`.

    A link to a directory counts as a file; hidden files are skipped. Raises FormatError if a folder can't be listed, or
    is nested more than `MAX_FOLDER_DEPTH` deep, where recursive copies would fail.
    """
    pending = [folder]
    while pending:  # not os.walk, which ignores folders that it cannot list
        at = pending.pop()
        if len(at.parts) - len(folder.parts) > MAX_FOLDER_DEPTH:
            raise FormatError(f"{at}: is nested more than {MAX_FOLDER_DEPTH} folders deep; move it up")
        with _map_errors(at):
            inner = []
            for entry in sorted(os.scandir(at), key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner.append(at / entry.name)
                else:
                    yield (at / entry.name).relative_to(folder), unsafe_kind(at / entry.name)
        pending += reversed(inner)


def unsafe_kind(file: Path) -> str | None:
    """Return the kind of a file that `open_inside` refuses, such as "a named pipe"; None for one that it opens."""
    mode = os.lstat(file).st_mode
    return None if stat.S_ISREG(mode) or cache_blob(file) is not None else _kind(mode)


def cache_blob(file: Path) -> Path | None:
    """Return the blob that a link in the Hub cache points to, or None if it points out of its own repository.

    The cache holds `models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`.
    """
    if not file.is_symlink():
        return None
    home = Path(os.path.realpath(file.parent))
    repo = next((at.parent for at in home.parents if at.name == "snapshots"), home)
    target = Path(os.path.normpath(home / os.readlink(file)))
    return target if repo.name.startswith("models--") and target.parent == repo / "blobs" else None


@contextmanager
def _folder(folder: Path, inner: Sequence[str]) -> Iterator[tuple[Path, int | None]]:
    """Descend from `folder` through `inner` without following links; yields a path prefix and the `dir_fd` for it.

    Without `dir_fd` support the check races with whoever replaces a folder by a link.
    """
    if not os_calls.HAS_DIR_FD:
        for part in inner:
            folder /= part
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield folder, None
        return
    at = os.open(folder, os_calls.FOLDER_FLAGS)
    try:
        for part in inner:
            above, at = at, os.open(part, os_calls.FOLDER_FLAGS | os_calls.NO_FOLLOW, dir_fd=at)
            os.close(above)
        yield Path(), at
    finally:
        os.close(at)


def _open(name: str | os.PathLike[str], at: int | None = None, links: bool = True) -> int:
    """Open a regular file, checked before, because opening a device can have side effects, and again after.

    `name` is relative to the open folder `at` if given; `links` allows it to be a link.
    """
    _check(os.stat(name, dir_fd=at, follow_symlinks=links).st_mode)
    fd = os.open(name, os_calls.READ_FLAGS | (0 if links else os_calls.NO_FOLLOW), dir_fd=at)  # a pipe doesn't block
    try:
        _check(os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(0, f"{_kind(mode)}, expected a regular file")


def _kind(mode: int) -> str:
    return FILE_KINDS.get(stat.S_IFMT(mode), "a special file")


@contextmanager
def _map_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except AdapterkitError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        kind = ERRORS.get(type(error), FormatError)
        raise kind(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
