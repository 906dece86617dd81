"""What a module's dotted name says: its layer and its target."""

from __future__ import annotations

from functools import lru_cache

NAMES = 1 << 15  # that are remembered: the adapters of one base have the same


@lru_cache(NAMES)
def layer_of(name: str) -> int | None:
    """The first number in a dotted path."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@lru_cache(NAMES)
def target_of(name: str) -> str:
    """The last part of a path that is no number; what PEFT nests under base_layer stays apart from its wrapper."""
    parts = [part for part in name.split(".") if not part.isdecimal()] or [name]
    last = max((at for at, part in enumerate(parts) if part != "base_layer"), default=0)
    return ".".join(parts[last:])
