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
