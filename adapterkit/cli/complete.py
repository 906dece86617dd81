"""Shell completion of paths, ids in the Hub cache, and methods."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

MODELS = {
    "adapter", "adapters", "against", "base", "finetuned", "ids", "init_from", "initial", "merged", "original", "path",
    "paths",
}  # fmt: skip


class Model(click.types.StringParamType):
    """A path, or the id of a repository in the Hub cache."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from adapterkit.hub.names import names_in_cache

        if not _is_path_prefix(incomplete):
            names = [name for name in names_in_cache() if name.startswith(incomplete)]
            if names:
                return [CompletionItem(name) for name in names]
        return [CompletionItem(incomplete, type="file")]


class Method(click.types.StringParamType):
    """A method of combine."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from adapterkit.combining.methods import METHODS

        return [
            CompletionItem(name, help=method.help) for name, method in METHODS.items() if name.startswith(incomplete)
        ]


MODEL = Model()
TYPES: dict[str, Any] = dict.fromkeys(MODELS, MODEL)
TYPES |= {"method": Method()} | dict.fromkeys(("data", "eval_data"), click.Path())


def complete_by_name(params: Iterable[click.Parameter]) -> None:
    """Set the completion of text parameters by their names."""
    for param in params:
        if param.name in TYPES and isinstance(param.type, click.types.StringParamType):
            param.type = TYPES[param.name]


def _is_path_prefix(text: str) -> bool:
    """Whether a path on this disk starts with `text`."""
    folder, begin = os.path.split(os.path.expanduser(text))
    try:
        return any(name.startswith(begin) for name in os.listdir(folder or "."))
    except OSError:
        return False
