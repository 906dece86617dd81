"""Ways to combine the Δs of one module: each a function of low-rank parts, its paper above it.

Those of `METHODS` give a product of factors, by matrices no larger than rank × in. Those of `elementwise.METHODS` look
at every element of Δ, so their result has no low rank, and is approximated afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapterkit.algebra.lowrank import Decomposition, Product, added, decompose, signs_of
from adapterkit.combining.methods import Options
from adapterkit.combining.methods.elementwise import ties, trim
from adapterkit.errors import FitError

NUMERICAL_RANK = 1e-7  # of the greatest singular value; below it is the rounding of float32 factors


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's share in a module, batched over modules of one shape: `Δ = scaling · left · right`, weighted."""

    factors: Product
    scaling: torch.Tensor  # (batch,)
    weight: float

    @property
    def delta(self) -> Product:
        """Δ, not weighted."""
        return self.factors.times(self.scaling)


Combine = Callable[[Sequence[Part], Options], Product]


def linear(parts: Sequence[Part], _: Options) -> Product:
    """`Σ wᵢ·Δᵢ`, exactly."""
    return added([part.delta.times(part.weight) for part in parts])


def peft_linear(parts: Sequence[Part], _: Options) -> Product:
    """PEFT's `linear`: A's and B's are summed apart, which brings cross terms `Bᵢ·Aⱼ` that no adapter has learned."""
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


def knots(parts: Sequence[Part], options: Options) -> Product:
    """KnOTS (arXiv 2410.19735): `[Δ₁ … Δ_T] = U·Σ·[V₁ … V_T]ᵀ`, the Vs merged elementwise, `Δ = U·Σ·Vᵀ`."""
    deltas = [part.delta for part in parts]
    left = torch.linalg.qr(torch.cat([delta.left for delta in deltas], dim=-1))
    cores = [R @ delta.right for R, delta in zip(left.R.split([d.rank for d in deltas], -1), deltas, strict=True)]
    rows = torch.linalg.qr(torch.cat(cores, dim=-1).mT)  # of all tasks' inputs
    core = torch.linalg.svd(rows.R.mT, full_matrices=False)
    columns = deltas[0].right.shape[-1]
    aligned = (rows.Q @ core.Vh.mT).split(columns, dim=-2)
    merged = _inner(aligned, parts, options)
    return Product(left.Q @ core.U * core.S[..., None, :], merged.mT)


def core(parts: Sequence[Part], options: Options) -> Product:
    """Core Space (arXiv 2509.17786): `M_t = U_Bᵀ·Δ_t·V_A` in the bases of all Bs and all As, merged elementwise."""
    deltas = [part.delta for part in parts]
    U = _left_vectors(torch.cat([delta.left for delta in deltas], dim=-1))
    V = _left_vectors(torch.cat([delta.right for delta in deltas], dim=-2).mT)
    cores = [(U.mT @ delta.left) @ (delta.right @ V) for delta in deltas]
    return Product(U @ _inner(cores, parts, options), V.mT)


def tsv(parts: Sequence[Part], _: Options) -> Product:
    """TSV-Merge (arXiv 2412.00081): the singular vectors of all tasks, made orthogonal to each other."""
    found = [decompose(part.delta) for part in parts]
    U, V = (_nearest_orthogonal(torch.cat([getattr(one, name) for one in found], dim=-1)) for name in "UV")
    sigma = torch.cat([one.sigma * part.weight for one, part in zip(found, parts, strict=True)], dim=-1)
    return Product(U * sigma[..., None, :], V.mT)


def iso(parts: Sequence[Part], options: Options) -> Product:
    """Iso-C (arXiv 2502.04959): `Σ wᵢ·Δᵢ = U·Σ·Vᵀ` with every singular value made their mean."""
    found = decompose(linear(parts, options))
    there = found.sigma > NUMERICAL_RANK * found.sigma[..., :1]
    mean = (found.sigma * there).sum(-1, keepdim=True) / there.sum(-1, keepdim=True).clamp(min=1)
    return Decomposition(found.U, mean * there, found.V).first(found.sigma.shape[-1])


def _inner(aligned: Sequence[torch.Tensor], parts: Sequence[Part], options: Options) -> torch.Tensor:
    """Merge matrices of one basis by the inner method."""
    weighted = [part.weight * one for one, part in zip(aligned, parts, strict=True)]
    if options["inner"] == "linear":
        return torch.stack(weighted).sum(0)
    return ties([trim(one, float(options["density"])) for one in weighted])


def _left_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """Left singular vectors of a tall matrix."""
    Q, R = torch.linalg.qr(matrix)
    vectors: torch.Tensor = Q @ torch.linalg.svd(R, full_matrices=False).U
    return vectors * signs_of(vectors)


def _nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """`P·Qᵀ` of `P·D·Qᵀ`: orthonormal columns, as near as can be (Procrustes)."""
    found = torch.linalg.svd(matrix, full_matrices=False)
    product: torch.Tensor = found.U @ found.Vh
    return product


METHODS: dict[str, Combine] = {
    "linear": linear, "svd": linear, "cat": linear, "knots": knots, "core": core, "tsv": tsv, "iso": iso,
    "peft_linear": peft_linear,
}  # fmt: skip
