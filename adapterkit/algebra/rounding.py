"""Round once to a 16-bit dtype through float32, without double rounding.

A sum rounded to float32 may land on the midpoint of two outputs that it was only close to; rounding again then goes to
even instead of to the nearest. So sums on a midpoint, one in 65536, are found and decided in float64.
"""

from __future__ import annotations

import numpy as np
import torch

# The number of low float32 bits that the output lacks.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}


def midpoint_shift(dtype: torch.dtype) -> int:
    """The left shift of float32 bits after which their low half, as int16, is the minimum exactly on midpoints."""
    return 16 - DROPPED_BITS[dtype]


def on_midpoints(least: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `(hits, depth)` and columns `(hits, 1)` of the groups of `depth` rows that have a sum on a midpoint.

    `least (groups, 2·columns)` is the minimum over each group's int16 halves of the shifted bits: low half, high half,
    low half … So one read-only pass finds the few sums, without a temporary of their size.
    """
    if least.is_cuda:
        found = (least == -(2**15)).view(-1).nonzero()[:, 0]
    else:  # six times faster than torch on a CPU
        found = torch.from_numpy(np.flatnonzero(least.numpy() == -(2**15)))
    group, column = found // least.shape[1], found % least.shape[1]
    low = column % 2 == 0  # the high half of −0 has the same value
    rows = group[low][:, None] * depth + torch.arange(depth, device=least.device)
    return rows, column[low][:, None] // 2


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 values to the nearest in `dtype`; torch would round through float32.

    For a 16-bit `dtype`, values are first truncated to the 24 bits of a float32, whose last bit is set if anything was
    cut off (rounding to odd; Boldo and Melquiond, 2008). So no value moves onto a midpoint.
    """
    if dtype.itemsize > 2:
        return exact.to(dtype)
    cut = 2**29 - 1  # the additional bits of a float64
    bits = exact.view(torch.int64)
    return (((bits & cut) + cut | bits) & ~cut).view(torch.float64).to(dtype)
