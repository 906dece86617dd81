"""Adapter files, one module a format: `NAME`, `detect(source)`, `read(source)`, `write(adapter, directory)`.

To add a format, write the module and name it in `FORMATS`; the first whose `detect` says yes reads the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Protocol

from adapterkit.adapter.formats import peft
from adapterkit.adapter.formats.source import ADAPTER_CONFIG, Source, open_source
from adapterkit.adapter.weights import Adapter
from adapterkit.errors import FormatError, UsageError


class Format(Protocol):
    """What the module of a format offers."""

    NAME: str

    def detect(self, source: Source) -> bool: ...
    def read(self, source: Source, alpha: float | None, scaling: float | None) -> Adapter: ...
    def write(self, adapter: Adapter, directory: Path) -> None: ...


FORMATS: tuple[Format, ...] = (peft,)


def load(path: str | os.PathLike[str], *, alpha: float | None = None, scaling: float | None = None) -> Adapter:
    """Open the adapter at `path`, a directory or a file; its headers are read now, its weights when asked for.

    `alpha` (with `scaling = alpha / rank`) or `scaling` itself stand in for a missing config; either overrides
    nothing, so giving one beside a config is an error. Raises FormatError for files that are no adapter, or are broken.
    """
    if alpha is not None and scaling is not None:
        raise UsageError("--alpha and --scaling both say how strong the adapter is: give one of them")
    for name, value in (("alpha", alpha), ("scaling", scaling)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UsageError(f"{name} {value!r}: expected a number")
    source = open_source(Path(path))
    for reader in FORMATS:
        if reader.detect(source):
            return replace(reader.read(source, alpha, scaling), stamps=dict(source.stamps))
    names = list(source.tensors)
    raise FormatError(
        f"{source.weights}: no reader knows these tensors: {_shown(names)}. "
        f"Formats read: {', '.join(reader.NAME for reader in FORMATS)}."
    )


def holds_adapter(path: Path, tensors: Iterable[str]) -> bool:
    """Whether a folder, or a file that holds `tensors`, is an adapter and not a model."""
    alone = (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists()
    return alone or any(".lora_A." in name or ".lora_embedding_A" in name for name in tensors)


def save(adapter: Adapter, directory: str | os.PathLike[str]) -> None:
    """Write `adapter` to a new directory as a PEFT adapter."""
    peft.write(adapter, Path(directory))


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
