"""How versions of PEFT store the factors of stacked experts."""

from __future__ import annotations

import re


def adds_transposed(version: str | None, marked: bool | None) -> bool | None:
    """Return whether this version of PEFT adds the Δ = B·A of an expert transposed; None if that is unknown.

    PEFT 0.17 and 0.18 always do, 0.19.0 unless transformers has `marked` the experts with `is_transposed`, and later
    ones if it has. Builds between releases can be either.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
    if version is None or found is None:
        return None
    number = tuple(map(int, found.groups()))
    if "dev" in version and (0, 18, 2) <= number <= (0, 19, 1):
        return None
    if number < (0, 19, 0):
        return True
    return None if marked is None else marked != (number == (0, 19, 0))
