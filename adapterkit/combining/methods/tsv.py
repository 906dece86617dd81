"""TSV-Merge, "Task Singular Vectors: Reducing Task Interference in Model Merging" (arXiv 2412.00081).

With `Δᵢ = Uᵢ·Σᵢ·Vᵢᵀ`, and U and V the orthonormal matrices nearest to `[U₁ … U_T]` and `[V₁ … V_T]`,
`Δ = U·diag(w₁·Σ₁ … w_T·Σ_T)·Vᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.lowrank import Product


@method()
def tsv(parts: Sequence[Part]) -> Product:
    """Sum, with the singular vectors of all tasks made orthogonal (arXiv 2412.00081)."""
    import torch

    from adapterkit.algebra.lowrank import Product, decompose

    found = [decompose(part.delta) for part in parts]
    U = _nearest_orthogonal(torch.cat([task.U for task in found], dim=-1))
    V = _nearest_orthogonal(torch.cat([task.V for task in found], dim=-1))
    sigma = torch.cat([task.sigma * part.weight for task, part in zip(found, parts, strict=True)], dim=-1)
    return Product(U * sigma[..., None, :], V.mT)


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns: `P·Qᵀ` for a matrix `P·D·Qᵀ` (Procrustes)."""
    import torch

    found = torch.linalg.svd(matrix, full_matrices=False)
    product: torch.Tensor = found.U @ found.Vh
    return product
