"""Modules that PEFT's config leaves out although the file has their tensors, which PEFT ignores.

Source: `check_target_module_exists` of huggingface/peft 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from adapterkit.adapter.safe_regex import check_effort, compile_pattern
from adapterkit.adapter.weights import Problem

REMEDY = "remove these modules from the field if they are to be merged, or their tensors from the file if not"


def left_out(modules: Collection[str], config: Mapping[str, Any], file: str) -> Iterator[Problem]:
    """Yield the fields of `config`, read from `file`, that leave out some of the `modules`."""
    for field, names in (
        ("exclude_modules", _excluded(modules, config)),
        ("layers_to_transform", _layers(modules, config)),
    ):
        if found := list(names):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            yield Problem(f"{file}: {field}", f"leaves out {found[0]}{more}, which PEFT ignores", remedy=REMEDY)


def _excluded(modules: Collection[str], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules that `exclude_modules` names: by a pattern for whole names, or by suffixes."""
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        matcher = compile_pattern(excluded)
        check_effort([matcher], modules)
        yield from filter(matcher.matches, modules)
        return
    suffixes = tuple(f".{name}" for name in excluded)
    yield from (name for name in modules if f".{name}".endswith(suffixes))


def _layers(modules: Collection[str], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the modules whose first index, or the one after `layers_pattern`, is not in `layers_to_transform`."""
    layers, targets = config.get("layers_to_transform"), config.get("target_modules")
    if layers is None or layers == [] or not isinstance(targets, list):
        return
    wanted, patterns = layers if isinstance(layers, list) else [layers], config.get("layers_pattern") or []
    plain = [re.escape(name) for name in ([patterns] if isinstance(patterns, str) else patterns)]
    before = "|".join(rf"(?:^|.*?\.){name}" for name in plain) or r".*?\.[^.]*"
    index = re.compile(rf"(?:{before})\.(\d+)\.")
    for name in modules:
        found = index.match(name)
        if name not in targets and not (found and int(found[1]) in wanted):
            yield name
