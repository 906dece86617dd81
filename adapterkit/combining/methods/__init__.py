"""The ways to combine adapters: a file for each method, or for several of one formula, and nothing else in here."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from adapterkit.combining.method import Method, Option
from adapterkit.errors import UsageError

DEFAULT = "linear"

# Method -> what it does, found in the files of this folder, the default's first.
METHODS: dict[str, Method[..., Any]] = {
    method.name: method
    for name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: name != DEFAULT)
    for method in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(method, Method)
}


def all_options() -> dict[Option, list[str]]:
    """Every option, with the names of the methods that have it."""
    found: dict[Option, list[str]] = {}
    for method in METHODS.values():
        for option in method.options.values():
            found.setdefault(option, []).append(method.name)
    return found


def method_named(name: str) -> Method[..., Any]:
    """The method of that name. Raises UsageError where there is none, with the nearest."""
    if name in METHODS:
        return METHODS[name]
    near = get_close_matches(name, METHODS, 1)
    meant = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(METHODS)}"
    raise UsageError(f"method {name!r}: {meant}")
