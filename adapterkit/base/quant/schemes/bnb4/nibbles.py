"""Pack two 4-bit codes per byte, the first in the high nibble, and look them up in a codebook."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pair_table(code: torch.Tensor) -> torch.Tensor:
    """Return the two values of each of the 256 bytes, as one 8-byte element, which torch looks up fastest."""
    import torch

    byte = torch.arange(256, device=code.device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.float64).view(-1)


def pairs(nibbles: torch.Tensor) -> torch.Tensor:
    """Pack two codes per byte, the first in the high nibble; an odd last one is paired with zero."""
    import torch

    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    both = nibbles.view(torch.int16)  # little-endian: the first code is in the low byte
    return (both << 4 | both >> 8).to(torch.uint8)


def dequantize(raw: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Dequantize whole blocks to float32; the last may be short.

    Args:
        raw: uint8, two codes per byte.
        absmax: One per block.
        pairs: The table from `pair_table`.
    """
    import torch

    values = torch.index_select(pairs, 0, raw.int()).view(torch.float32)
    full = len(values) // blocksize * blocksize
    values[:full].view(-1, blocksize).mul_(absmax[: full // blocksize, None])
    if full < len(values):
        values[full:].mul_(absmax[full // blocksize])
    return values


def kernel(
    raw: torch.Tensor, absmax: torch.Tensor, blocksize: int, kind: str, count: int, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize `count` values to `dtype` with bitsandbytes' CUDA kernel."""
    import torch

    done: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(raw, absmax, blocksize, kind, (count,), dtype)
    return done.view(-1)


@cache
def has_kernels() -> bool:
    """Return whether bitsandbytes is installed and can be imported."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # built for another CUDA version, it can fail in many ways
        return False
    return True
