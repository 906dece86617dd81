"""Core Space, "Accurate and Efficient Low-Rank Model Merging in Core Space" (arXiv 2509.17786).

With U a basis of all Bs and V a basis of all As, `Mᵢ = Uᵀ·Δᵢ·V` is lossless. The Mᵢ are merged elementwise to `M`, and
`Δ = U·M·Vᵀ`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Density, Inner, Part, method

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.lowrank import Product


@method()
def core(parts: Sequence[Part], *, inner: Inner = "ties", density: Density = 0.5) -> Product:
    """Merge in the factors' common bases (arXiv 2509.17786)."""
    import torch

    from adapterkit.algebra.lowrank import Product
    from adapterkit.combining.elementwise import merge_aligned

    deltas = [part.delta for part in parts]
    U = _left_vectors(torch.cat([delta.left for delta in deltas], dim=-1))
    V = _left_vectors(torch.cat([delta.right for delta in deltas], dim=-2).mT)
    cores = [(U.mT @ delta.left) @ (delta.right @ V) for delta in deltas]
    return Product(U @ merge_aligned(cores, [part.weight for part in parts], inner, density), V.mT)


def _left_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """Left singular vectors of a tall matrix."""
    import torch

    from adapterkit.algebra.lowrank import signs_of

    Q, R = torch.linalg.qr(matrix)
    vectors: torch.Tensor = Q @ torch.linalg.svd(R, full_matrices=False).U
    return vectors * signs_of(vectors)
