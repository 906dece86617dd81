"""What methods that look at every element of Δ are made of: trimming, dropping, electing signs.

Of the dense Δ a chunk of rows is there at a time. Elements are computed in float64 and rounded to float32, so that what
is kept does not depend on how rows are divided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.algebra.sketch import Matrix
from adapterkit.combining.method import Part

Rows = Callable[[int, int], torch.Tensor]  # of one adapter's Δ with some elements zero, not weighted


def matrix_of(
    parts: Sequence[Part], kept: Sequence[Rows], merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> Matrix:
    """The combined Δ: `merge` of what is `kept` of each part, weighted."""

    def rows(first: int, last: int) -> torch.Tensor:
        return merge([part.weight * one(first, last).double() for part, one in zip(parts, kept, strict=True)]).float()

    return Matrix(parts[0].shape, rows)


def trimmed(part: Part, density: float) -> Rows:
    """The `density` greatest elements of Δ by magnitude, the others zero."""
    least = _threshold(part, density)

    def rows(first: int, last: int) -> torch.Tensor:
        x = part.rows(first, last)
        return torch.where(x.abs() >= least, x, 0.0)

    return rows


def dropped(part: Part, density: float, seed: int) -> Rows:
    """Each element of Δ kept with probability `density` and divided by it, the others zero."""
    own = seed_for(seed, part.name)
    return lambda first, last: drop(part.rows(first, last), density, own, first * part.shape[1])


def drop(x: torch.Tensor, density: float, seed: int, at: int) -> torch.Tensor:
    """Each element kept with probability `density` and divided by it; `at` elements of the matrix came before."""
    return torch.where(uniform_at(x.numel(), seed, at).view_as(x) < density, x / density, 0.0)


def add(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum."""
    return torch.stack(list(tensors)).sum(0)


def elect(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect the sign of the greater sum, and take the mean of the elements that have it (arXiv 2306.01708)."""
    elected = sum(tensors[1:], tensors[0]).sign()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tensor in tensors:
        agree = (tensor * elected) > 0
        total += tensor * agree
        count += agree
    return total / count.clamp_(min=1)


def merge_aligned(
    aligned: Sequence[torch.Tensor], weights: Sequence[float], inner: str, density: float
) -> torch.Tensor:
    """Batches of matrices of one basis added up, or merged by TIES, each weighted before it is trimmed."""
    weighted = [weight * one for one, weight in zip(aligned, weights, strict=True)]
    return add(weighted) if inner == "linear" else elect([_trim(one, density) for one in weighted])


def _trim(x: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` greatest elements of each matrix of a batch, by magnitude, the others zero."""
    flat = x.abs().flatten(-2)
    count = _kept_of(flat.shape[-1], density)
    bound = flat.kthvalue(flat.shape[-1] - count + 1, dim=-1).values
    return torch.where(x.abs() >= bound[..., None, None], x, 0.0)


def _kept_of(count: int, density: float) -> int:
    """How many of `count` elements are kept."""
    return max(1, round(density * count))


def _threshold(part: Part, density: float) -> float:
    """The magnitude of the last element that is kept: found among the bits of float32, sixteen at a time."""
    left = _kept_of(part.shape[0] * part.shape[1], density)
    prefix = 0
    for shift, width in ((16, 15), (0, 16)):
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, _, rows in Matrix(part.shape, part.rows).chunks():
            bits = rows.abs().view(torch.int32).view(-1)
            here = bits if shift else bits[(bits >> 16) == prefix]
            counts += torch.bincount(here >> shift & (1 << width) - 1, minlength=1 << width)
        above = counts.flip(0).cumsum(0)
        at = int((above < left).sum())  # from the greatest
        left -= int(above[at - 1]) if at else 0
        prefix = (prefix << width) + (1 << width) - 1 - at
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
