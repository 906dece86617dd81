"""The best low-rank approximation of a matrix that is computed in chunks of rows.

Randomized singular value decomposition (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1) with power
iterations. The error is known exactly: `‖M − QQᵀM‖_F² = ‖M‖_F² − ‖QᵀM‖_F²`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.algebra.lowrank import Decomposition, signs_of
from adapterkit.algebra.truncation import Limit

CHUNK_ELEMENTS = 1 << 20
CACHED_ELEMENTS = 1 << 26  # larger matrices are computed again in every pass
OVERSAMPLING = 10
POWER_ITERATIONS = 3
FIRST_GUESS = 32  # first rank tried for an energy or error limit


@dataclass(frozen=True)
class Matrix:
    """A matrix computed by `rows(first, last)`, in the precision for products with it."""

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """All rows, in chunks `(first, last, rows)`."""
        for first, last in self.spans():
            yield first, last, self.rows(first, last)

    def spans(self) -> list[tuple[int, int]]:
        """The `(first, last)` rows of each chunk."""
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        return [(first, min(self.shape[0], first + step)) for first in range(0, self.shape[0], step)]

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """`M · right`, float64."""
        return torch.cat([(rows @ right.to(rows.dtype)).double() for _, _, rows in self.chunks()])

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """`Mᵀ · left`, float64."""
        total = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64)
        for first, last, rows in self.chunks():
            total += rows.T @ left[first:last].to(rows.dtype)
        return total

    def projected(self, left: torch.Tensor) -> tuple[torch.Tensor, float]:
        """`Mᵀ · left` and `‖M‖_F²`, both in float64, since the error is a difference of energies."""
        total, energy = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64), 0.0
        for first, last, rows in self.chunks():
            exact = rows.double()
            total += exact.T @ left[first:last]
            energy += float(torch.linalg.vector_norm(exact)) ** 2
        return total, energy

    def cached(self) -> Matrix:
        """The same matrix, held in memory if it is small enough."""
        if prod(self.shape) > CACHED_ELEMENTS:
            return self
        whole = torch.cat([rows for _, _, rows in self.chunks()])
        return Matrix(self.shape, lambda first, last: whole[first:last])


@dataclass(frozen=True, slots=True)
class Sketch:
    """The leading part of a matrix, its total energy `‖M‖_F²`, and the energy beyond the leading part."""

    leading: Decomposition
    energy: float
    beyond: float

    def as_batch(self) -> tuple[Decomposition, torch.Tensor]:
        """The leading part and the energy beyond it as a batch of one."""
        part = self.leading
        return Decomposition(part.U[None], part.sigma[None], part.V[None]), torch.tensor(
            [self.beyond], dtype=torch.float64
        )


def sketch(matrix: Matrix, limit: Limit, seed: int = 0, name: str = "") -> Sketch:
    """The leading singular values and vectors of `matrix`: at least those within `limit`, and some more.

    Only the start of the iteration is random: it depends on `seed` and `name`, never on the division into rows.
    """
    most, matrix = min(matrix.shape), matrix.cached()
    width = min(most, (limit.rank or FIRST_GUESS) + OVERSAMPLING)
    while True:
        found, energy = _leading(matrix, width, seed_for(seed, name))
        beyond = max(0.0, energy - float(found.sigma.square().sum())) if width < most else 0.0
        if width == most or limit.rank is not None or limit.rank_for(found.sigma, beyond) <= width - OVERSAMPLING:
            return Sketch(found, energy, beyond)
        width = min(most, 2 * width)


def _leading(matrix: Matrix, width: int, seed: int) -> tuple[Decomposition, float]:
    """The `width` leading singular values and vectors, the last ones approximate, and the total energy."""
    start = _normal(matrix.shape[1], width, seed)
    basis = torch.linalg.qr(matrix.times(start)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.transposed_times(basis)).Q
        basis = torch.linalg.qr(matrix.times(basis)).Q
    projection, energy = matrix.projected(basis)
    right = torch.linalg.qr(projection)
    core = torch.linalg.svd(right.R.mT, full_matrices=False)
    U, V = basis @ core.U, right.Q @ core.Vh.mT
    sign = signs_of(U)
    return Decomposition(U * sign, core.S, V * sign), energy


def _normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normally distributed random numbers (Box and Muller, 1958)."""
    even = uniform_at(rows * columns, seed, 0).double()
    odd = uniform_at(rows * columns, seed, rows * columns).double()
    return ((-2 * (1 - even).log()).sqrt() * (2 * torch.pi * odd).cos()).view(rows, columns)
