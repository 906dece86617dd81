"""Rounding once: to a 16-bit dtype by way of float32, without the second rounding that this can hide.

A sum rounded to float32 may land on the midpoint between two outputs that it only came close to, and rounding it again
then goes to even instead of to the nearest. So the sums on a midpoint, one in 65536, are found and decided in float64.
"""

from __future__ import annotations

import numpy as np
import torch

# How many of float32's lowest bits the output lacks.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def midpoint_shift(dtype: torch.dtype) -> int:
    """How far left float32 bits are shifted so that their low half, as int16, is the least of all on midpoints."""
    return 16 - DROPPED_BITS[dtype]


def on_midpoints(least: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(hits, depth)` and columns `(hits, 1)` of the groups of `depth` rows that hold a sum on a midpoint.

    `least (groups, 2·columns)` is over each group's int16 halves of the shifted bits: low half, high half, low half …
    So the few sums are found by one pass that only reads, and needs no temporary of its size.
    """
    if least.is_cuda:
        found = (least == -(2**15)).view(-1).nonzero()[:, 0]
    else:  # where torch is six times slower at it
        found = torch.from_numpy(np.flatnonzero(least.numpy() == -(2**15)))
    group, column = found // least.shape[1], found % least.shape[1]
    low = column % 2 == 0  # a high half is as little for −0
    rows = group[low][:, None] * depth + torch.arange(depth, device=least.device)
    return rows, column[low][:, None] // 2


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 values rounded to nearest in `dtype`; torch would round to float32 on the way.

    For a 16-bit `dtype` they are first cut to the 24 bits of a float32, the last of which is set where anything was
    cut off (rounding to odd; Boldo and Melquiond, 2008): so no value comes to lie on a midpoint that was not there.
    """
    if dtype.itemsize > 2:
        return exact.to(dtype)
    cut = 2**29 - 1  # the bits that a float64 has beyond a float32
    bits = exact.view(torch.int64)
    return (((bits & cut) + cut | bits) & ~cut).view(torch.float64).to(dtype)


def as_bfloat16(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors in bf16 with the product of `left (m, r)` and `right (r, n)`, which are float32, to float32's accuracy.

    `x = x₁ + x₂ + x₃`, of 8 bits each, so `l·r = l₁r₁ + l₁r₂ + l₂r₁ + l₂r₂ + l₁r₃ + l₃r₁` up to 2⁻²⁴, as one product of
    rank 6r; of rank r where both are bf16 in all but name. What multiplies bf16 sums in float32 and rounds once at the
    end, as GPUs do, so adds a float32 update to a bf16 weight in one pass.
    """
    (l1, l2, l3), (r1, r2, r3) = _three(left), _three(right)
    if not bool(l2.any()) and not bool(r2.any()):
        return l1, r1
    return torch.cat([l1, l1, l2, l2, l1, l3], dim=1), torch.cat([r1, r2, r1, r2, r3, r1])


def _three(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16's whose sum is `x`, each 2⁸ times smaller than the one before."""
    first = x.bfloat16()
    rest = x - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()
