"""Iso-C, "No Task Left Behind: Isotropic Model Merging" (arXiv 2502.04959).

`Σ wᵢ·Δᵢ = U·Σ·Vᵀ`, and `Δ = σ̄·U·Vᵀ` with σ̄ the mean of the singular values that are not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method
from adapterkit.combining.methods.linear import linear

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product

NUMERICAL_RANK = 1e-7  # of the greatest singular value; below it is the rounding of float32 factors


@method()
def iso(parts: Sequence[Part]) -> Product:
    """Make all singular values of the sum equal (arXiv 2502.04959)."""
    from adapterkit.algebra.lowrank import Decomposition, decompose

    found = decompose(linear(parts))
    there = found.sigma > NUMERICAL_RANK * found.sigma[..., :1]
    mean = (found.sigma * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return Decomposition(found.U, mean * there, found.V).first(found.sigma.shape[-1])
