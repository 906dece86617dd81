"""Recipes of commands: YAML files that hold the options of a verb, by their names in Python.

base: HuggingFaceTB/SmolLM2-135M-Instruct
adapters: {sql: 0.7, chat: 0.3}
weights: {"sql:layers.0-9": 0.3}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adapterkit.cli.options import weighted
from adapterkit.errors import FormatError, UsageError
from adapterkit.files.opening import read_whole
from adapterkit.files.yamlfile import MAX_YAML, Lines, parse_with_lines
from adapterkit.options import Parameter, parameters
from adapterkit.text import nearest

MERGEKIT = ("base_model", "merge_method", "models", "modules", "slices")  # keys of mergekit's files
PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "flag": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
}

recipe_option = click.option(
    "--recipe", type=click.Path(), metavar="FILE",
    help="Read arguments and options from this YAML file; those given here override it",
)  # fmt: skip


def with_recipe(given: Mapping[str, Any], recipe: str | None, options: type) -> dict[str, Any]:
    """The values for an options class: those of a recipe, overridden by those `given` on the command line.

    Raises click.MissingParameter if neither has a required one.
    """
    known = {one.name: one for one in parameters(options) if one.about.in_cli}
    values = {**(read_recipe(Path(recipe), known) if recipe is not None else {}), **given}
    context = click.get_current_context()
    for param in context.command.params:
        if param.name in known and known[param.name].required and param.name not in values:
            name = f"'{param.metavar or param.human_readable_name}'" if isinstance(param, click.Argument) else None
            raise click.MissingParameter(ctx=context, param=param, param_hint=name)
    return values


def read_recipe(file: Path, known: Mapping[str, Parameter]) -> dict[str, Any]:
    """Read the values of `known` parameters, as the command line would give them.

    Raises FormatError for invalid YAML, and UsageError, with the line, for an unknown key or a value of the wrong type.
    """
    try:
        values, lines = parse_with_lines(read_whole(file, 4 * MAX_YAML).decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{file}: expected keys and values, such as `base: model`")
    reader, found = _Reader(str(file), lines), dict[str, Any]()
    for key, value in values.items():
        parameter = reader.parameter(key, known)
        if parameter.name in found:
            raise UsageError(f"{reader.where(key)}: {key} and {parameter.name} are the same key")
        found[parameter.name] = reader.value(parameter, key, value)
    return found


@dataclass(frozen=True)
class _Reader:
    """Reads values of a recipe; each is at a path of keys and indices, which `lines` maps to a line."""

    file: str
    lines: Lines

    def where(self, *at: Any) -> str:
        return f"{self.file}:{self.lines.get(at, 1)}"  # a key that is NaN is found nowhere

    def wrong(self, at: tuple[Any, ...], value: object, expected: str) -> UsageError:
        name = ": ".join(str(key)[:60] for key in at if not isinstance(key, int))
        return UsageError(f"{self.where(*at)}: {name}: found {str(value)[:60]!r}, expected {expected}")

    def parameter(self, key: object, known: Mapping[str, Parameter]) -> Parameter:
        """The parameter that a key names."""
        name = str(key)[:60]
        if (plain := name.replace("-", "_")) in known:
            return known[plain]
        options = {flag.lstrip("-"): one.name for one in known.values() for flag in one.flags}
        hint = f"did you mean {options[name]}?" if name in options else nearest(plain, known)
        if name in MERGEKIT:
            hint = "this is a key of mergekit; adapterkit takes the arguments of its Python call"
        raise UsageError(f"{self.where(key)}: unknown key {name!r}", hint=hint)

    def value(self, parameter: Parameter, key: object, value: Any) -> Any:
        """A value, checked and in the form that the verb takes."""
        if parameter.kind == "adapters":
            return list(self.adapters((key,), value))
        if parameter.kind in ("pairs", "weights"):
            if not isinstance(value, dict):
                raise self.wrong((key,), value, "names and values")
            return {str(name): self.setting(parameter, (key, name), one) for name, one in value.items()}
        types, expected = PLAIN.get(parameter.kind, ((str,), "text"))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.wrong((key,), value, expected)
        try:
            return parameter.checked(value)
        except UsageError as error:
            raise UsageError(f"{self.where(key)}: {error.args[0]}", hint=error.hint) from error

    def adapters(self, at: tuple[Any, ...], value: Any) -> Iterator[tuple[str, float]]:
        """Adapters and weights: `path:0.7`, a mapping of paths to weights, or a list of these."""
        if isinstance(value, str):
            yield weighted(value)
        elif isinstance(value, dict):
            yield from ((str(path), self.number((*at, path), weight)) for path, weight in value.items())
        elif isinstance(value, list):
            for index, one in enumerate(value):
                if isinstance(one, list):
                    raise self.wrong((*at, index), one, "an adapter, such as `path:0.7`")
                yield from self.adapters((*at, index), one)
        else:
            raise self.wrong(at, value, "an adapter, such as `path:0.7`, or a list of them")

    def setting(self, parameter: Parameter, at: tuple[Any, ...], value: Any) -> float | str:
        if isinstance(value, str) and parameter.kind == "pairs" and not _is_number(value):
            return value
        return self.number(at, value)

    def number(self, at: tuple[Any, ...], value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str) or not _is_number(value):
            raise self.wrong(at, value, "a number")
        return float(value)


def _is_number(value: float | str) -> bool:
    """Whether a value is a number, or text such as `1e-4`, which YAML 1.1 does not read as one."""
    try:
        float(value)
    except (ValueError, OverflowError):
        return False
    return True
