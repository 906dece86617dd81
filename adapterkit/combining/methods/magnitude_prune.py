"""Pruning by magnitude: `Δ = Σ wᵢ·Δᵢ'`, where Δᵢ' is Δᵢ with all but its largest elements set to zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.sketch import Matrix


@method(elementwise=True)
def magnitude_prune(parts: Sequence[Part], *, density: Density = 0.5) -> Matrix:
    """Trim small elements, sum."""
    from adapterkit.combining.elementwise import add, matrix_of, trimmed

    return matrix_of(parts, [trimmed(part, density) for part in parts], add)
