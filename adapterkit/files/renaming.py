"""Renames that swap two names or refuse to replace one: Linux's renameat2, and what comes nearest without it."""

from __future__ import annotations

import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2
# What kernels, file systems and sandboxes say that do not have it.
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where kernel or file system cannot, and nothing was done. Raises OSError."""
    return _renameat2(one, other, RENAME_EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename where nothing is called `target`; raises FileExistsError where something is."""
    if _renameat2(source, target, RENAME_NOREPLACE):
        return
    if os.path.lexists(target):  # a moment between this and the rename is left
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    function, ctypes = _function()
    if function is None:
        return False
    if function(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@cache
def _function() -> Any:
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function, ctypes
