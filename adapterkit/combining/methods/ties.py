"""TIES, "TIES-Merging: Resolving Interference When Merging Models" (arXiv 2306.01708).

`Δᵢ'` is Δᵢ with all but its largest elements set to zero, and `γ = sign(Σ wᵢ·Δᵢ')` are the elected signs. Each element
of Δ is the mean of the `wᵢ·Δᵢ'` that have the elected sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.sketch import Matrix


@method(elementwise=True)
def ties(parts: Sequence[Part], *, density: Density = 0.5) -> Matrix:
    """Trim small elements, elect signs, average (arXiv 2306.01708)."""
    from adapterkit.combining.elementwise import elect, matrix_of, trimmed

    return matrix_of(parts, [trimmed(part, density) for part in parts], elect)
