"""PEFT's `linear`, for results that have to be its own: `B = Σ √|sᵢwᵢ|·Bᵢ`, `A = Σ ±√|sᵢwᵢ|·Aᵢ`, and `Δ = B·A`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterkit.combining.method import Part, method
from adapterkit.errors import FitError

if TYPE_CHECKING:
    from adapterkit.algebra.lowrank import Product


@method()
def peft_linear(parts: Sequence[Part]) -> Product:
    """Sum A's and B's apart, as PEFT's linear does: with cross terms.

    They are `Bᵢ·Aⱼ`, which no adapter has learned. Raises FitError where ranks differ.
    """
    import torch

    from adapterkit.algebra.lowrank import Product

    ranks = {part.factors.rank for part in parts}
    if len(ranks) > 1:
        raise FitError(f"peft_linear adds factors of one rank, and these have {sorted(ranks)}; linear takes any")
    left = right = torch.zeros(())
    for part in parts:
        strength = part.scaling * part.weight
        root = strength.abs().sqrt()[:, None, None]
        left = left + root * part.factors.left
        right = right + strength.sign()[:, None, None] * root * part.factors.right
    return Product(left, right)
