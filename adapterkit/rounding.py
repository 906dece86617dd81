"""Rounding once: to a 16-bit dtype by way of float32, without the second rounding that this can hide.

A sum rounded to float32 may land on the midpoint between two outputs, or cross it, and rounding again then goes the
wrong way; which way, would depend on the order of summation. So sums close to a midpoint, a few in a hundred thousand,
are found and decided in float64.
"""

from __future__ import annotations

import numpy as np
import torch

# How many of float32's lowest bits the output lacks.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
# How many float32 neighbours of a midpoint count as close: a common update is summed with an error below one of them.
NEAR = 2


def midpoint_shift(dtype: torch.dtype) -> int:
    """How far left float32 bits are shifted so that, as int16, their low half is the least of all on a midpoint."""
    return 16 - DROPPED_BITS[dtype]


def near_midpoints(
    least: torch.Tensor, greatest: torch.Tensor, dtype: torch.dtype, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(hits, depth)` and columns `(hits, 1)` of the groups of `depth` rows that hold a sum close to a midpoint.

    `least` and `greatest`, `(groups, 2·columns)`, are over each group's int16 halves of the shifted bits: low, high …
    Just before a midpoint the low half is 2¹⁵ − 1, on it −2¹⁵: so finding the few sums takes two passes that only
    read, and no temporary of their size.
    """
    near = NEAR << midpoint_shift(dtype)
    close = (least.numpy() <= near - 2**15) | (greatest.numpy() >= 2**15 - near)  # numpy: six times faster here
    group, column = np.divmod(np.flatnonzero(close), least.shape[1])
    low = column % 2 == 0
    rows = torch.from_numpy(group[low])[:, None] * depth + torch.arange(depth)
    return rows, torch.from_numpy(column[low] // 2)[:, None]


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
