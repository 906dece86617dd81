"""Exact algebra on low-rank factors: `Δ = scaling · B · A` is never formed as an out×in matrix.

With `B = Q_B R_B` and `Aᵀ = Q_A R_A`, `Δ = Q_B (scaling · R_B R_Aᵀ) Q_Aᵀ`: the singular values of Δ are those of the
core between the two orthogonal factors, which is at most rank × rank. A Gram matrix in float32 would lose every value
below 3e-4 of the largest; QR keeps them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.adapter import LoraWeights

Weights = LoraWeights[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The singular values of one Δ, largest first, and the figures that follow from them.

    All zero (an untrained B) gives ranks of 0; where a value is NaN every figure is NaN.
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
        """The least k with `σ₁² + … + σ_k² ≥ share · ‖Δ‖_F²`; None where a value is NaN."""
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
        """`σᵢ / σ₁`, whose squares neither overflow nor vanish."""
        return [value / self.sigma[0] if self.sigma[0] else 0.0 for value in self.sigma]


def singular_values(weights: Weights) -> torch.Tensor:
    """The singular values of `scaling · B · A`, largest first; see `singular_values_of`."""
    return singular_values_of([weights])[0]


def singular_values_of(many: Sequence[Weights]) -> list[torch.Tensor]:
    """The singular values of each Δ, float64 `(min(rank, in, out),)`, in the order given; equal shapes go in one batch.

    Float32 factors are factored in float32, float64 ones in float64. A convolution is flattened to (out, in·k…),
    stacked experts give the values of all their Δ together. Of a DoRA module they are those of its low-rank part.
    Factors that hold NaN or Inf give NaN.
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
    A[broken], B[broken] = 0.0, 0.0  # LAPACK fails on, or never returns from, what is not finite
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
    """`A (experts, rank, in)` and `B (experts, out, rank)`; one expert where they are not stacked."""
    A, B = weights.A.flatten(1), weights.B.flatten(1)
    A = A.reshape(weights.experts, weights.rank, -1)
    return A, B.reshape(B.shape[0], weights.rank, weights.experts).permute(2, 0, 1)


def _precision(weights: Weights) -> torch.dtype:
    double = torch.float64 in (weights.A.dtype, weights.B.dtype)
    return torch.float64 if double else torch.float32
