"""Two 4-bit codes a byte, the first one high: packed, and looked up in a code book."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pair_table(code: torch.Tensor) -> torch.Tensor:
    """The two values in each of the 256 bytes, as one 8-byte element each, which torch looks up fastest."""
    import torch

    byte = torch.arange(256, device=code.device)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.float64).view(-1)


def pairs(nibbles: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first one high; a last one alone has a zero beside it."""
    import torch

    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    both = nibbles.view(torch.int16)  # the first of two in the low byte
    return (both << 4 | both >> 8).to(torch.uint8)


def dequantize(raw: torch.Tensor, absmax: torch.Tensor, pairs: torch.Tensor, blocksize: int) -> torch.Tensor:
    """Float32 values of whole blocks, the last of which may be short: `raw` uint8, two a byte; `absmax` one a block."""
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
    """The same by bitsandbytes' CUDA kernel, the `count` values rounded to `dtype` already."""
    import torch

    done: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(raw, absmax, blocksize, kind, (count,), dtype)
    return done.view(-1)


@cache
def has_kernels() -> bool:
    """Whether bitsandbytes is there and loads."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception:  # it has many ways to fail beside a CUDA that it was not built for
        return False
    return True
