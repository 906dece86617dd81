"""All-or-nothing outputs: written in a workspace beside their destination, flushed, and renamed into place at the end.

Whenever a run stops, the destination holds the old output or the new one, with its receipt. Only where the kernel
cannot exchange directories is there a moment with neither; the next run for this output then restores the old one from
the workspace.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import AdapterkitError, FormatError, NoSpaceError, OutputExistsError, UsageError
from adapterkit.files import os_calls
from adapterkit.files.overlap import Inode, check_disjoint
from adapterkit.files.safetensors import read_header
from adapterkit.files.workspace import (
    PREFIX,
    Mark,
    Workspace,
    other_workspaces,
    receipt_of,
    remove_unmarked,
    workspaces_of,
)

# Every directory that adapterkit writes has one of these; only such a directory may be overwritten.
MERGE_RECORD = "adapterkit_merge.json"
ADAPTER_RECORD = "adapterkit_adapter.json"
RECEIPT = "adapterkit_receipt.json"
RECEIPT_FOLDER = "adapterkit_receipt"  # the receipt's sidecars
BEFORE = f"{RECEIPT_FOLDER}/before"  # the base's small files that the merge replaced
TRAINING_RECORD = "adapterkit_training.json"
MADE_BY = "adapterkit"  # a metadata key of every .safetensors file that is an output by itself
MAX_NAME_BYTES = 255  # of a file name, on Linux


def is_made_by_us(path: Path) -> bool:
    """Return whether a directory has one of our records, or a .safetensors file our metadata key."""
    if path.is_dir():
        return any((path / name).is_file() for name in (MERGE_RECORD, ADAPTER_RECORD, RECEIPT, TRAINING_RECORD))
    try:
        return MADE_BY in read_header(path).metadata
    except FormatError:
        return False


@dataclass(frozen=True)
class Destination:
    """The place of an output, and the rules for replacing an existing one.

    Args:
        inputs: Files and directories that the output is made from, and must not overlap.
        overwrite: Replace an existing output; None if the command has no such option.
        beside: A single file gets a receipt beside it.
        is_ours: Whether adapterkit wrote the existing output, so that it may be replaced.
    """

    out: Path
    inputs: tuple[Path, ...] = ()
    directory: bool = True
    overwrite: bool | None = None
    beside: bool = False
    is_ours: Callable[[Path], bool] = is_made_by_us

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths to write: the receipt's, if any, then the output's."""
        return (self.out,) if self.directory or self._has_long_name else (receipt_of(self.out), self.out)

    @property
    def _has_long_name(self) -> bool:
        """Whether the name is too long to append the receipt's suffix."""
        return len(os.fsencode(receipt_of(self.out).name)) > MAX_NAME_BYTES

    def check(self) -> None:
        """Check that the output can be written.

        Raises:
            OutputExistsError: Something exists there, and may not be overwritten.
            UsageError: The output would be an input, be inside one, or contain one.
        """
        left = self.check_disjoint()
        if os.path.ismount(self.out):
            raise OutputExistsError(f"{self.out}: is a mount point and can't be replaced; name a folder inside it")
        for path in self.paths:
            if path == self.out or not any(work.misplaced_receipt for work in left):
                self._check_free(path)
        if self.beside and self._has_long_name:
            raise UsageError(f"{self.out}: the name is too long to add a receipt, {receipt_of(self.out).name}")

    def check_disjoint(self) -> list[Workspace]:
        """Raise UsageError if an input would be written, renamed or removed; returns the workspaces of other runs."""
        if self.out.name in ("", ".."):
            raise UsageError(f"{self.out}: name a new directory or file to write")
        left = workspaces_of(self.out)
        check_disjoint(self.inputs, (*reversed(self.paths), *(work.path for work in left)))
        return left

    def _check_free(self, path: Path) -> None:
        directory = self.directory or path != self.out
        if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
            raise OutputExistsError(f"{path}: is a link or a special file", hint="choose another `out`")
        if not path.exists() or (directory and path.is_dir() and not any(path.iterdir())):
            return
        if not self.overwrite:
            instead = "" if self.overwrite is None else ", or replace it with `overwrite=True`"
            raise OutputExistsError(f"{path}: already exists", hint=f"choose another `out`{instead}")
        if path.is_dir() is not directory:
            found, expected = ("directory", "file") if path.is_dir() else ("file", "directory")
            raise OutputExistsError(
                f"{path}: is a {found}, but the output is a {expected}", hint="choose another `out`, or remove it"
            )
        if not (self.is_ours if path == self.out else is_made_by_us)(path):
            raise OutputExistsError(
                f"{path}: was not made by adapterkit, so `overwrite=True` will not delete it", hint="remove it first"
            )


@contextmanager
def staged(
    destination: Destination,
    *,
    job: str | None = None,
    resume: bool = False,
    precious: bool = False,
    resume_hint: Callable[[Path], str] = lambda _: "",
) -> Iterator[Path]:
    """Yield a new directory, or the path of a new file, which becomes the output on success only.

    A folder `receipt` made beside it is moved along. On an interrupt or a full disk, the outcome is added to the
    exception as a note.

    Args:
        job: The name of the job, which can resume its own unfinished work only.
        resume: Continue with the work that an ended run of the same job left; that of other runs is removed.
        precious: Only a run of the same job may remove this run's work.
        resume_hint: On failure, returns how to resume from the work so far; if it returns "", the work is removed.
    """
    work: Workspace | None = None
    with _parents(destination.out):
        try:
            with map_os_errors(destination.out):
                with defer_signals():
                    work = _claim(destination, Mark(destination.out.name, job, destination.beside, precious), resume)
                    if destination.directory:
                        work.new.mkdir(exist_ok=True)
                before = [_identity(path) for path in destination.paths]
                yield work.new
                with defer_signals():
                    _commit(work, destination, before)
                    work.remove_or_warn()
        except BaseException as error:
            with defer_signals():
                outcome = _clean_up(work, destination, resume_hint)
                if isinstance(error, KeyboardInterrupt | NoSpaceError):
                    error.add_note(outcome)
            raise


def unfinished_work(out: Path, job: str) -> Path | None:
    """Return the unfinished output `out` that an ended run of `job` left, if any."""
    return next((work.new for work in workspaces_of(out) if work.mark.job == job and work.resumable), None)


def workspace_receipts(out: Path) -> list[Path]:
    """Return the receipts of the file `out` that are still in the workspace of a run that is replacing it, or died."""
    folders = [path for work in workspaces_of(out) for path in (work.receipt, work.old_receipt)]
    return [path for path in folders if (path / RECEIPT).is_file()]


@contextmanager
def map_os_errors(out: Path) -> Iterator[None]:
    """Turn an OSError while `out` is written into NoSpaceError or AdapterkitError."""
    try:
        yield
    except AdapterkitError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(f"{out}: the disk is full ({error.strerror}); free some space") from error
        where = error.filename if error.filename and PREFIX not in str(error.filename) else out
        raise AdapterkitError(f"{where}: {error.strerror or error}") from error


@contextmanager
def defer_signals() -> Iterator[None]:
    """Defer the handlers of terminating signals to the end of the block; only in the main thread, which runs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in os_calls.END_SIGNALS if callable(handler := signal.getsignal(number))}
    arrived: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda which, _: arrived.append(which))
        yield
    finally:
        for number, handler in handlers.items():  # SIGINT last, so that it is deferred until then
            signal.signal(number, handler)
        for which in arrived:
            signal.raise_signal(which)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the directories above `out`; on failure, remove those that were made."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with map_os_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _claim(destination: Destination, mark: Mark, resume: bool) -> Workspace:
    """Recover from ended runs, then return a new or resumed workspace for the output."""
    destination.check_disjoint()
    remove_unmarked(destination.out.parent)
    found = list(other_workspaces(destination.out))
    try:
        if any(work.alive for work in found):
            raise OutputExistsError(f"{destination.out}: another adapterkit process is writing to it")
        for work in found:
            work.undo(destination.out)
        destination.check()  # again: something may have appeared since the plan was made
        taken = next((work for work in found if resume and mark.job and work.mark == mark and work.resumable), None)
        for work in found:
            if work is not taken and (not work.mark.precious or work.mark.job == mark.job):
                work.remove_or_warn()
        if taken is None:
            taken = Workspace.create(destination.out.parent, mark)
        else:
            found.remove(taken)
        return taken
    finally:
        for work in found:
            work.close()


def _commit(work: Workspace, destination: Destination, before: list[Inode | None]) -> None:
    """Move the work into place: the receipt first, then the output itself, in one step."""
    out = destination.out
    _flush_all(work.path)
    for path, inode in zip(destination.paths, before, strict=True):
        if _identity(path) != inode:
            raise OutputExistsError(f"{path}: appeared during the run", hint="choose another `out`")
    for beside in destination.paths[:-1]:
        _put_receipt(work, beside)
    if before[-1] is None:
        os_calls.rename_new(work.new, out)
    elif not destination.directory:
        work.new.replace(out)
    elif not os_calls.exchange(work.new, out):
        out.rename(work.old)
        os_calls.rename_new(work.new, out)
    work.done = True
    os_calls.flush_path(out.parent)


def _put_receipt(work: Workspace, beside: Path) -> None:
    """Move the old receipt to `old_receipt`, whose presence marks the swap as begun, and the new one into place."""
    old, new = os.path.lexists(beside), os.path.lexists(work.receipt)
    if old:
        beside.rename(work.old_receipt)
    elif new:
        work.old_receipt.mkdir()
    if new:
        os_calls.rename_new(work.receipt, beside)
    if old or new:
        os_calls.flush_path(work.path)
        os_calls.flush_path(beside.parent)


def _clean_up(work: Workspace | None, destination: Destination, resume_hint: Callable[[Path], str]) -> str:
    """Clean up after a failure, and return the outcome in words."""
    if work is None:
        return "nothing was written"
    try:
        if not work.done:
            work.undo(destination.out)
            if hint := resume_hint(work.new) if work.new.exists() else "":
                return hint
        if work.path.exists():
            work.remove()
        return f"{destination.out} is complete" if work.done else "nothing was written"
    except (OSError, OutputExistsError) as error:
        return work.warn_left_behind(error)
    finally:
        work.close()


def _identity(path: Path) -> Inode | None:
    """Return the device and inode of `path`, or None if it doesn't exist."""
    try:
        stats = path.lstat()
    except FileNotFoundError:
        return None
    return stats.st_dev, stats.st_ino


def _flush_all(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            os_calls.flush_path(Path(folder) / name)
        os_calls.flush_path(Path(folder))
