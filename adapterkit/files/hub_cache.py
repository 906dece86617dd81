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


def check_blob_hash(file: Path, sha256: str) -> None:
    """Raise FormatError if `file` is a blob in the Hub cache and its name, a SHA-256, differs from `sha256`."""
    blob = Path(os.path.realpath(file))
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != sha256:
        raise FormatError(
            f"{file}: is corrupt: its SHA-256 starts with {sha256[:12]}, the Hub's with {blob.name[:12]}; "
            "`adapterkit pull` replaces it"
        )


def check_cached(files: Iterable[Path]) -> None:
    """Raise FormatError if the contents of a file in the Hub cache don't match the hash in its blob's name.

    The name is the SHA-256 of weights, and git's SHA-1 of small files. Files outside the cache are skipped.
    """
    for file in files:
        blob = Path(os.path.realpath(file))
        if blob.parent.name != "blobs":
            continue
        if re.fullmatch("[0-9a-f]{64}", blob.name):
            check_blob_hash(file, sha256_of(file))
        elif re.fullmatch("[0-9a-f]{40}", blob.name):
            if _git_blob_id(file) != blob.name:
                raise FormatError(
                    f"{file}: is corrupt: it differs from the file on the Hub; `adapterkit pull` replaces it"
                )
        else:
            log.warning("%s: could not be verified: the Hub gives no hash for it", file)


def _git_blob_id(file: Path) -> str:
    """Return the SHA-1 that identifies the contents of `file` in git."""
    with open_regular(file) as stream:
        prefix = b"blob %d\0" % os.fstat(stream.fileno()).st_size
        return hashlib.file_digest(stream, lambda: hashlib.sha1(prefix, usedforsecurity=False)).hexdigest()
