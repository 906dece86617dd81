"""A cache of measured rows, keyed by the SHA-256 of an adapter's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from adapterkit import __version__
from adapterkit.adapter.weights import Adapter
from adapterkit.errors import FormatError
from adapterkit.files.hub_cache import check_cached
from adapterkit.files.opening import open_regular, sha256_of
from adapterkit.inspection.module_rows import ModuleRow, measure

MAX_ENTRIES = 500  # adapters; the oldest are removed


def folder() -> Path:
    """The cache's folder."""
    from platformdirs import user_cache_path

    return user_cache_path("adapterkit") / "measured"


def measured(adapter: Adapter, stop: Callable[[], bool] = lambda: False) -> list[ModuleRow]:
    """The rows of `summary.measure`, cached; incomplete if `stop()` becomes true."""
    file = folder() / f"{_key(adapter)}.json"
    check_cached(adapter.files)
    with suppress(FormatError, ValueError, TypeError, KeyError), open_regular(file) as stream:
        return [_row(facts) for facts in json.load(stream)]
    rows: list[ModuleRow] = []
    for row in measure(adapter):
        if stop():
            return rows
        rows.append(row)
    with suppress(OSError):  # an unwritable cache is not an error
        _store(file, rows)
    return rows


def _key(adapter: Adapter) -> str:
    hashed = hashlib.sha256(__version__.encode())
    for path in adapter.files:
        hashed.update(bytes.fromhex(sha256_of(path)))
    return hashed.hexdigest()


def _store(file: Path, rows: list[ModuleRow]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")  # with NaN, which Python reads
    partial.replace(file)
    for old in sorted(file.parent.glob("*.json"), key=lambda entry: entry.stat().st_mtime)[:-MAX_ENTRIES]:
        old.unlink(missing_ok=True)


def _row(facts: dict[str, Any]) -> ModuleRow:
    if facts.keys() != {field.name for field in fields(ModuleRow)}:
        raise KeyError("written by another version")
    plain: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    return ModuleRow(**plain)
