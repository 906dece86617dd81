"""Exact algebra on low-rank factors, without forming `Δ = scaling · B · A` as an out×in matrix. CPU or GPU.

With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, `Δ = Q_B (scaling · R_B R_Aᵀ) Q_Aᵀ`: the singular values of Δ are those of the
core between the orthogonal factors, at most rank × rank. A float32 Gram matrix would lose every value below 3e-4 of the
largest; QR preserves them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.adapter.weights import LoraWeights

Weights = LoraWeights[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Product:
    """`Δ = left · right`, float64: `left (…, out, rank)`, `right (…, rank, in)`; leading dimensions are a batch."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, weights: Weights) -> Product:
        """`B · A` without the scaling: a batch over the experts, of one if they are not stacked."""
        A, B = _by_expert(weights)
        return cls(B.double(), A.double())

    @property
    def rank(self) -> int:
        return self.left.shape[-1]

    @property
    def max_rank(self) -> int:
        """The maximum rank of a matrix of this shape."""
        return min(self.left.shape[-2], self.right.shape[-1])

    def times(self, factor: torch.Tensor | float) -> Product:
        """`factor · Δ`, with one factor or one per batch element."""
        if isinstance(factor, torch.Tensor):
            factor = factor[..., None, None]
        return Product(self.left * factor, self.right)

    def padded(self, rank: int) -> Product:
        """The same Δ with its factors zero-padded to `rank`."""
        more = rank - self.rank
        left = torch.nn.functional.pad(self.left, (0, more))
        return Product(left, torch.nn.functional.pad(self.right, (0, 0, 0, more)))


@dataclass(frozen=True, slots=True)
class Decomposition:
    """`Δ = U · diag(sigma) · Vᵀ`, float64: `U (…, out, k)`, `sigma (…, k)` largest first, `V (…, in, k)`."""

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor

    def __getitem__(self, index: slice) -> Decomposition:
        """A slice of the batch."""
        return Decomposition(self.U[index], self.sigma[index], self.V[index])

    def first(self, rank: int) -> Product:
        """The best rank-`rank` approximation (Eckart and Young, 1936), with factors of equal norm."""
        root = self.sigma[..., :rank].sqrt()
        return Product(self.U[..., :rank] * root[..., None, :], (self.V[..., :rank] * root[..., None, :]).mT)


def added(products: Sequence[Product]) -> Product:
    """The exact sum of Δs of one shape: factors are concatenated, ranks add up."""
    return Product(
        torch.cat([product.left for product in products], dim=-1),
        torch.cat([product.right for product in products], dim=-2),
    )


def decompose(product: Product) -> Decomposition:
    """The singular value decomposition of Δ, from its rank × rank core."""
    left, right = torch.linalg.qr(product.left), torch.linalg.qr(product.right.mT)
    core = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    U, V = left.Q @ core.U, right.Q @ core.Vh.mT
    sign = signs_of(U)
    return Decomposition(U * sign, core.S, V * sign)


def signs_of(vectors: torch.Tensor) -> torch.Tensor:
    """The sign per column that makes its largest element positive, for the same result on every machine."""
    largest = vectors.gather(-2, vectors.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)


def stacked(parts: Sequence[Decomposition]) -> Decomposition:
    """Stack decompositions of matrices of one shape into a batch, zero-padded to the same number of values."""
    width = max(part.sigma.shape[-1] for part in parts)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))

    return Decomposition(*(torch.stack([wide(getattr(part, name)) for part in parts]) for name in ("U", "sigma", "V")))


def inner(one: Product, other: Product) -> torch.Tensor:
    """`⟨Δ₁, Δ₂⟩ = Σ (B₁ᵀB₂) ∘ (A₁A₂ᵀ)`, per batch element."""
    products: torch.Tensor = (one.left.mT @ other.left) * (one.right @ other.right.mT)
    return products.sum(dim=(-2, -1))


def overlaps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`φ(i, j) = ‖U₁[:, :i]ᵀ·U₂[:, :j]‖_F² / min(i, j)` for every i and j (arXiv 2106.09685, equation 4).

    `one (…, n, k)` and `other (…, n, l)` have orthonormal columns; the result is `(…, k, l)`, between 0 and 1.
    """
    sums = (one.mT @ other).square().cumsum(-2).cumsum(-1)
    i, j = (torch.arange(1, size + 1, device=one.device) for size in (one.shape[-1], other.shape[-1]))
    found: torch.Tensor = sums / torch.minimum(i[:, None], j)
    return found


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one Δ, largest first, and statistics of them.

    If all are zero (an untrained B), ranks are 0; if one is NaN, every statistic is NaN.
    """

    sigma: tuple[float, ...]

    @property
    def frobenius(self) -> float:
        """`‖Δ‖_F = √Σσᵢ²`."""
        return math.hypot(*self.sigma)

    @property
    def spectral(self) -> float:
        """`‖Δ‖₂ = σ₁`."""
        return self.sigma[0]

    @property
    def top_share(self) -> float:
        """`σ₁ / Σσ`, 1 for a single direction; 0 if all values are zero."""
        total = sum(self._ratios())
        return 1 / total if total else 0.0

    @property
    def stable_rank(self) -> float:
        """`‖Δ‖_F² / σ₁²`, between 1 and the rank."""
        return sum(ratio**2 for ratio in self._ratios())

    @property
    def effective_rank(self) -> float:
        """`exp(H(p))` with `p = σ / Σσ` and H the entropy in nats (Roy and Vetterli, 2007)."""
        ratios = self._ratios()
        total = sum(ratios)
        shares = [ratio / total for ratio in ratios if ratio != 0]
        return math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0

    def energy_rank(self, share: float) -> int | None:
        """The smallest k with `σ₁² + … + σ_k² ≥ share · ‖Δ‖_F²`; None if a value is NaN."""
        energies = [ratio**2 for ratio in self._ratios()]
        wanted, reached = share * sum(energies), 0.0
        if math.isnan(wanted):
            return None
        for k, energy in enumerate(energies):
            if reached >= wanted:
                return k
            reached += energy
        return len(energies)

    def _ratios(self) -> list[float]:
        """`σᵢ / σ₁`; their squares neither overflow nor underflow."""
        return [value / self.sigma[0] if self.sigma[0] else 0.0 for value in self.sigma]


def singular_values_of(many: Sequence[Weights]) -> list[torch.Tensor]:
    """The singular values of each Δ, float64 `(min(rank, in, out),)`, largest first; equal shapes are batched.

    Float32 factors are factored in float32, float64 factors in float64. A convolution is flattened to (out, in·k…);
    stacked experts give the values of all their Δ together; a DoRA module gives those of its low-rank part. Factors
    with NaN or Inf give NaN.
    """
    batches: defaultdict[object, list[int]] = defaultdict(list)
    for index, weights in enumerate(many):
        batches[weights.A.shape, weights.B.shape, _precision(weights), weights.experts].append(index)
    values: list[torch.Tensor] = [torch.empty(0)] * len(many)
    for indices in batches.values():
        for index, row in zip(indices, _batch([many[index] for index in indices]), strict=True):
            values[index] = row
    return values


def _batch(batch: list[Weights]) -> torch.Tensor:
    """The singular values of modules of one shape: `(modules, experts · min(rank, in, out))`."""
    dtype = _precision(batch[0])
    factors = [_by_expert(weights) for weights in batch]
    A = torch.stack([A.to(dtype) for A, _ in factors])  # (modules, experts, rank, in)
    B = torch.stack([B.to(dtype) for _, B in factors])  # (modules, experts, out, rank)
    broken = ~(A.isfinite().flatten(1).all(dim=1) & B.isfinite().flatten(1).all(dim=1))
    A[broken], B[broken] = 0.0, 0.0  # LAPACK fails or hangs on non-finite values
    # The core in float64: the product of two large float32 factors would overflow.
    core = _triangle(B).double() @ _triangle(A.mT).double().mT
    values: torch.Tensor = torch.linalg.svdvals(core).flatten(1).sort(dim=1, descending=True).values
    values[broken] = math.nan
    scaling = torch.tensor([abs(weights.scaling) for weights in batch], dtype=torch.float64, device=values.device)
    return values.mul_(scaling[:, None])


def _triangle(tall: torch.Tensor) -> torch.Tensor:
    triangle: torch.Tensor = torch.linalg.qr(tall, mode="r").R
    return triangle


def _by_expert(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (experts, rank, in)` and `B (experts, out, rank)`; one expert if they are not stacked."""
    A, B = weights.A.flatten(1), weights.B.flatten(1)
    A = A.reshape(weights.experts, weights.rank, -1)
    return A, B.reshape(B.shape[0], weights.rank, weights.experts).permute(2, 0, 1)


def _precision(weights: Weights) -> torch.dtype:
    double = torch.float64 in (weights.A.dtype, weights.B.dtype)
    return torch.float64 if double else torch.float32
