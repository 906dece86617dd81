"""All or nothing on disk: an output is made beside its place, flushed, and renamed into it at the end.

A crash leaves a hidden `.NAME.partial` that loads as nothing; the next run with the same output removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterkit.errors import AdapterkitError, NoSpaceError, OutputExistsError

# In every directory that adapterkit makes; only such a directory may be replaced by --overwrite.
RECORD = "adapterkit_merge.json"


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputExistsError unless `out` may be written: absent, empty, or ours and `overwrite` given."""
    if out.is_symlink() or (out.exists() and not out.is_dir() and not out.is_file()):
        raise OutputExistsError(f"{out}: is a link or a special file; choose another output")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"{out}: exists already. Choose another -o, or replace it with --overwrite.")
    if out.is_dir() and not (out / RECORD).is_file():
        raise OutputExistsError(
            f"{out}: was not made by adapterkit, so --overwrite will not delete it. Remove it first."
        )


@contextmanager
def staged(out: Path, *, directory: bool) -> Iterator[Path]:
    """Yield an empty directory or file to build `out` in; it takes `out`'s place on success only."""
    partial = out.parent / f".{out.name}.partial"
    with errors_of(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(partial, directory):
            try:
                yield partial
                _replace(out, partial)
                _flush_directory(out.parent)
            finally:
                _remove(partial)


@contextmanager
def errors_of(out: Path) -> Iterator[None]:
    """Turn what the file system says while `out` is written into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                f"{out}: the disk is full ({error.strerror}). Nothing was kept; free some space."
            ) from error
        raise AdapterkitError(f"{error.filename or out}: {error.strerror or error}") from error


@contextmanager
def _claimed(partial: Path, directory: bool) -> Iterator[None]:
    """Hold a lock on `partial`; what a dead process left in it is removed, a live one's is respected."""
    if directory:
        partial.mkdir(exist_ok=True)
    else:
        partial.touch()
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory:
            for left in partial.iterdir():
                _remove(left)
        yield
    except BlockingIOError as error:
        raise OutputExistsError(f"{partial}: another adapterkit is writing there right now") from error
    finally:
        os.close(fd)


def _replace(out: Path, partial: Path) -> None:
    if out.is_dir():  # a directory cannot be renamed over a full one
        old = out.parent / f".{out.name}.replaced"
        _remove(old)
        out.rename(old)
        try:
            partial.rename(out)
        except OSError:
            old.rename(out)
            raise
        _remove(old)
    else:
        partial.replace(out)


def _flush_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
