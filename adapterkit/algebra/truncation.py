"""Say how far to truncate a low-rank update; needs no torch, so that planning doesn't either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit for truncation: a rank, a share of `‖Δ‖_F²`, or a relative error `‖Δ − Δ'‖_F / ‖Δ‖_F`."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def rank_for(self, sigma: torch.Tensor, beyond: float = 0.0) -> int:
        """The smallest rank, at least 1, within the limit for singular values `(k,)`, largest first.

        `beyond` is the energy of the singular values that are not in `sigma`.
        """
        if self.rank is not None:
            return max(1, min(self.rank, len(sigma)))
        rest = tails(sigma) + beyond  # rest[k]: the energy that rank k drops
        total = float(rest[0])
        most = self.error**2 if self.error is not None else 1.0 - (self.energy or 1.0)
        return max(1, int((rest > most * total).sum())) if total else 1


def tails(sigma: torch.Tensor) -> torch.Tensor:
    """`Σ_{i>k} σᵢ²` for k = 0 … len(sigma), summed from the smallest."""
    import torch

    squares = sigma.double().square()
    return torch.cat([squares.flip(-1).cumsum(-1).flip(-1), squares.new_zeros(1)])
