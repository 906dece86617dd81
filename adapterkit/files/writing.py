"""Write small files and flush them to the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.files import os_calls
from adapterkit.files.opening import CHUNK_BYTES, open_inside


def copy_file(source: Path, name: str, target: Path) -> str:
    """Copy the regular file `name` in the folder `source` to `target` and flush it to the disk; returns its SHA-256.

    Links below `source` are not followed, except those of the Hub cache to its own blobs.
    """
    digest = hashlib.sha256()
    with open_inside(source, name) as stream:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "wb") as copy:
            while piece := stream.read(CHUNK_BYTES):
                digest.update(piece)
                copy.write(piece)
            copy.flush()
            os_calls.flush(copy.fileno())
    return digest.hexdigest()


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object and flush it to the disk."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` and flush it to the disk."""
    write_bytes(file, text.encode("utf-8", "backslashreplace"))  # paths may not be UTF-8


def write_bytes(file: Path, data: bytes) -> None:
    """Write `data` and flush it to the disk."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os_calls.flush(stream.fileno())
