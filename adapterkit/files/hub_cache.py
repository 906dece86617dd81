"""Files in the Hub cache, checked against the hash that names them."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

from adapterkit.errors import FormatError
from adapterkit.files.opening import open_regular, sha256_of

log = logging.getLogger(__name__)


def check_name(file: Path, sha256: str) -> None:
    """Raise FormatError where the Hub cache, which names weights by their SHA-256, holds other bytes as `file`."""
    blob = Path(os.path.realpath(file))
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != sha256:
        raise FormatError(
            f"{file}: is damaged: its SHA-256 begins with {sha256[:12]}, the Hub's with {blob.name[:12]}; "
            "`adapterkit pull` replaces it"
        )


def check_cached(files: Iterable[Path]) -> None:
    """Raise FormatError where a file in the Hub cache has other bytes than the Hub names by their hash.

    The cache names weights by their SHA-256, and small files by git's SHA-1. What lies elsewhere has no hash to check.
    """
    for file in files:
        blob = Path(os.path.realpath(file))
        if blob.parent.name != "blobs":
            continue
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            check_name(file, sha256_of(file))
        elif re.fullmatch("[0-9a-f]{40}", blob.name):
            if _git_name(file) != blob.name:
                raise FormatError(
                    f"{file}: is damaged: it has other bytes than on the Hub; `adapterkit pull` replaces it"
                )
        else:
            log.warning("%s: was not checked, since the Hub names no hash of it", file)


def _git_name(file: Path) -> str:
    """What git calls a file by its contents."""
    with open_regular(file) as stream:
        begin = b"blob %d\0" % os.fstat(stream.fileno()).st_size
        return hashlib.file_digest(stream, lambda: hashlib.sha1(begin, usedforsecurity=False)).hexdigest()
