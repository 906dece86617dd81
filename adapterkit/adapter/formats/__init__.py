"""Adapter files, one module per format. To add one, write its module (see `format.py`) and list it in `table.py`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter.formats import table
from adapterkit.adapter.formats.foreign import are_foreign, format_of_tensors
from adapterkit.adapter.formats.source import Source, open_sources
from adapterkit.adapter.weights import ORIENTATIONS, Adapter, Problem
from adapterkit.errors import FormatError, OutputExistsError, UsageError
from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.files.safetensors import TensorInfo


def load(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    scaling: float | None = None,
    orientation: str | None = None,
) -> Adapter:
    """Open the adapter at `path`. Reads the headers now, and weights on demand.

    Args:
        path: A directory or a file.
        alpha: Alpha of an adapter without a config (`scaling = alpha / rank`); an error if there is a config.
        scaling: Scaling itself of an adapter without a config; an error if there is a config.
        orientation: Whether a square Δ of stacked experts is added `plain` or `transposed`; by default, the version of
            PEFT and the type of the model decide.

    Returns:
        The adapter: a mapping of module names to weights.

    Raises:
        MissingFileError: There is no such path.
        FormatError: The files are not an adapter, or are corrupt.
        UnknownStrengthError: Neither the files nor the call define alpha or scaling.
    """
    if alpha is not None and scaling is not None:
        raise UsageError("`alpha` and `scaling` cannot be combined", hint="give one of them")
    for name, value in (("alpha", alpha), ("scaling", scaling)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
            raise UsageError(f"{name} {value!r}: expected a number")
    if orientation not in (None, *ORIENTATIONS):
        raise UsageError(f"orientation {orientation!r}: expected one of {', '.join(ORIENTATIONS)}")
    for format, source in open_sources(Path(path)):
        if format.detect(source):
            adapter = format.read(source, alpha, scaling)
            problems = (*_empty_tensors(source), *adapter.problems)
            return replace(adapter, stamps=dict(source.stamps), problems=problems, orientation=orientation)
    for problem in _empty_tensors(source):
        raise FormatError(str(problem), hint=problem.remedy)
    named = format_of_tensors(source.tensors)
    found = f"is {named}, an unsupported adapter format" if named else "unsupported adapter format"
    raise FormatError(
        f"{source.weights}: {found} (tensors: {_shown(source.tensors)}); "
        f"supported formats: {', '.join(table.format_names())}"
    )


def _empty_tensors(source: Source) -> Iterator[Problem]:
    """Yield the problem of a file in which DeepSpeed ZeRO-3 left tensors empty, or none at all."""
    empty = [name for name, tensor in source.tensors.items() if 0 in tensor.shape]
    if empty or not source.tensors:
        some = (
            f"{len(empty)} of {counted(len(source.tensors), 'tensor')} are empty (first: {empty[0]})" if empty else ""
        )
        yield Problem(
            source.weights.name,
            f"{some or 'has no tensors'}; DeepSpeed ZeRO-3 shards the weights and saves them only if it gathers them",
            remedy="gather the checkpoint with the zero_to_fp32.py in its folder, or save the adapter again with "
            "stage3_gather_16bit_weights_on_model_save (accelerate: zero3_save_16bit_model)",
        )


def holds_adapter(path: Path, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether a folder, or a file with these `tensors`, is an adapter rather than a model."""
    has_config = any((path / name).is_file() for name in table.config_names()) and not (path / "config.json").exists()
    source = Source(path, tensors, {}, None, path, {})
    known = any(format.detect(source) for format in table.FORMATS)
    return has_config or known or are_foreign(tensors)


def save(adapter: Adapter, directory: str | os.PathLike[str], *, format: str = table.DEFAULT) -> None:
    """Write `adapter` to a new directory.

    Args:
        adapter: The adapter to write.
        directory: A directory that doesn't exist or is empty.
        format: The name of a format.

    Raises:
        UsageError: The format is unknown.
        FitError: The format can't represent the adapter.
        OutputExistsError: The directory exists and is not empty.
    """
    writer, folder = table.get_format(format), Path(directory)
    if folder.exists() and any(folder.iterdir()):
        raise OutputExistsError(f"{folder}: is not empty; choose another directory for the adapter")
    writer.write(adapter, folder)


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
