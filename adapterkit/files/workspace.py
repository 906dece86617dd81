"""The hidden folder in which an output is made: randomly named, with a mark file that the running process locks.

`.adapterkit-1f9c2ab4/` holds the mark, `new`, which will become the output, and `receipt`, which goes beside a single
file; during the swap also `old` and `old-receipt`. Folders without a mark, or of another user, are left alone.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from adapterkit import __version__
from adapterkit.errors import OutputExistsError
from adapterkit.files import os_calls
from adapterkit.files.overlap import entries_below

PREFIX, MARK = ".adapterkit-", "adapterkit_workspace.json"
MODE = 0o1700  # the sticky bit identifies the folder until the mark is written
MAX_MARK_BYTES = 10_000
MARK_FLAGS = os_calls.WRITE_FLAGS | os_calls.NO_FOLLOW | os_calls.READ_FLAGS


def receipt_of(out: Path) -> Path:
    """Return the receipt folder beside a single-file output."""
    return out.with_name(f"{out.name}.receipt")


@dataclass(frozen=True, slots=True)
class Mark:
    """The purpose of a workspace, stored in it as JSON.

    Args:
        output: The file name of the output.
        job: The job that can resume the work.
        beside: A receipt goes beside the output.
        precious: Only a run of the same job may remove the workspace.
    """

    output: str
    job: str | None = None
    beside: bool = False
    precious: bool = False


@dataclass
class Workspace:
    """An open workspace: locked by this object until `close`, or `alive` if another process has locked it."""

    path: Path
    mark: Mark
    fd: int = -1
    alive: bool = False
    done: bool = False  # the output is in place

    def __post_init__(self) -> None:
        self.new, self.old = self.path / "new", self.path / "old"
        self.receipt, self.old_receipt = self.path / "receipt", self.path / "old-receipt"

    @classmethod
    def create(cls, parent: Path, mark: Mark) -> Workspace:
        """Make a workspace in `parent`, marked and locked. Raises OSError."""
        while True:
            path = parent / f"{PREFIX}{secrets.token_hex(4)}"
            with suppress(FileExistsError):
                os_calls.make_folder(path, MODE)
                fd = _create_mark(path, mark)
                if fd is not None:
                    return cls(path, mark, fd)

    @classmethod
    def open(cls, path: Path) -> Workspace | None:
        """Open the workspace at `path`; returns None if it isn't a marked one of this user."""
        try:
            if not _is_ours(path):
                return None
            fd = os.open(path / MARK, MARK_FLAGS)
        except OSError:
            return None
        mark, alive = _read_mark(fd), False
        try:
            os_calls.lock(fd, wait=False)
        except BlockingIOError:
            alive = True
        except OSError:
            mark = None  # without locks, whether its process is running is unknown
        if mark is None or alive:
            os.close(fd)
        return None if mark is None else cls(path, mark, -1 if alive else fd, alive)

    def undo(self, out: Path) -> None:
        """Restore the old output and receipt if the run ended before `new` became `out`. Raises OutputExistsError."""
        if os.path.lexists(self.old) and os.path.lexists(self.new):
            if os.path.lexists(out):
                raise OutputExistsError(
                    f"{out}: a run that ended early had moved this output to {self.old}; move one of the two away"
                )
            os_calls.rename_new(self.old, out)
        if os.path.lexists(self.old_receipt) and os.path.lexists(self.new):
            beside = receipt_of(out)
            if self.misplaced_receipt and os.path.lexists(beside):
                os_calls.rename_new(beside, self.receipt)
            if os.listdir(self.old_receipt):  # empty if there was no old receipt
                os_calls.rename_new(self.old_receipt, beside)

    @property
    def resumable(self) -> bool:
        """Whether a run can resume here; a link, which no run makes, would let it change other files."""
        return not self.alive and not any(entry.is_symlink() for entry in entries_below(self.path))

    @property
    def misplaced_receipt(self) -> bool:
        """Whether the new receipt is in place, but the new output isn't yet."""
        swapping = self.mark.beside and os.path.lexists(self.old_receipt) and os.path.lexists(self.new)
        return swapping and not os.path.lexists(self.receipt)

    def remove_or_warn(self) -> None:
        """Remove the workspace; warn if that fails, since what is left doesn't affect other runs."""
        try:
            self.remove()
        except OSError as error:
            self.warn_left_behind(error)

    def warn_left_behind(self, error: Exception) -> str:
        """Log and return a warning that the workspace could not be removed."""
        warning = f"{self.path} could not be removed: {getattr(error, 'strerror', None) or error}"
        logging.getLogger("adapterkit").warning(warning)
        return warning

    def remove(self) -> None:
        """Remove the workspace, its mark last. Raises OSError."""
        try:
            for path in self.path.iterdir():
                if path.name != MARK:
                    remove_tree(path)
            (self.path / MARK).unlink()
            with suppress(FileNotFoundError):  # another process has removed the empty folder
                self.path.rmdir()
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def other_workspaces(out: Path) -> Iterator[Workspace]:
    """Yield the workspaces for `out` of other processes, running or ended; the caller closes each."""
    for path in _candidates(out.parent):
        work = Workspace.open(path)
        if work is not None and work.mark.output == out.name:
            yield work
        elif work is not None:
            work.close()


def workspaces_of(out: Path) -> list[Workspace]:
    """Return the workspaces for `out`, closed."""
    found = []
    for work in other_workspaces(out):
        work.close()
        found.append(work)
    return found


def remove_unmarked(parent: Path) -> None:
    """Remove this user's workspaces that have no valid mark and are otherwise empty."""
    for path in _candidates(parent):
        with suppress(OSError):
            if not _is_ours(path) or os.listdir(path) not in ([], [MARK]):
                continue
            if (path / MARK).exists():
                fd = os.open(path / MARK, MARK_FLAGS)
                try:
                    os_calls.lock(fd, wait=False)
                    if _read_mark(fd) is None:
                        (path / MARK).unlink()
                finally:
                    os.close(fd)
            path.rmdir()


def remove_tree(path: Path) -> None:
    """Remove a file or a directory tree, if it exists."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except PermissionError:  # an old output may have read-only folders
            for folder in (
                path,
                *(Path(entry.path) for entry in entries_below(path) if entry.is_dir(follow_symlinks=False)),
            ):
                folder.chmod(0o700)
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _candidates(parent: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(parent.glob(f"{PREFIX}????????"))
    return []


def _is_ours(path: Path) -> bool:
    """Return whether the folder has the owner and the mode of this user's workspaces."""
    stats = path.lstat()
    return stat.S_ISDIR(stats.st_mode) and stats.st_uid == os_calls.user_id() and stats.st_mode & 0o1777 == MODE


def _create_mark(path: Path, mark: Mark) -> int | None:
    """Write the mark; returns it open and locked, or None if another process removed the folder as abandoned."""
    try:
        fd = os.open(path / MARK, os_calls.NEW_FLAGS, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        path.rmdir()
        raise
    try:
        try:
            os_calls.lock(fd)
        except OSError as error:
            if error.errno not in os_calls.NO_LOCKS:
                raise
        if not os.fstat(fd).st_nlink:
            os.close(fd)
            return None
        os.write(fd, json.dumps({"adapterkit": __version__, **asdict(mark)}).encode())
        os_calls.flush(fd)
    except BaseException:
        os.close(fd)
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()
        raise
    return fd


def _read_mark(fd: int) -> Mark | None:
    """Parse an open mark; returns None if it is incomplete or of another user."""
    stats = os.fstat(fd)
    if not stat.S_ISREG(stats.st_mode) or stats.st_uid != os_calls.user_id():
        return None
    try:
        data = bytearray(MAX_MARK_BYTES)
        fields = json.loads(data[: os_calls.read_at(fd, memoryview(data), 0)])
        fields.pop("adapterkit")
        mark = Mark(**fields)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return mark if isinstance(mark.output, str) else None
