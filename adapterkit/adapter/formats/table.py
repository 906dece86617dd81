"""The table of formats, and lookups across all of them: file names, and the format of a config."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from adapterkit.adapter.formats import peft
from adapterkit.adapter.formats.format import ConfigFacts, Format
from adapterkit.errors import UsageError
from adapterkit.files.jsonfile import read_json

# A file is read by the first format whose `detect` accepts it, starting with those that use its name; a config is
# described by the first whose `describe_config` accepts it.
FORMATS: tuple[Format, ...] = (peft,)
DEFAULT = peft.NAME  # for writing


def get_format(name: str) -> Format:
    """Return the format named `name`; raises UsageError if there is none."""
    for format in FORMATS:
        if name == format.NAME:
            return format
    raise UsageError(f"unsupported adapter format {name!r}; expected one of {', '.join(format_names())}")


def format_names() -> list[str]:
    return [format.NAME for format in FORMATS]


def config_names() -> tuple[str, ...]:
    """Return the config names of all formats."""
    return tuple(dict.fromkeys(format.CONFIG for format in FORMATS if format.CONFIG))


def pickled_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for format in FORMATS for name in format.PICKLED))


def weights_names() -> tuple[str, ...]:
    """Return the weights file names of all formats in order of preference, pickles last."""
    safe = dict.fromkeys(name for format in FORMATS for name in format.WEIGHTS)
    return (*safe, *(name for name in pickled_names() if name not in safe))


def weights_suffixes() -> tuple[str, ...]:
    """Return the suffixes of weights files, such as `.safetensors`."""
    return tuple(dict.fromkeys(PurePath(name).suffix for name in weights_names()))


def names_of_format(format: Format) -> tuple[str, ...]:
    """Return the file names of a format, weights first."""
    return *format.WEIGHTS, *format.PICKLED, *([format.CONFIG] if format.CONFIG else [])


def file_names() -> tuple[str, ...]:
    """Return the file names of all formats, weights first."""
    return *weights_names(), *config_names()


def has_adapter_file(names: Iterable[str]) -> bool:
    """Return whether any of the file `names` of a folder belongs to an adapter."""
    return not set(file_names()).isdisjoint(names)


def find_weights(folder: Path) -> Path | None:
    """Return the weights file in `folder` with the preferred name, or None."""
    return next((folder / name for name in weights_names() if (folder / name).is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the adapter's config in `folder`; empty if there is none."""
    return next((config for _, config in _configs(folder)), {})


def describe_config(folder: Path) -> ConfigFacts:
    """Return the facts in the adapter's config in `folder`, without reading the weights."""
    for name, config in _configs(folder):
        if (format := format_of_config(name, config)) and (facts := format.describe_config(config)):
            return facts
    return ConfigFacts()


def format_of_config(name: str, config: Mapping[str, Any]) -> Format | None:
    """Return the format of a config named `name`."""
    same_name = (format for format in FORMATS if name == format.CONFIG)
    return next((format for format in same_name if format.describe_config(config) is not None), None)


def _configs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the configs in `folder` lazily, since a later one may be corrupt or of another tool."""
    return ((name, read_json(folder / name)) for name in config_names() if os.path.lexists(folder / name))
