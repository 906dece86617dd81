"""DARE, "Language Models are Super Mario: Absorbing Abilities from Homologous Models" (arXiv 2311.03099).

`Δᵢ' = Mᵢ∘Δᵢ / p`, with each element of `Mᵢ` 1 by chance with probability p, the density, else 0: the mean stays. Then
`Δ = Σ wᵢ·Δᵢ'`, or what `ties` makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.sketch import Matrix


@method(elementwise=True)
def dare_linear(parts: Sequence[Part], *, density: Density = 0.5, seed: int) -> Matrix:
    """Drop elements by chance, rescale, add up (arXiv 2311.03099)."""
    from adapterkit.combining.elementwise import add, dropped, matrix_of

    return matrix_of(parts, [dropped(part, density, seed) for part in parts], add)


@method(elementwise=True)
def dare_ties(parts: Sequence[Part], *, density: Density = 0.5, seed: int) -> Matrix:
    """Drop elements by chance, rescale, elect signs, average."""
    from adapterkit.combining.elementwise import dropped, elect, matrix_of

    return matrix_of(parts, [dropped(part, density, seed) for part in parts], elect)
