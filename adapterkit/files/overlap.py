"""Inputs and outputs kept apart: by resolved path and by inode, so that no link, mount or spelling joins them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import UsageError

Inode = tuple[int, int]


def check_apart(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise UsageError where what is to be written, renamed or removed is an input, lies in one, or holds one.

    A file in an output may share its inode with a file in an input, as --link has it: its name goes, the bytes stay.
    """
    read = [_Tree.of(path, follow=True) for path in dict.fromkeys(inputs)]
    for path in outputs:
        out = _Tree.of(path, follow=False)
        for one in read:
            if one.top & out.above or (one.inside | one.top) & out.top:
                raise UsageError(f"{path}: is or lies in the input {one.path}", hint="choose another `output`")
            if (one.above | one.inside | one.top) & (out.folders | out.top):
                raise UsageError(
                    f"{path}: holds the input {one.path}, or what it links to", hint="choose another `output`"
                )


@dataclass(frozen=True)
class _Tree:
    """A path, and the inodes of what is there (one or none), of folders above, of folders in it and of all in it."""

    path: Path
    top: frozenset[Inode]
    above: frozenset[Inode]
    folders: frozenset[Inode]
    inside: frozenset[Inode]

    @classmethod
    def of(cls, path: Path, follow: bool) -> _Tree:
        """Look at `path`; with `follow` what links in it lead to belongs to it."""
        above, folders, inside = set(_above(path)), set[Inode](), set[Inode]()
        for entry in below(path):
            target = Path(entry.path)
            if entry.is_symlink():
                if follow:
                    above |= set(_above(target))
                    inside |= _inode(target)
            else:
                inside |= _inode(target)
                folders |= _inode(target) if entry.is_dir() else set()
        return cls(path, _inode(path), frozenset(above), frozenset(folders), frozenset(inside))


def _above(path: Path) -> Iterator[Inode]:
    for folder in Path(os.path.realpath(path)).parents:
        yield from _inode(folder)


def below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """All that lies in a folder and can be listed, links not followed."""
    pending = [str(folder)]
    while pending:  # a function that calls itself would not get down to where a stranger's folders end
        with suppress(OSError):
            for entry in list(os.scandir(pending.pop())):
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _inode(path: Path) -> frozenset[Inode]:
    """The inode of what is at `path`, links followed; empty where there is nothing."""
    try:
        stats = path.stat()
    except (OSError, ValueError):
        return frozenset()
    return frozenset({(stats.st_dev, stats.st_ino)})
