"""A method in one file: an example for CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from adapterkit.combining.method import Part, Range, method

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product


@method(biases=True)
def powered(
    parts: Sequence[Part],
    *,
    power: Annotated[float, Range(0, 9), "Exponent of the weights"] = 2.0,
    repeat: Annotated[int, Range(0, 4), "Factor of the sum"] = 1,
    sign: Annotated[Literal["positive", "negative"], "Sign of the sum"] = "positive",
) -> Product:
    """Sum with powers of the weights."""
    from adapterkit.algebra.lowrank import added

    strength = repeat * (1 if sign == "positive" else -1)
    return added([part.delta.times(strength * part.weight**power) for part in parts])
