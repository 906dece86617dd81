"""Operations on every element of Δ: trimming, dropping, electing signs.

The dense Δ is computed a chunk of rows at a time. Elements are computed in float64 and rounded to float32, so that the
same elements survive whatever the chunk size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.algebra.sketch import Matrix
from adapterkit.combining.method import Part

Rows = Callable[[int, int], torch.Tensor]  # rows of one adapter's sparse Δ, not weighted


def matrix_of(
    parts: Sequence[Part], sparse: Sequence[Rows], merge: Callable[[Sequence[torch.Tensor]], torch.Tensor]
) -> Matrix:
    """The combined Δ: `merge` of the weighted `sparse` Δ of each part."""

    def rows(first: int, last: int) -> torch.Tensor:
        return merge([part.weight * one(first, last).double() for part, one in zip(parts, sparse, strict=True)]).float()

    return Matrix(parts[0].shape, rows)


def trimmed(part: Part, density: float) -> Rows:
    """Δ with the largest elements by magnitude, a share of `density`, and zeros elsewhere."""
    threshold = _threshold(part, density)

    def rows(first: int, last: int) -> torch.Tensor:
        x = part.rows(first, last)
        return torch.where(x.abs() >= threshold, x, 0.0)

    return rows


def dropped(part: Part, density: float, seed: int) -> Rows:
    """Δ with each element divided by `density` with that probability, and otherwise zero."""
    own = seed_for(seed, part.name)
    return lambda first, last: drop(part.rows(first, last), density, own, first * part.shape[1])


def drop(x: torch.Tensor, density: float, seed: int, at: int) -> torch.Tensor:
    """Drop elements of `x` at random and rescale the others; `at` is the index of the first element in its matrix."""
    return torch.where(uniform_at(x.numel(), seed, at).view_as(x) < density, x / density, 0.0)


def add(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the tensors."""
    return torch.stack(list(tensors)).sum(0)


def elect(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Elect the sign of the larger total magnitude, and average the elements that have it (arXiv 2306.01708)."""
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
    """Batches of matrices in a common basis, summed or merged by TIES; each is weighted before it is trimmed."""
    weighted = [weight * one for one, weight in zip(aligned, weights, strict=True)]
    return add(weighted) if inner == "linear" else elect([_trim(one, density) for one in weighted])


def _trim(x: torch.Tensor, density: float) -> torch.Tensor:
    """A batch with the largest elements of each matrix by magnitude, a share of `density`, and zeros elsewhere."""
    flat = x.abs().flatten(-2)
    count = _surviving(flat.shape[-1], density)
    threshold = flat.kthvalue(flat.shape[-1] - count + 1, dim=-1).values
    return torch.where(x.abs() >= threshold[..., None, None], x, 0.0)


def _surviving(count: int, density: float) -> int:
    """The number of elements that survive trimming."""
    return max(1, round(density * count))


def _threshold(part: Part, density: float) -> float:
    """The magnitude of the smallest element that survives: a radix search over the bits of float32, 16 at a time."""
    left = _surviving(part.shape[0] * part.shape[1], density)
    prefix = 0
    for shift, width in ((16, 15), (0, 16)):
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, _, rows in Matrix(part.shape, part.rows).chunks():
            bits = rows.abs().view(torch.int32).view(-1)
            here = bits if shift else bits[(bits >> 16) == prefix]
            counts += torch.bincount(here >> shift & (1 << width) - 1, minlength=1 << width)
        above = counts.flip(0).cumsum(0)
        at = int((above < left).sum())  # counted from the largest
        left -= int(above[at - 1]) if at else 0
        prefix = (prefix << width) + (1 << width) - 1 - at
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))
