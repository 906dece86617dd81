"""DARE, "Language Models are Super Mario: Absorbing Abilities from Homologous Models" (arXiv 2311.03099).

`Δᵢ' = Mᵢ∘Δᵢ / p`, where each element of `Mᵢ` is 1 with probability p, the density, and otherwise 0, so the mean is
unchanged. Then `Δ = Σ wᵢ·Δᵢ'`, or the Δᵢ' are merged as in `ties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.sketch import Matrix


@method(elementwise=True)
def dare_linear(parts: Sequence[Part], *, density: Density = 0.5, seed: int) -> Matrix:
    """Drop random elements, rescale, sum (arXiv 2311.03099)."""
    from adapterkit.combining.elementwise import add, dropped, matrix_of

    return matrix_of(parts, [dropped(part, density, seed) for part in parts], add)


@method(elementwise=True)
def dare_ties(parts: Sequence[Part], *, density: Density = 0.5, seed: int) -> Matrix:
    """Drop random elements, rescale, elect signs, average (arXiv 2311.03099)."""
    from adapterkit.combining.elementwise import dropped, elect, matrix_of

    return matrix_of(parts, [dropped(part, density, seed) for part in parts], elect)
