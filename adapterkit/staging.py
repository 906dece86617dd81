"""All or nothing on disk: an output is made beside its place, flushed, and renamed into it at the end.

A crash leaves a hidden `.NAME.partial` that loads as nothing; the next run with the same output removes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapterkit.errors import AdapterkitError, NoSpaceError, OutputExistsError, UsageError

# In every directory that adapterkit makes, one of them; only such a directory may be replaced by --overwrite.
RECORD = "adapterkit_merge.json"
ADAPTER_RECORD = "adapterkit_adapter.json"
RECEIPT = "adapterkit_receipt.json"
TRAINING_RECORD = "adapterkit_training.json"


def check_output(out: Path, overwrite: bool) -> None:
    """Raise OutputExistsError unless `out` may be written: absent, empty, or ours and `overwrite` given."""
    if out.name in ("", ".."):
        raise UsageError(f"{out}: name a new directory or file to write")
    if out.is_symlink() or (out.exists() and not out.is_dir() and not out.is_file()):
        raise OutputExistsError(f"{out}: is a link or a special file; choose another output")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(f"{out}: exists already. Choose another -o, or replace it with --overwrite.")
    if out.is_dir() and not any((out / name).is_file() for name in (RECORD, ADAPTER_RECORD, RECEIPT, TRAINING_RECORD)):
        raise OutputExistsError(
            f"{out}: was not made by adapterkit, so --overwrite will not delete it. Remove it first."
        )


@contextmanager
def staged(out: Path, *, directory: bool, keep: bool = False) -> Iterator[Path]:
    """Yield an empty directory or file to build `out` in; it takes `out`'s place on success only.

    With `keep` a directory has in it what was left there, and stays on failure.
    """
    partial, done = partial_of(out), False
    with errors_of(out), _parents(out), _claimed(partial, directory, keep):
        try:
            _restore(out)
            check_output(out, overwrite=True)  # whatever came between plan and run, only what is ours is replaced
            before = _identity(out)
            yield partial
            if _identity(out) != before:
                raise OutputExistsError(f"{out}: appeared while it was being made; choose another -o")
            flush(partial)
            _replace(out, partial)
            done = True
            flush(out.parent)
        finally:
            if done or not keep:
                remove(partial)


def partial_of(out: Path) -> Path:
    """Where `out` is until it is done."""
    return out.parent / f".{out.name}.partial"


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
def _parents(out: Path) -> Iterator[None]:
    """Make the directories above `out`; on failure those that were made go again."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _claimed(partial: Path, directory: bool, keep: bool) -> Iterator[None]:
    """Hold a lock on `partial`; what a dead process left in it is removed unless to `keep`, a live one's respected."""
    if partial.is_symlink() or (partial.exists() and partial.is_dir() != directory):
        remove(partial)
    if directory:
        partial.mkdir(exist_ok=True)
    else:
        partial.touch()
    fd = os.open(partial, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory and not keep:
            for left in partial.iterdir():
                remove(left)
        yield
    except BlockingIOError as error:
        raise OutputExistsError(f"{partial}: another adapterkit is writing there right now") from error
    finally:
        os.close(fd)


def _replace(out: Path, partial: Path) -> None:
    if not out.is_dir():
        partial.replace(out)
        return
    old = _kept_aside(out)  # a directory cannot be renamed over a full one
    remove(old)
    try:
        out.rename(old)
        partial.rename(out)
    except BaseException:
        _restore(out)
        raise
    remove(old)


def _restore(out: Path) -> None:
    """Put the old output back where a run ended between the two renames of `_replace`."""
    if not out.exists() and _kept_aside(out).exists():
        _kept_aside(out).rename(out)


def _kept_aside(out: Path) -> Path:
    return out.parent / f".{out.name}.replaced"


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file or directory `path` is at the moment, or None."""
    try:
        stats = path.lstat()
    except FileNotFoundError:
        return None
    return stats.st_dev, stats.st_ino


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def discard(out: Path) -> None:
    """Remove an intermediate result, and what lies beside it."""
    for path in (out, out.with_name(f"{out.name}.receipt")):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
