"""The best low-rank approximation of a matrix of which there are only rows, some at a time.

Randomized singular value decomposition (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1) with power
iterations. What is left out is known exactly: `‖M − QQᵀM‖_F² = ‖M‖_F² − ‖QᵀM‖_F²`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from adapterkit.chance import chance, seed_for
from adapterkit.lowrank import Decomposition, Limit

CHUNK_ELEMENTS = 1 << 20
OVERSAMPLING = 10
POWER_ITERATIONS = 3
FIRST_GUESS = 32  # of the rank that an energy or an error wants


@dataclass(frozen=True)
class Matrix:
    """A matrix that is never whole in memory: `rows(first, last)` computes some of it, float64."""

    shape: tuple[int, int]
    rows: Callable[[int, int], torch.Tensor]

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """All of it as `(first, last, rows)`."""
        depth, columns = self.shape
        step = max(1, CHUNK_ELEMENTS // columns)
        for first in range(0, depth, step):
            last = min(depth, first + step)
            yield first, last, self.rows(first, last)

    def times(self, right: torch.Tensor) -> torch.Tensor:
        """`M · right`."""
        return torch.cat([rows @ right for _, _, rows in self.chunks()])

    def transposed_times(self, left: torch.Tensor) -> torch.Tensor:
        """`Mᵀ · left`."""
        total = left.new_zeros(self.shape[1], left.shape[1])
        for first, last, rows in self.chunks():
            total.addmm_(rows.T, left[first:last])
        return total


@dataclass(frozen=True, slots=True)
class Sketch:
    """The leading part of a matrix, the energy `‖M‖_F²` of all of it, and how much of that is beyond the part."""

    leading: Decomposition
    energy: float
    beyond: float


def sketch(matrix: Matrix, limit: Limit, seed: int = 0, name: str = "") -> Sketch:
    """The leading singular values and vectors of `matrix`, as many as `limit` asks for and some more.

    By chance only in where the iteration starts: from `seed` and `name`, never from how the rows are divided.
    """
    most = min(matrix.shape)
    energy = sum(float(rows.square().sum()) for _, _, rows in matrix.chunks())
    width = min(most, (limit.rank or FIRST_GUESS) + OVERSAMPLING)
    while True:
        found = _leading(matrix, width, seed_for(seed, name))
        beyond = max(0.0, energy - float(found.sigma.square().sum())) if width < most else 0.0
        if width == most or limit.rank is not None or limit.rank_for(found.sigma, beyond) <= width - OVERSAMPLING:
            return Sketch(found, energy, beyond)
        width = min(most, 2 * width)


def _leading(matrix: Matrix, width: int, seed: int) -> Decomposition:
    """The `width` leading singular values and vectors, the last of them roughly."""
    start = _normal(matrix.shape[1], width, seed)
    basis = torch.linalg.qr(matrix.times(start)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.transposed_times(basis)).Q
        basis = torch.linalg.qr(matrix.times(basis)).Q
    right = torch.linalg.qr(matrix.transposed_times(basis))
    core = torch.linalg.svd(right.R.mT, full_matrices=False)
    U, V = basis @ core.U, right.Q @ core.Vh.mT
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return Decomposition(U * sign, core.S, V * sign)


def _normal(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normally distributed numbers (Box and Muller, 1958)."""
    even = chance(rows * columns, seed, 0).double()
    odd = chance(rows * columns, seed, rows * columns).double()
    return ((-2 * (1 - even).log()).sqrt() * (2 * torch.pi * odd).cos()).view(rows, columns)
