"""The weighted sum of the updates, `Δ = Σ wᵢ·Δᵢ`: exact at the total rank, or truncated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product


@method(biases=True)
def linear(parts: Sequence[Part]) -> Product:
    """Weighted sum, exact unless a limit is given."""
    from adapterkit.algebra.lowrank import added

    return added([part.delta.times(part.weight) for part in parts])


@method("always", biases=True)
def svd(parts: Sequence[Part]) -> Product:
    """Weighted sum, truncated to the highest rank among the adapters."""
    return linear(parts)


@method("never", biases=True)
def cat(parts: Sequence[Part]) -> Product:
    """Weighted sum, never truncated."""
    return linear(parts)
