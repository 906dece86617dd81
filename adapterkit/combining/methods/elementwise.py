"""Combining Δs element by element: TIES, DARE and pruning on the dense Δ, of which a chunk of rows is there at a time.

Elements are computed in float64 and rounded to float32, so that what is kept does not depend on how rows are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.algebra.lowrank import Product
from adapterkit.algebra.sketch import Matrix

# Method -> whether elements are chosen by chance (else by magnitude), and whether signs are elected.
METHODS = {
    "magnitude_prune": (False, False),
    "ties": (False, True),
    "dare_linear": (True, False),
    "dare_ties": (True, True),
}


@dataclass(frozen=True, slots=True)
class Dense:
    """One adapter's Δ of a module, its scaling in it, and its weight."""

    delta: Product  # one matrix, no batch
    weight: float
    name: str  # of its own, for its chance

    def rows(self, first: int, last: int) -> torch.Tensor:
        return (self.delta.left[first:last] @ self.delta.right).float()


def combined(parts: Sequence[Dense], method: str, density: float, seed: int) -> Matrix:
    """The combined Δ by one of `METHODS`, as a matrix of rows.

    Trimming (arXiv 2306.01708) keeps the `density` greatest elements of each Δ; dropping (arXiv 2311.03099) keeps each
    with probability `density`, and divides by it.
    """
    by_chance, elect = METHODS[method]
    shape = (parts[0].delta.left.shape[0], parts[0].delta.right.shape[1])
    least = [0.0 if by_chance else _threshold(part, shape, density) for part in parts]

    def rows(first: int, last: int) -> torch.Tensor:
        kept = []
        for part, bound in zip(parts, least, strict=True):
            x = part.rows(first, last)
            if by_chance:
                x = drop(x, density, seed_for(seed, part.name), first * shape[1])
            else:
                x = torch.where(x.abs() >= bound, x, 0.0)
            kept.append(part.weight * x.double())
        return (ties(kept) if elect else torch.stack(kept).sum(0)).float()

    return Matrix(shape, rows)


def trim(x: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` greatest elements of each matrix of a batch, by magnitude, the others zero."""
    flat = x.abs().flatten(-2)
    count = kept_of(flat.shape[-1], density)
    bound = flat.kthvalue(flat.shape[-1] - count + 1, dim=-1).values
    return torch.where(x.abs() >= bound[..., None, None], x, 0.0)


def kept_of(count: int, density: float) -> int:
    """How many of `count` elements are kept."""
    return max(1, round(density * count))


def drop(x: torch.Tensor, density: float, seed: int, at: int) -> torch.Tensor:
    """Each element kept with probability `density` and divided by it; `at` elements of the matrix came before."""
    return torch.where(uniform_at(x.numel(), seed, at).view_as(x) < density, x / density, 0.0)


def ties(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect the sign of the greater sum, and take the mean of the elements that have it (arXiv 2306.01708)."""
    elected = sum(tensors[1:], tensors[0]).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tensor in tensors:
        agree = (tensor * elected) > 0
        total += tensor * agree
        count += agree
    return total / count.clamp_(min=1)


def _threshold(part: Dense, shape: tuple[int, int], density: float) -> float:
    """The magnitude of the last element that is kept: found among the bits of float32, sixteen at a time."""
    left = kept_of(shape[0] * shape[1], density)
    prefix = 0
    for shift, width in ((16, 15), (0, 16)):
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, _, rows in Matrix(shape, part.rows).chunks():
            bits = rows.abs().view(torch.int32).view(-1)
            here = bits if shift else bits[(bits >> 16) == prefix]
            counts += torch.bincount(here >> shift & (1 << width) - 1, minlength=1 << width)
        above = counts.flip(0).cumsum(0)
        at = int((above < left).sum())  # from the greatest
        left -= int(above[at - 1]) if at else 0
        prefix = (prefix << width) + (1 << width) - 1 - at
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
