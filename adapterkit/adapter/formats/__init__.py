"""Adapter files, one module a format. To add one, write its module (see `format.py`) and name it in `table.py`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter.formats import table
from adapterkit.adapter.formats.source import Source, open_sources
from adapterkit.adapter.weights import Adapter
from adapterkit.errors import FormatError, OutputExistsError, UsageError

if TYPE_CHECKING:
    from adapterkit.files.safetensors import TensorInfo


def load(path: str | os.PathLike[str], *, alpha: float | None = None, scaling: float | None = None) -> Adapter:
    """Open the adapter at `path`, a directory or a file; its headers are read now, its weights when asked for.

    `alpha` (with `scaling = alpha / rank`) or `scaling` itself stand in for a missing config; either overrides
    nothing, so giving one beside a config is an error. Raises FormatError for files that are no adapter, or are broken,
    and UnknownStrengthError where neither they nor the call say how strong it is.
    """
    if alpha is not None and scaling is not None:
        raise UsageError("`alpha` and `scaling` both say how strong the adapter is", hint="give one of them")
    for name, value in (("alpha", alpha), ("scaling", scaling)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UsageError(f"{name} {value!r}: expected a number")
    for format, source in open_sources(Path(path)):
        if format.detect(source):
            return replace(format.read(source, alpha, scaling), stamps=dict(source.stamps))
    raise FormatError(
        f"{source.weights}: no reader knows these tensors: {_shown(source.tensors)}. "
        f"Formats read: {', '.join(table.format_names())}."
    )


def holds_adapter(path: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a folder, or a file that holds `tensors`, is an adapter and not a model."""
    alone = any((path / name).is_file() for name in table.config_names()) and not (path / "config.json").exists()
    source = Source(path, tensors, {}, None, path, {})
    return alone or any(format.detect(source) for format in table.FORMATS)


def save(adapter: Adapter, directory: str | os.PathLike[str], *, format: str = table.DEFAULT) -> None:
    """Write `adapter` to a new directory, in the format called `format`.

    Raises UsageError for a format that there is not, FitError for an adapter that it cannot hold, and
    OutputExistsError where the directory is there already and not empty.
    """
    writer, folder = table.format_named(format), Path(directory)
    if folder.exists() and any(folder.iterdir()):
        raise OutputExistsError(f"{folder}: is not empty; choose another directory for the adapter")
    writer.write(adapter, folder)


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
