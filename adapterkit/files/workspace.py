"""The hidden folder beside an output in which it is made: a random name, a mark inside, a lock while its process lives.

`.adapterkit-1f9c2ab4/` holds the mark, `new`, which is to become the output, and `receipt`, which goes beside a single
file; while names are swapped also `old` and `old-receipt`. What has no mark, or is another user's, is left alone.
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
from adapterkit.files import system
from adapterkit.files.overlap import below

PREFIX, MARK = ".adapterkit-", "adapterkit_workspace.json"
MODE = 0o1700  # Linux's mkdir sets it in one step; the sticky bit marks the folder until the mark is there
MAX_MARK_BYTES = 10_000
OPEN = system.WRITE | system.NO_LINK | system.READ  # a mark to read, and to lock


def receipt_of(out: Path) -> Path:
    """The folder beside a single file that its receipt lies in."""
    return out.with_name(f"{out.name}.receipt")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a workspace is for: an output's name, the job that may go on with it, and whether a receipt is made.

    A `precious` one is removed by its own job only.
    """

    output: str
    job: str | None = None
    beside: bool = False
    precious: bool = False


@dataclass
class Workspace:
    """One such folder; `alive` where another process has it locked, else locked by this object until `close`."""

    path: Path
    mark: Mark
    fd: int = -1
    alive: bool = False
    done: bool = False  # the output has its place

    def __post_init__(self) -> None:
        self.new, self.old = self.path / "new", self.path / "old"
        self.receipt, self.old_receipt = self.path / "receipt", self.path / "old-receipt"

    @classmethod
    def create(cls, parent: Path, mark: Mark) -> Workspace:
        """Make a locked and marked folder in `parent`. Raises OSError."""
        while True:
            path = parent / f"{PREFIX}{secrets.token_hex(4)}"
            with suppress(FileExistsError):
                system.make_folder(path, MODE)
                fd = _create_mark(path, mark)
                if fd is not None:
                    return cls(path, mark, fd)

    @classmethod
    def open(cls, path: Path) -> Workspace | None:
        """The workspace at `path`, if it is a marked one of this user."""
        try:
            if not _is_ours(path):
                return None
            fd = os.open(path / MARK, OPEN)
        except OSError:
            return None
        mark, alive = _read_mark(fd), False
        try:
            system.lock(fd, wait=False)
        except BlockingIOError:
            alive = True
        except OSError:
            mark = None  # nobody can tell whether its process lives
        if mark is None or alive:
            os.close(fd)
        return None if mark is None else cls(path, mark, -1 if alive else fd, alive)

    def undo(self, out: Path) -> None:
        """Put back what was put aside, where the run ended before `new` became `out`. Raises OutputExistsError."""
        if os.path.lexists(self.old) and os.path.lexists(self.new):
            if os.path.lexists(out):
                raise OutputExistsError(
                    f"{out}: was put aside as {self.old} by a run that ended there; move that or this away"
                )
            system.rename_new(self.old, out)
        if os.path.lexists(self.old_receipt) and os.path.lexists(self.new):
            beside = receipt_of(out)
            if self.misplaced_receipt and os.path.lexists(beside):
                system.rename_new(beside, self.receipt)
            if os.listdir(self.old_receipt):  # else there was none
                system.rename_new(self.old_receipt, beside)

    @property
    def can_go_on(self) -> bool:
        """Whether a run may go on with what is here: no run makes a link, through which other files would change."""
        return not self.alive and not any(entry.is_symlink() for entry in below(self.path))

    @property
    def misplaced_receipt(self) -> bool:
        """Whether the new receipt has its place, and the new output has not."""
        swapping = self.mark.beside and os.path.lexists(self.old_receipt) and os.path.lexists(self.new)
        return swapping and not os.path.lexists(self.receipt)

    def clear_away(self) -> None:
        """Remove it as `remove` does; where that fails, say what is left, which hinders no other run."""
        try:
            self.remove()
        except OSError as error:
            self.say_left(error)

    def say_left(self, error: Exception) -> str:
        """Say, and return, that the folder is still there, and why."""
        said = f"{self.path} could not be removed: {getattr(error, 'strerror', None) or error}"
        logging.getLogger("adapterkit").warning(said)
        return said

    def remove(self) -> None:
        """Remove the folder with all in it, the mark last. Raises OSError."""
        try:
            for path in self.path.iterdir():
                if path.name != MARK:
                    remove(path)
            (self.path / MARK).unlink()
            with suppress(FileNotFoundError):  # another process took the empty folder for a dead one's
                self.path.rmdir()
        finally:
            self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def left_by_others(out: Path) -> Iterator[Workspace]:
    """The workspaces for `out` that other processes have, or died with; each is to be closed."""
    for path in _candidates(out.parent):
        work = Workspace.open(path)
        if work is not None and work.mark.output == out.name:
            yield work
        elif work is not None:
            work.close()


def seen(out: Path) -> list[Workspace]:
    """The same, only looked at."""
    found = []
    for work in left_by_others(out):
        work.close()
        found.append(work)
    return found


def remove_unmarked(parent: Path) -> None:
    """Remove the workspaces of this user's that never got a mark, and so have nothing in them."""
    for path in _candidates(parent):
        with suppress(OSError):
            if not _is_ours(path) or os.listdir(path) not in ([], [MARK]):
                continue
            if (path / MARK).exists():
                fd = os.open(path / MARK, OPEN)
                try:
                    system.lock(fd, wait=False)
                    if _read_mark(fd) is None:
                        (path / MARK).unlink()
                finally:
                    os.close(fd)
            path.rmdir()


def remove(path: Path) -> None:
    """Remove a file or a directory with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except PermissionError:  # an old output's folders may be read-only
            for folder in (path, *(Path(entry.path) for entry in below(path) if entry.is_dir(follow_symlinks=False))):
                folder.chmod(0o700)
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _candidates(parent: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(parent.glob(f"{PREFIX}????????"))
    return []


def _is_ours(path: Path) -> bool:
    """Whether this user made the folder, and as a workspace is made."""
    stats = path.lstat()
    return stat.S_ISDIR(stats.st_mode) and stats.st_uid == system.user() and stats.st_mode & 0o1777 == MODE


def _create_mark(path: Path, mark: Mark) -> int | None:
    """Write the mark and return it open and locked; None where another process removed the folder as a dead one's."""
    try:
        fd = os.open(path / MARK, system.NEW, 0o600)
    except FileNotFoundError:
        return None
    except OSError:
        path.rmdir()
        raise
    try:
        try:
            system.lock(fd)
        except OSError as error:
            if error.errno not in system.NO_LOCKS:
                raise
        if not os.fstat(fd).st_nlink:
            os.close(fd)
            return None
        os.write(fd, json.dumps({"adapterkit": __version__, **asdict(mark)}).encode())
        system.flush(fd)
    except BaseException:
        os.close(fd)
        (path / MARK).unlink(missing_ok=True)
        path.rmdir()
        raise
    return fd


def _read_mark(fd: int) -> Mark | None:
    """What an open mark says, if it is a whole one."""
    stats = os.fstat(fd)
    if not stat.S_ISREG(stats.st_mode) or stats.st_uid != system.user():
        return None
    try:
        found = bytearray(MAX_MARK_BYTES)
        facts = json.loads(found[: system.read_at(fd, memoryview(found), 0)])
        facts.pop("adapterkit")
        mark = Mark(**facts)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return mark if isinstance(mark.output, str) else None
