"""Open strangers' files: regular ones only, whole ones up to a size, and from inside a folder without leaving it.

A stranger's folder can hold named pipes, which block whoever opens them, devices, which never end, and links to files
that were never meant to be copied, such as the environment of this process.
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

from adapterkit.errors import FormatError, UnsafeFileError
from adapterkit.files import system

PIECE = 1 << 20  # bytes read at a time
MOST_NESTED = 100  # folders
FILE_KINDS = {
    stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link",
}  # fmt: skip


def open_regular(file: Path) -> BufferedReader:
    """Open a file, or where a link leads; raises FormatError for anything but a regular file that can be read."""
    return os.fdopen(descriptor_of(file), "rb")


def descriptor_of(file: Path) -> int:
    """The same as a descriptor, which is the caller's to close."""
    with _errors_of(file):
        return _open(file)


def open_inside(folder: Path, name: str | PurePath) -> BufferedReader:
    """Open the regular file `name` of `folder`, where no link is followed but of the Hub cache, to its own blobs.

    Raises UnsafeFileError for other links, FormatError for what is not a regular file or cannot be read.
    """
    *inner, last = PurePath(name).parts
    with _errors_of(folder / name):
        with _folder(folder, inner) as (path, at):
            if not stat.S_ISLNK(os.stat(path / last, dir_fd=at, follow_symlinks=False).st_mode):
                return os.fdopen(_open(path / last, at, links=False), "rb")
        if (blob := blob_of(folder / name)) is None:
            raise UnsafeFileError(f"{folder / name}: is a link, which could lead to any file; replace it with the file")
        with _folder(blob.parent.parent, [blob.parent.name]) as (path, at):
            return os.fdopen(_open(path / blob.name, at, links=False), "rb")


def read_whole(file: Path, limit: int) -> bytes:
    """All bytes of a regular file; raises FormatError where there are more than `limit`."""
    with open_regular(file) as stream:
        return read_up_to(stream, limit, file)


def read_up_to(stream: BufferedReader, limit: int, file: Path) -> bytes:
    """All bytes of `stream`, which reads `file`; raises FormatError where there are more than `limit`."""
    data = bytearray()
    with _errors_of(file):
        while len(data) <= limit and (more := stream.read(PIECE)):
            data += more  # asked for all at once, Python would take as much memory beforehand
    if len(data) > limit:
        raise FormatError(f"{file}: is larger than {limit:,} bytes, the most that is read")
    return bytes(data)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a regular file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file below `folder`, relative to it and sorted, and what it is where `open_inside` would refuse it.

    A link to a directory counts as a file; what is hidden is left out. Raises FormatError for what cannot be listed,
    and for folders that are nested more than `MOST_NESTED` deep, which functions that call themselves cannot copy.
    """
    pending = [folder]
    while pending:  # not os.walk, which calls itself, and is silent about what it cannot list
        at = pending.pop()
        if len(at.parts) - len(folder.parts) > MOST_NESTED:
            raise FormatError(f"{at}: lies in folders nested more than {MOST_NESTED} deep; move it up")
        with _errors_of(at):
            inner = []
            for entry in sorted(os.scandir(at), key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inner.append(at / entry.name)
                else:
                    yield (at / entry.name).relative_to(folder), kind_of(at / entry.name)
        pending += reversed(inner)


def kind_of(file: Path) -> str | None:
    """What `file` is where `open_inside` would refuse it for that."""
    mode = os.lstat(file).st_mode
    return None if stat.S_ISREG(mode) or blob_of(file) is not None else _kind(mode)


def blob_of(file: Path) -> Path | None:
    """Where a link of a snapshot in the Hub cache leads, if that is a blob of its own repository; else None.

    The cache has `models--OWNER--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`.
    """
    if not file.is_symlink():
        return None
    home = Path(os.path.realpath(file.parent))
    repo = next((at.parent for at in home.parents if at.name == "snapshots"), home)
    target = Path(os.path.normpath(home / os.readlink(file)))
    return target if repo.name.startswith("models--") and target.parent == repo / "blobs" else None


@contextmanager
def _folder(folder: Path, inner: Sequence[str]) -> Iterator[tuple[Path, int | None]]:
    """Go down from `folder` through `inner`, where no link is followed; yields what paths in it begin with, and the
    open folder that they are relative to.

    Where nothing can be opened relative to a folder, links are refused only if they are there beforehand.
    """
    if not system.HAS_DIR_FD:
        for part in inner:
            folder /= part
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        yield folder, None
        return
    at = os.open(folder, system.FOLDER)
    try:
        for part in inner:
            above, at = at, os.open(part, system.FOLDER | system.NO_LINK, dir_fd=at)
            os.close(above)
        yield Path(), at
    finally:
        os.close(at)


def _open(name: str | os.PathLike[str], at: int | None = None, links: bool = True) -> int:
    """Open a regular file, checked both before, since opening a device can do things, and after.

    `name` may be of the open folder `at`, and a link only with `links`.
    """
    _check(os.stat(name, dir_fd=at, follow_symlinks=links).st_mode)
    fd = os.open(name, system.READ | (0 if links else system.NO_LINK), dir_fd=at)  # waits for no pipe's writer
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
    return FILE_KINDS.get(stat.S_IFMT(mode), "no regular file")


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FormatError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
