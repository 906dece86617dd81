"""The files of an adapter before their format is known: the weights, the config, and the tensors by name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapter.formats import table
from adapterkit.adapter.formats.foreign import format_of_file
from adapterkit.adapter.formats.format import Format
from adapterkit.adapter.formats.pickled import read_pickle
from adapterkit.errors import FormatError, MissingFileError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.safetensors import TensorInfo, read_header
from adapterkit.files.stamps import Stamp, stamps_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """The files of one adapter, opened but not interpreted, with the config of one of the formats."""

    weights: Path
    tensors: Mapping[str, TensorInfo | torch.Tensor]
    metadata: Mapping[str, str]
    config: dict[str, Any] | None
    config_file: Path  # may not exist
    stamps: Mapping[Path, Stamp]  # taken before the files were read

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.weights,) if self.config is None else (self.weights, self.config_file)


def open_sources(path: Path) -> Iterator[tuple[Format, Source]]:
    """Find the weights at `path`, read their header, and yield them for each format with its config.

    Formats that use this file name come first, since the folder may have configs of several formats.
    """
    weights = _find_weights(path)
    formats = sorted(table.FORMATS, key=lambda format: weights.name not in table.names_of_format(format))
    configs = [weights.parent / (format.CONFIG or weights.name) for format in formats]
    stamps = stamps_of(file for file in dict.fromkeys([weights, *configs]) if os.path.exists(file))
    tensors, metadata = _read_header(weights)
    for format, file in zip(formats, configs, strict=True):
        config = read_json(file) if file != weights and os.path.lexists(file) else None
        used = {path: stamp for path, stamp in stamps.items() if path in (weights, file)}
        yield format, Source(weights, tensors, metadata, config, file, used)


def _read_header(weights: Path) -> tuple[Mapping[str, TensorInfo | torch.Tensor], Mapping[str, str]]:
    """Read the tensors by name, and the metadata."""
    if weights.suffix != ".safetensors":
        return read_pickle(weights), {}
    header = read_header(weights)
    return header.tensors, header.metadata


def _find_weights(path: Path) -> Path:
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix == ".json":
            raise FormatError(f"{path}: is not a weights file; give its directory")
        if (named := format_of_file(path)) is not None:
            raise FormatError(f"{path}: is {named}; supported formats: {', '.join(table.format_names())}")
        return path
    if (weights := table.find_weights(path)) is not None:
        return weights
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:4])
        raise FormatError(f"{path}: has several possible adapter files ({names}); give the path of one of them")
    nested = sorted((file for name in table.config_names() for file in path.glob(f"*/{name}")), key=_by_number)
    expected = " or ".join(format.WEIGHTS[0] for format in table.FORMATS)
    hint = f" Did you mean {nested[-1].parent}?" if nested else f" Expected {expected}."
    for file in sorted(path.iterdir()):
        if (named := format_of_file(file)) is not None:
            raise FormatError(f"{path}: no adapter weights in this directory, but {file.name}, {named}.{hint}")
    raise FormatError(f"{path}: no adapter weights in this directory.{hint}")


def _by_number(config: Path) -> list[str | int]:
    """Return a sort key for the folder of `config` that puts checkpoint-500 before checkpoint-1000."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,9})", config.parent.name)]
