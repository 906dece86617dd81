"""The layer and the target in a module's dotted name."""

from __future__ import annotations

from functools import lru_cache

NAMES = 1 << 15  # names to cache, since the adapters of a base share them


@lru_cache(NAMES)
def layer_of(name: str) -> int | None:
    """Return the layer number, the first number in a dotted name; None without one."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


@lru_cache(NAMES)
def target_of(name: str) -> str:
    """Return the last segment that is not a number; of a parameter named weight or bias, with its module's segment."""
    parts = [part for part in name.split(".") if not part.isdecimal()] or [name]
    return ".".join(parts[-2 if parts[-1] in ("weight", "bias") else -1 :])
