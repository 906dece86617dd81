"""Detect changes to input files while they are used.

A merge reads its inputs more than once: for their headers, to hash them, and to compute. The hash describes the bytes
that it computed with only if no file changed between the first read and the last. Every change updates the ctime,
which, unlike the mtime, cannot be set back.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from adapterkit.errors import ChangedError

TICK = 10_000_000  # nanoseconds; an upper bound on the resolution of file times
MAX_TICKS = 500


@dataclass(frozen=True, slots=True)
class Stamp:
    """The identity and the state of a file; any change to the file changes its stamp."""

    device: int
    inode: int
    size: int
    mtime: int
    ctime: int


def stamps_of(files: Iterable[Path]) -> dict[Path, Stamp]:
    """Return the stamps of `files`, to be taken before any of them is read. Raises OSError.

    Waits for files that changed within the last tick, since a second change in it would get the same ctime. Raises
    ChangedError if they keep changing.
    """
    names = list(files)
    for _ in range(MAX_TICKS):
        found = {file: _stamp(file) for file in names}
        now = time.time_ns()
        fresh = [file for file, stamp in found.items() if 0 <= now - stamp.ctime <= TICK]
        if not fresh:
            return found
        threading.Event().wait(TICK / 1e9)
    raise ChangedError(f"{fresh[0]}: keeps changing. Try again when no other program writes to it.")


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise ChangedError if a file no longer matches its stamp."""
    for file, before in stamps.items():
        try:
            now = _stamp(file)
        except OSError as error:
            raise ChangedError(f"{file}: was removed or became unreadable: {error.strerror}") from error
        if now != before:
            raise ChangedError(
                f"{file}: has changed since it was first read ({_difference(before, now)}); nothing was written. "
                "Try again when no other program writes to it."
            )


def restamp_linked(stamps: Mapping[Path, Stamp], linked: Collection[Path]) -> dict[Path, Stamp]:
    """Return the stamps after `linked` files got hard links, which changes their ctime only; raises ChangedError."""
    inodes = {(stamps[file].device, stamps[file].inode) for file in linked}
    renewed = {file: _stamp(file) for file, stamp in stamps.items() if (stamp.device, stamp.inode) in inodes}
    check_unchanged({file: replace(stamps[file], ctime=now.ctime) for file, now in renewed.items()})
    return {**stamps, **renewed}


def _stamp(file: Path) -> Stamp:
    stats = os.stat(file)
    return Stamp(stats.st_dev, stats.st_ino, stats.st_size, stats.st_mtime_ns, stats.st_ctime_ns)


def _difference(before: Stamp, now: Stamp) -> str:
    if (before.device, before.inode) != (now.device, now.inode):
        return "it was replaced"
    if before.size != now.size:
        return f"{before.size:,} bytes before, {now.size:,} now"
    return "its timestamps differ"
