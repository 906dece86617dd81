"""The options of a command, made from the options class of its verb."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import click

from adapterkit.errors import UsageError
from adapterkit.options import Parameter, parameters

TYPES: dict[str, Any] = {"int": int, "float": float, "path": click.Path(), "paths": click.Path()}
SEVERAL = ("adapters", "words", "pairs", "weights", "paths")


class GroupedOption(click.Option):
    """An option shown under its group's heading in the help."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class Spelled(click.Choice[str]):
    """A choice with alternative spellings."""

    def __init__(self, choices: Sequence[str], spellings: Mapping[str, Any]) -> None:
        super().__init__(choices)
        self.spellings = spellings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(self.spellings.get(str(value).lower(), value), param, ctx)


def options_of(
    options: type, into: str = "given", *, negatable: bool = False, required: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add an argument or option for every field; the command gets the given ones as the keyword `into`.

    With `negatable`, each flag has a --no- form, to override a file. Without `required`, a file may have what is
    required.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        known = [one for one in parameters(options) if one.about.in_cli]

        @wraps(function)
        def parsed(**values: Any) -> None:
            asked = {one.name: _parsed(one, values.pop(one.name)) for one in known}
            values[into] = {name: value for name, value in asked.items() if value is not None}
            function(**values)

        command: Callable[..., None] = parsed
        for one in reversed(known):
            command = _added(command, one, negatable, required and one.required)
        return command

    return decorate


def _added(command: Callable[..., None], one: Parameter, negatable: bool, required: bool) -> Callable[..., None]:
    metavar = one.about.metavar
    if one.by_position:
        many = -1 if one.kind in SEVERAL else 1
        kind = TYPES.get(one.kind)
        return click.argument(one.name, nargs=many, required=required, metavar=metavar, type=kind)(command)
    presence = {"required": True} if required else {"default": None}  # with a default, click requires nothing
    settings: dict[str, Any] = {"help": one.help, "metavar": metavar, **presence}
    flags = one.flags
    if one.kind == "flag":
        if negatable or one.default is None:
            flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
        else:
            settings |= {"is_flag": True, "flag_value": not one.default}
    elif one.kind in SEVERAL:
        settings |= {"multiple": True, "metavar": _metavar(one)}
    elif one.choices and not metavar:
        settings["type"] = Spelled([str(choice) for choice in one.choices], one.about.spellings)
    elif one.kind == "int" and one.about.least is not None:
        settings["type"] = click.IntRange(one.about.least, one.about.most)
    else:
        settings["type"] = TYPES.get(one.kind)
    return click.option(*flags, one.name, cls=GroupedOption, group=one.about.group, **settings)(command)


def _metavar(one: Parameter) -> str | None:
    return one.about.metavar or ("NAME=VALUE" if one.kind == "pairs" else None)


def _parsed(one: Parameter, value: Any) -> Any:
    """Convert a given value for the verb; None if it was not given."""
    if value in (None, ()):
        return None
    if one.kind == "adapters":
        return [weighted(text) for text in value]
    if one.kind in ("pairs", "weights"):
        found: dict[str, float | str] = {}
        for text in value:
            name, setting = _pair(one, text)
            found.pop(name, None)  # a name given again counts where it was given last
            found[name] = setting
        return found
    return int(value) if one.kind == "int" else value  # click returns choices as text


def weighted(text: str) -> tuple[str, float]:
    """Parse `path:0.7` as (path, 0.7), unless a path of that whole name exists."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def _pair(one: Parameter, text: str) -> tuple[str, float | str]:
    """Parse `name=value`; numeric values become floats."""
    name, _, value = text.rpartition("=")
    if not name or not value:
        raise UsageError(f"{one.flags[0]} {text}: expected {_metavar(one)}, as in {one.about.example}")
    try:
        return name, float(value)
    except ValueError:
        return name, value


def dry_run(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--dry-run`, which every writing command has."""
    return click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and stop")(command)


def as_json(help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add `--json`, which every command has."""
    return click.option("--json", "as_json", is_flag=True, help=help)
