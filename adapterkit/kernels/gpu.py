"""The inner loop of a merge on a GPU: a tile of the weight is read, added to and written once.

cuBLAS cannot do it: its bf16 `addmm` rounds the product to bf16 before adding, for most shapes (measured on an H100:
3.6% of the elements are wrong, by up to 8 ulps). Torch's own operations pass over the weight three times.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

if find_spec("triton"):
    import triton
    import triton.language as tl
else:  # which comes with torch for CUDA, but not for every platform
    triton = None

TILE = 64, 128
DEPTH = 16  # of a step along the rank


def add_in_place(rows: torch.Tensor, left: torch.Tensor, right: torch.Tensor, strength: float) -> None:
    """`rows ← round(rows + strength·left·right)`, summed in float32.

    Args:
        rows: `(m, n)`, 16 bits, contiguous.
        left, right: `(m, rank)` and `(rank, n)`, float32, contiguous.
    """
    if triton is None:
        rows.copy_(torch.addmm(rows.float(), left, right, alpha=strength))
        return
    (m, n), rank = rows.shape, left.shape[1]
    grid = triton.cdiv(m, TILE[0]), triton.cdiv(n, TILE[1])
    _add[grid](rows, left, right, strength, m, n, rank, *TILE, DEPTH)


def _kernel(  # type: ignore[no-untyped-def]
    rows, left, right, strength, m, n, rank, TILE_M: tl.constexpr, TILE_N: tl.constexpr, STEP: tl.constexpr
):
    """One tile of `add_in_place`. Triton compiles annotations too, so there are no others."""
    i = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)[:, None].to(tl.int64)
    j = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)[None]
    inside = (i < m) & (j < n)
    delta = tl.zeros((TILE_M, TILE_N), tl.float32)
    for first in range(0, rank, STEP):
        k = first + tl.arange(0, STEP)
        a = tl.load(left + i * rank + k[None], mask=(i < m) & (k[None] < rank), other=0.0)
        b = tl.load(right + k[:, None].to(tl.int64) * n + j, mask=(k[:, None] < rank) & (j < n), other=0.0)
        delta = tl.dot(a, b, delta, input_precision="ieee")
    at = rows + i * n + j
    before = tl.load(at, mask=inside)
    tl.store(at, (before.to(tl.float32) + strength * delta).to(before.dtype), mask=inside)


_add: Any = triton.jit(_kernel) if triton else None
