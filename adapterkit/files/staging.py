"""All or nothing on disk: an output is made in a workspace beside its place, flushed, and renamed into it at the end.

Whenever a run ends, at its place is the old output or the new one, each with its receipt: where a kernel cannot swap
directories, for a moment neither, and both in the workspace, from which the next run with this output restores the old.
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
from adapterkit.files import system
from adapterkit.files.overlap import Inode, check_apart
from adapterkit.files.safetensors import read_header
from adapterkit.files.workspace import PREFIX, Mark, Workspace, left_by_others, receipt_of, remove_unmarked, seen

# In every directory that adapterkit makes, one of them; only such a directory may be replaced by --overwrite.
RECORD = "adapterkit_merge.json"
ADAPTER_RECORD = "adapterkit_adapter.json"
RECEIPT = "adapterkit_receipt.json"
FOLDER = "adapterkit_receipt"  # of what a receipt needs
BEFORE = f"{FOLDER}/before"
TRAINING_RECORD = "adapterkit_training.json"
MADE_BY = "adapterkit"  # in the metadata of every .safetensors file that is an output by itself
MAX_NAME_BYTES = 255  # of a file, on Linux


def is_made_by_us(path: Path) -> bool:
    """Whether a directory has one of our records, or a .safetensors file our name in its metadata."""
    if path.is_dir():
        return any((path / name).is_file() for name in (RECORD, ADAPTER_RECORD, RECEIPT, TRAINING_RECORD))
    try:
        return MADE_BY in read_header(path).metadata
    except FormatError:
        return False


@dataclass(frozen=True)
class Destination:
    """Where an output goes, what it is made from, and what may give way to it.

    `inputs` are paths of files and directories; a file may get a receipt `beside` it; `ours` tells what we made.
    """

    out: Path
    inputs: tuple[Path, ...] = ()
    directory: bool = True
    overwrite: bool | None = None  # None where the command cannot
    beside: bool = False
    ours: Callable[[Path], bool] = is_made_by_us

    @property
    def places(self) -> tuple[Path, ...]:
        """The names that the output takes, the last of them at the end."""
        return (self.out,) if self.directory or self._has_long_name else (receipt_of(self.out), self.out)

    @property
    def _has_long_name(self) -> bool:
        """Whether no receipt can lie beside the output."""
        return len(os.fsencode(receipt_of(self.out).name)) > MAX_NAME_BYTES

    def check(self) -> None:
        """Raise OutputExistsError unless the output may be written: to a free place, or over what is ours.

        Raises UsageError where it would take the place of an input, lie in one, or hold one.
        """
        left = self.check_apart()
        if os.path.ismount(self.out):
            raise OutputExistsError(f"{self.out}: is a mount point, which nothing can replace; name a folder in it")
        for path in self.places:
            if path == self.out or not any(work.misplaced_receipt for work in left):
                self._check_free(path)
        if self.beside and self._has_long_name:
            raise UsageError(f"{self.out}: its name is too long for a receipt beside it, {receipt_of(self.out).name}")

    def check_apart(self) -> list[Workspace]:
        """Raise UsageError where an input would be written, renamed or removed; return what other runs have left."""
        if self.out.name in ("", ".."):
            raise UsageError(f"{self.out}: name a new directory or file to write")
        left = seen(self.out)
        check_apart(self.inputs, (*reversed(self.places), *(work.path for work in left)))
        return left

    def _check_free(self, path: Path) -> None:
        directory = self.directory or path != self.out
        if path.is_symlink() or (path.exists() and not path.is_dir() and not path.is_file()):
            raise OutputExistsError(f"{path}: is a link or a special file", hint="choose another `output`")
        if not path.exists() or (directory and path.is_dir() and not any(path.iterdir())):
            return
        if not self.overwrite:
            instead = "" if self.overwrite is None else ", or replace it with `overwrite=True`"
            raise OutputExistsError(f"{path}: exists already", hint=f"choose another `output`{instead}")
        if path.is_dir() is not directory:
            there, wanted = ("directory", "file") if path.is_dir() else ("file", "directory")
            raise OutputExistsError(
                f"{path}: is a {there}, the output is a {wanted}", hint="choose another `output`, or remove it"
            )
        if not (self.ours if path == self.out else is_made_by_us)(path):
            raise OutputExistsError(
                f"{path}: was not made by adapterkit, so `overwrite=True` will not delete it", hint="remove it first"
            )


@contextmanager
def staged(
    place: Destination,
    *,
    job: str | None = None,
    resume: bool = False,
    precious: bool = False,
    kept: Callable[[Path], str] = lambda _: "",
) -> Iterator[Path]:
    """Yield a new directory, or the path of a file to make, which takes the place of the output on success only.

    What is made as `receipt` beside it goes beside the output. To `resume` is to go on with what a dead run of the same
    `job` has left; what other dead runs left is removed, unless it is `precious`. On failure everything is removed,
    unless `kept` says in words what of it stays. What became of it is a note of an interrupt, and of a full disk.
    """
    work: Workspace | None = None
    with _parents(place.out):
        try:
            with errors_of(place.out):
                with uninterrupted():
                    work = _claim(place, Mark(place.out.name, job, place.beside, precious), resume)
                    if place.directory:
                        work.new.mkdir(exist_ok=True)
                before = [_identity(path) for path in place.places]
                yield work.new
                with uninterrupted():
                    _commit(work, place, before)
                    work.clear_away()
        except BaseException as error:
            with uninterrupted():
                said = _given_up(work, place, kept)
                if isinstance(error, KeyboardInterrupt | NoSpaceError):
                    error.add_note(said)
            raise


def work_left(out: Path, job: str) -> Path | None:
    """What a dead run of that job has made of `out` so far."""
    return next((work.new for work in seen(out) if work.mark.job == job and work.can_go_on), None)


def receipts_aside(out: Path) -> list[Path]:
    """The receipts that a run which is swapping the file `out`, or died of it, has in its workspace."""
    folders = [path for work in seen(out) for path in (work.receipt, work.old_receipt)]
    return [path for path in folders if (path / RECEIPT).is_file()]


@contextmanager
def errors_of(out: Path) -> Iterator[None]:
    """Turn what the file system says while `out` is written into our errors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(f"{out}: the disk is full ({error.strerror}): free some space") from error
        where = error.filename if error.filename and PREFIX not in str(error.filename) else out
        raise AdapterkitError(f"{where}: {error.strerror or error}") from error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the handlers of signals that arrive meanwhile run at the end, in the main thread, where Python runs them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in system.ENDING if callable(handler := signal.getsignal(number))}
    arrived: list[int] = []
    try:
        for number in handlers:
            signal.signal(number, lambda which, _: arrived.append(which))
        yield
    finally:
        for number, handler in handlers.items():  # SIGINT last: until then it is still noted
            signal.signal(number, handler)
        for which in arrived:
            signal.raise_signal(which)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Make the directories above `out`; on failure those that were made go again."""
    missing = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with errors_of(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _claim(place: Destination, mark: Mark, resume: bool) -> Workspace:
    """A workspace for the output, after what dead runs have left was put right."""
    place.check_apart()
    remove_unmarked(place.out.parent)
    found = list(left_by_others(place.out))
    try:
        if any(work.alive for work in found):
            raise OutputExistsError(f"{place.out}: another adapterkit is writing there right now")
        for work in found:
            work.undo(place.out)
        place.check()  # whatever came between plan and run
        taken = next((work for work in found if resume and mark.job and work.mark == mark and work.can_go_on), None)
        for work in found:
            if work is not taken and (not work.mark.precious or work.mark.job == mark.job):
                work.clear_away()
        if taken is None:
            taken = Workspace.create(place.out.parent, mark)
        else:
            found.remove(taken)
        return taken
    finally:
        for work in found:
            work.close()


def _commit(work: Workspace, place: Destination, before: list[Inode | None]) -> None:
    """Let what was made take the output's place: a receipt first, then in one step the output itself."""
    out = place.out
    _flush_all(work.path)
    for path, inode in zip(place.places, before, strict=True):
        if _identity(path) != inode:
            raise OutputExistsError(f"{path}: appeared while it was being made", hint="choose another `output`")
    for beside in place.places[:-1]:
        _put_receipt(work, beside)
    if before[-1] is None:
        system.rename_new(work.new, out)
    elif not place.directory:
        work.new.replace(out)
    elif not system.exchange(work.new, out):
        out.rename(work.old)
        system.rename_new(work.new, out)
    work.done = True
    system.flush_path(out.parent)


def _put_receipt(work: Workspace, beside: Path) -> None:
    """Put the old receipt aside and the new one in its place; that this was begun shows by `old_receipt`."""
    there, new = os.path.lexists(beside), os.path.lexists(work.receipt)
    if there:
        beside.rename(work.old_receipt)
    elif new:
        work.old_receipt.mkdir()
    if new:
        system.rename_new(work.receipt, beside)
    if there or new:
        system.flush_path(work.path)
        system.flush_path(beside.parent)


def _given_up(work: Workspace | None, place: Destination, kept: Callable[[Path], str]) -> str:
    """Clean up after a failure, and say what was kept."""
    if work is None:
        return "nothing was kept"
    try:
        if not work.done:
            work.undo(place.out)
            if said := kept(work.new) if work.new.exists() else "":
                return said
        if work.path.exists():
            work.remove()
        return f"{place.out} is complete" if work.done else "nothing was kept"
    except (OSError, OutputExistsError) as error:
        return work.say_left(error)
    finally:
        work.close()


def _identity(path: Path) -> Inode | None:
    """Which file or directory `path` is at the moment, or None."""
    try:
        stats = path.lstat()
    except FileNotFoundError:
        return None
    return stats.st_dev, stats.st_ino


def _flush_all(path: Path) -> None:
    for folder, _, names in os.walk(path):
        for name in names:
            system.flush_path(Path(folder) / name)
        system.flush_path(Path(folder))
