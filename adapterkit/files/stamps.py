"""Inputs that must stay as they are while they are used.

A merge reads its inputs more than once: their headers, their bytes for the hash, their bytes to compute with. What it
computed with is what it hashed only if no file has changed between its first reading and the last. A change always
sets the time of the status (ctime), which nobody can set back, as they can the time of the contents (mtime).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.errors import ChangedError

TICK = 10_000_000  # nanoseconds; the clock of file times ticks at least so often
PATIENCE = 500  # ticks


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells a file in one state from any other file, and from itself in any later state."""

    device: int
    inode: int
    size: int
    modified: int
    status: int


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp]:
    """What the `files` are now; to be taken before anything of them is read. Raises OSError.

    A second change within one tick of the clock has the same time, so one that has just changed is waited for. Raises
    ChangedError where that does not end.
    """
    names = list(files)
    for _ in range(PATIENCE):
        found = {file: _stamp(file) for file in names}
        now = time.time_ns()
        fresh = [file for file, stamp in found.items() if 0 <= now - stamp.status <= TICK]
        if not fresh:
            return found
        threading.Event().wait(TICK / 1e9)
    raise ChangedError(f"{fresh[0]}: is being written to all the time. Try again when nothing else writes to it.")


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise ChangedError where a file is not what it was."""
    for file, before in stamps.items():
        try:
            now = _stamp(file)
        except OSError as error:
            raise ChangedError(f"{file}: {error.strerror}: it was there when this began") from error
        if now != before:
            raise ChangedError(
                f"{file}: has changed since it was first read ({_difference(before, now)}), so nothing was kept. "
                "Try again when nothing else writes to it."
            )


def with_links(stamps: Mapping[Path, Stamp], linked: Collection[Path]) -> dict[Path, Stamp]:
    """The stamps after hard links to some of the files were made, which sets the time of their status alone."""
    inodes = {(stamps[file].device, stamps[file].inode) for file in linked}
    renewed = {file: _stamp(file) for file, stamp in stamps.items() if (stamp.device, stamp.inode) in inodes}
    check_unchanged({file: replace(stamps[file], status=now.status) for file, now in renewed.items()})
    return {**stamps, **renewed}


def _stamp(file: Path) -> Stamp:
    found = os.stat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _difference(before: Stamp, now: Stamp) -> str:
    if (before.device, before.inode) != (now.device, now.inode):
        return "it is another file"
    if before.size != now.size:
        return f"{before.size:,} bytes before, {now.size:,} now"
    return "by the times that the file system keeps"
