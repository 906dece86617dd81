"""KnOTS, "Model merging with SVD to tie the Knots" (arXiv 2410.19735).

`[Δ₁ … Δ_T] = U·Σ·[V₁ … V_T]ᵀ`: the `Vᵢ` of the tasks are merged elementwise to `V`, and `Δ = U·Σ·Vᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Inner, Part, method

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product


@method()
def knots(parts: Sequence[Part], *, inner: Inner = "ties", density: Density = 0.5) -> Product:
    """Merge in the common basis of the updates (arXiv 2410.19735)."""
    import torch

    from adapterkit.algebra.lowrank import Product
    from adapterkit.combining.elementwise import merge_aligned

    deltas = [part.delta for part in parts]
    left = torch.linalg.qr(torch.cat([delta.left for delta in deltas], dim=-1))
    cores = [R @ delta.right for R, delta in zip(left.R.split([d.rank for d in deltas], -1), deltas, strict=True)]
    rows = torch.linalg.qr(torch.cat(cores, dim=-1).mT)
    core = torch.linalg.svd(rows.R.mT, full_matrices=False)
    columns = deltas[0].right.shape[-1]
    aligned = (rows.Q @ core.Vh.mT).split(columns, dim=-2)
    merged = merge_aligned(aligned, [part.weight for part in parts], inner, density)
    return Product(left.Q @ core.U * core.S[..., None, :], merged.mT)
