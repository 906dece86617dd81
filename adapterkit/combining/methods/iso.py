"""Iso-C, "No Task Left Behind: Isotropic Model Merging" (arXiv 2502.04959).

`Σ wᵢ·Δᵢ = U·Σ·Vᵀ`, and `Δ = σ̄·U·Vᵀ` with σ̄ the mean of the nonzero singular values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method
from adapterkit.combining.methods.linear import linear

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product

NUMERICAL_RANK = 1e-7  # relative to the largest singular value; smaller ones are the rounding of float32 factors


@method()
def iso(parts: Sequence[Part]) -> Product:
    """Sum, with all singular values made equal (arXiv 2502.04959)."""
    from adapterkit.algebra.lowrank import Decomposition, decompose

    found = decompose(linear(parts))
    nonzero = found.sigma > NUMERICAL_RANK * found.sigma[..., :1]
    mean = (found.sigma * nonzero).sum(-1, keepdim=True) / nonzero.sum(-1, keepdim=True).clamp(min=1)
    return Decomposition(found.U, mean * nonzero, found.V).first(found.sigma.shape[-1])
