"""Methods to combine adapters: one file per formula, and nothing else in this folder."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from adapterkit.combining.method import Method, Option

DEFAULT = "linear"

# Name -> method, from every file of this folder, the default's file first.
METHODS: dict[str, Method[..., Any]] = {
    method.name: method
    for name in sorted((module.name for module in iter_modules(__path__)), key=lambda name: name != DEFAULT)
    for method in vars(import_module(f"{__name__}.{name}")).values()
    if isinstance(method, Method)
}


def all_options() -> dict[Option, list[str]]:
    """Every option of a method, with the names of the methods that take it."""
    found: dict[Option, list[str]] = {}
    for method in METHODS.values():
        for option in method.options.values():
            found.setdefault(option, []).append(method.name)
    return found
