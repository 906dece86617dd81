"""The formats there are, and the questions that are asked of all of them: names of files, whose a config is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from adapterkit.adapter.formats import peft
from adapterkit.adapter.formats.format import ConfigFacts, Format
from adapterkit.errors import UsageError
from adapterkit.files.jsonfile import read_json

# A file is read by the first whose `detect` says yes, those first that know its name; a config is described by the
# first whose `describe_config` answers.
FORMATS: tuple[Format, ...] = (peft,)
DEFAULT = peft.NAME  # what is written unless another is asked for


def format_named(name: str) -> Format:
    """The format that is called `name`. Raises UsageError where there is none."""
    for format in FORMATS:
        if name == format.NAME:
            return format
    raise UsageError(f"unsupported adapter format {name!r}; expected one of {', '.join(format_names())}")


def format_names() -> list[str]:
    return [format.NAME for format in FORMATS]


def config_names() -> tuple[str, ...]:
    """The names of the configs of all formats."""
    return tuple(dict.fromkeys(format.CONFIG for format in FORMATS if format.CONFIG))


def pickled_names() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for format in FORMATS for name in format.PICKLED))


def weights_names() -> tuple[str, ...]:
    """The names of the weights files of all formats, best first: pickles last."""
    safe = dict.fromkeys(name for format in FORMATS for name in format.WEIGHTS)
    return (*safe, *(name for name in pickled_names() if name not in safe))


def weights_suffixes() -> tuple[str, ...]:
    """The suffixes of weights files, as in `.safetensors`."""
    return tuple(dict.fromkeys(PurePath(name).suffix for name in weights_names()))


def names_of(format: Format) -> tuple[str, ...]:
    """The names of a format's files, its weights first."""
    return *format.WEIGHTS, *format.PICKLED, *([format.CONFIG] if format.CONFIG else [])


def file_names() -> tuple[str, ...]:
    """The names of the files of all formats, weights first."""
    return *weights_names(), *config_names()


def are_adapter(names: Iterable[str]) -> bool:
    """Whether the files called `names`, of one folder, are an adapter or part of one."""
    return not set(file_names()).isdisjoint(names)


def find_weights(folder: Path) -> Path | None:
    """The weights file in `folder` that has the best name, or None."""
    return next((folder / name for name in weights_names() if (folder / name).is_file()), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config in `folder` as it stands there, empty where there is none."""
    return next((config for _, config in _configs(folder)), {})


def describe_config(folder: Path) -> ConfigFacts:
    """What the adapter's config in `folder` says, without the weights."""
    for name, config in _configs(folder):
        if (format := format_of_config(name, config)) and (facts := format.describe_config(config)):
            return facts
    return ConfigFacts()


def format_of_config(name: str, config: Mapping[str, Any]) -> Format | None:
    """The format that a config called `name` belongs to."""
    of_name = (format for format in FORMATS if name == format.CONFIG)
    return next((format for format in of_name if format.describe_config(config) is not None), None)


def _configs(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The configs in `folder`, each read when it comes: a later one may be broken, or of something else."""
    return ((name, read_json(folder / name)) for name in config_names() if os.path.lexists(folder / name))
