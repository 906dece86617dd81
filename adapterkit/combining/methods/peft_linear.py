"""PEFT's `linear`, for the same results: `B = Σ √|sᵢwᵢ|·Bᵢ`, `A = Σ ±√|sᵢwᵢ|·Aᵢ`, and `Δ = B·A`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method
from adapterkit.errors import FitError

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product


@method()
def peft_linear(parts: Sequence[Part]) -> Product:
    """Sum A and B separately, as PEFT's linear does (adds cross terms).

    The cross terms `Bᵢ·Aⱼ` were not learned by any adapter. Raises FitError if ranks differ.
    """
    import torch

    from adapterkit.algebra.lowrank import Product

    ranks = {part.factors.rank for part in parts}
    if len(ranks) > 1:
        raise FitError(f"peft_linear needs adapters of equal rank, found {sorted(ranks)}", hint="use linear")
    left = right = torch.zeros(())
    for part in parts:
        strength = part.scaling * part.weight
        root = strength.abs().sqrt()[:, None, None]
        left = left + root * part.factors.left
        right = right + strength.sign()[:, None, None] * root * part.factors.right
    return Product(left, right)
