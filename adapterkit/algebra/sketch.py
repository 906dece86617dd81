"""The best low-rank approximation of a matrix of which there are only rows, some at a time.

Randomized singular value decomposition (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1) with power
iterations. What is left out is known exactly: `‖M − QQᵀM‖_F² = ‖M‖_F² − ‖QᵀM‖_F²`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.algebra.lowrank import Decomposition, Limit, signs_of

CHUNK_ELEMENTS = 1 << 20
KEPT_ELEMENTS = 1 << 26  # of a matrix that is computed once instead of in every pass
OVERSAMPLING = 10
POWER_ITERATIONS = 3
FIRST_GUESS = 32  # of the rank that an energy or an error wants


@dataclass(frozen=True)
class Matrix:
    """A matrix of which `rows(first, last)` computes some, in the precision that products with it are to have."""

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """All of it as `(first, last, rows)`."""
        for first, last in self.spans():
            yield first, last, self.rows(first, last)

    def spans(self) -> list[tuple[int, int]]:
        """The rows of each chunk."""
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
        """`Mᵀ · left` and `‖M‖_F²`, both computed in float64, since what is left out is a difference of energies."""
        total, energy = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64), 0.0
        for first, last, rows in self.chunks():
            exact = rows.double()
            total += exact.T @ left[first:last]
            energy += float(torch.linalg.vector_norm(exact)) ** 2
        return total, energy

    def kept(self) -> Matrix:
        """The same, held in memory from here on where it is small enough."""
        if prod(self.shape) > KEPT_ELEMENTS:
            return self
        whole = torch.cat([rows for _, _, rows in self.chunks()])
        return Matrix(self.shape, lambda first, last: whole[first:last])


@dataclass(frozen=True, slots=True)
class Sketch:
    """The leading part of a matrix, the energy `‖M‖_F²` of all of it, and how much of that is beyond the part."""

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
    """The leading singular values and vectors of `matrix`, as many as `limit` asks for and some more.

    By chance only in where the iteration starts: from `seed` and `name`, never from how the rows are divided.
    """
    most, matrix = min(matrix.shape), matrix.kept()
    width = min(most, (limit.rank or FIRST_GUESS) + OVERSAMPLING)
    while True:
        found, energy = _leading(matrix, width, seed_for(seed, name))
        beyond = max(0.0, energy - float(found.sigma.square().sum())) if width < most else 0.0
        if width == most or limit.rank is not None or limit.rank_for(found.sigma, beyond) <= width - OVERSAMPLING:
            return Sketch(found, energy, beyond)
        width = min(most, 2 * width)


def _leading(matrix: Matrix, width: int, seed: int) -> tuple[Decomposition, float]:
    """The `width` leading singular values and vectors, the last of them roughly, and the energy of all."""
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
    """Normally distributed numbers (Box and Muller, 1958)."""
    even = uniform_at(rows * columns, seed, 0).double()
    odd = uniform_at(rows * columns, seed, rows * columns).double()
    return ((-2 * (1 - even).log()).sqrt() * (2 * torch.pi * odd).cos()).view(rows, columns)
