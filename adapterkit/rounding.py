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


class Midpoints:
    """Finds the sums close to a midpoint, in two passes over each chunk and without a temporary of its size.

    Chunks are seen as groups of `depth` rows; what comes out are the columns of a group that hold such a sum.
    """

    def __init__(self, dtype: torch.dtype, depth: int) -> None:
        self.shift = 16 - DROPPED_BITS[dtype]
        self.depth = depth
        self.least: list[torch.Tensor] = []
        self.greatest: list[torch.Tensor] = []

    def look(self, total: torch.Tensor) -> None:
        """Take note of the next rows, float32 `(a multiple of depth, columns)`."""
        bits = total.view(torch.int32)
        if self.shift:
            bits = bits << self.shift
        # Low half, high half, low half …; as int16, a midpoint has the least low half of all, and 2¹⁵ − 1 comes before.
        halves = bits.view(-1, self.depth, total.shape[1]).view(torch.int16)
        self.least.append(halves.amin(dim=1))
        self.greatest.append(halves.amax(dim=1))

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows `(hits, depth)` and columns `(hits, 1)` of everything in which a sum close to a midpoint lies."""
        near = NEAR << self.shift
        least, greatest = torch.cat(self.least), torch.cat(self.greatest)
        close = (least.numpy() <= near - 2**15) | (greatest.numpy() >= 2**15 - near)  # numpy: six times faster here
        group, column = np.divmod(np.flatnonzero(close), least.shape[1])
        low = column % 2 == 0
        rows = torch.from_numpy(group[low])[:, None] * self.depth + torch.arange(self.depth)
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
