"""Overlap between inputs and outputs, found by inode, so that links, mounts and spellings can't hide it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapterkit.errors import UsageError

Inode = tuple[int, int]


def check_disjoint(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise UsageError if an output, which is written, renamed or removed, is an input, is inside one, or contains one.

    A file inside an output may share its inode with an input, as `link=True` makes it: removing it keeps the input.
    """
    trees = [_Tree.of(path, follow=True) for path in dict.fromkeys(inputs)]
    for path in outputs:
        out = _Tree.of(path, follow=False)
        for tree in trees:
            if tree.top & out.above or (tree.inside | tree.top) & out.top:
                raise UsageError(f"{path}: is the input {tree.path}, or inside it", hint="choose another `out`")
            if (tree.above | tree.inside | tree.top) & (out.folders | out.top):
                raise UsageError(
                    f"{path}: contains the input {tree.path}, or a file that it links to",
                    hint="choose another `out`",
                )


@dataclass(frozen=True)
class _Tree:
    """A path and sets of inodes: its own (`top`, at most one), its parents', its subfolders', and all inside it."""

    path: Path
    top: frozenset[Inode]
    above: frozenset[Inode]
    folders: frozenset[Inode]
    inside: frozenset[Inode]

    @classmethod
    def of(cls, path: Path, follow: bool) -> _Tree:
        """Scan `path`; `follow` includes the targets of links inside it."""
        above, folders, inside = set(_above(path)), set[Inode](), set[Inode]()
        for entry in entries_below(path):
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


def entries_below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below `folder` that can be listed, without following links."""
    pending = [str(folder)]
    while pending:  # not recursive: untrusted folders can be nested deeper than Python's stack
        with suppress(OSError):
            for entry in list(os.scandir(pending.pop())):
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def _inode(path: Path) -> frozenset[Inode]:
    """Return the inode at `path`, following links; empty if nothing exists there."""
    try:
        stats = path.stat()
    except (OSError, ValueError):
        return frozenset()
    return frozenset({(stats.st_dev, stats.st_ino)})
