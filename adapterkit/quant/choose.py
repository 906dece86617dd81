"""Which code to take for a weight between two of them.

`nearest` has the least error. `stochastic` takes one of the two neighbours by chance, the nearer the likelier: an
update smaller than a step then survives on average, as noise. `compensated` adds each weight's error to the next one of
its row before that is rounded (GPTQ, arXiv 2210.17323, with nothing known of the inputs): a row keeps its sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import torch

ROUNDINGS = ("nearest", "stochastic", "compensated")


@dataclass(frozen=True, slots=True)
class Rounding:
    """One of `ROUNDINGS`, and the seed of its chance."""

    kind: str = "nearest"
    seed: int = 0

    def of(self, name: str) -> Rounding:
        """The same, by a seed of weight `name`'s own."""
        return Rounding(self.kind, self.seed ^ crc32(name.encode()))


NEAREST = Rounding()


def choose(scaled: torch.Tensor, unit: torch.Tensor, code: torch.Tensor, rounding: Rounding, at: int) -> torch.Tensor:
    """The int32 index of a code for each of `scaled (rows, columns)`.

    `unit`, of the same shape, is what 1 is worth there; `code` is sorted; `at` says how many elements of the weight
    came before, so that chance does not depend on how it is divided.
    """
    import torch

    bounds = (code[:-1] + code[1:]) / 2
    if rounding.kind == "nearest":
        return torch.bucketize(scaled, bounds, out_int32=True)
    if rounding.kind == "compensated":
        return _carried(scaled, unit, code, bounds)
    below = (torch.bucketize(scaled, code, right=True, out_int32=True) - 1).clamp_(0, len(code) - 2)
    gap = code[below + 1] - code[below]
    up = (scaled - code[below]) > gap * chance(scaled.numel(), rounding.seed, at).view_as(scaled)
    return below + up


def chance(count: int, seed: int, at: int) -> torch.Tensor:
    """`count` float32 numbers in [0, 1), each a hash of its place `at …` and `seed` (SplitMix64's mixing)."""
    import torch

    x = torch.arange(at, at + count) * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 40 & 0xFFFFFF).float() * 2.0**-24


def _carried(scaled: torch.Tensor, unit: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """A column at a time, each with the error of the one before; at most half of the greatest step is carried on."""
    import torch

    most = float((code[1:] - code[:-1]).max()) / 2
    columns, units = scaled.T.contiguous(), unit.T.contiguous()
    index = torch.empty(columns.shape, dtype=torch.int32)
    error = torch.zeros(len(scaled))
    for j in range(len(columns)):
        value = columns[j] + torch.where(units[j] > 0, error / units[j], 0.0)
        index[j] = torch.bucketize(value, bounds, out_int32=True)
        error = (value - code[index[j]]).clamp_(-most, most) * units[j]
    return index.T
