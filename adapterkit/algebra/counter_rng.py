"""Counter-based random numbers: an element gets the same number however a tensor is divided."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import torch


def uniform_at(count: int, seed: int, at: int, device: torch.device | None = None) -> torch.Tensor:
    """`count` float32 numbers in [0, 1), hashes of `seed` and the positions `at …` (SplitMix64's mixing)."""
    import torch

    x = torch.arange(at, at + count, device=device) * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return (x >> 40 & 0xFFFFFF).float() * 2.0**-24


def seed_for(seed: int, name: str) -> int:
    """A separate seed for `name`."""
    return seed ^ crc32(name.encode())
