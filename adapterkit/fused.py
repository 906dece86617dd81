"""The inner loop of a merge, compiled: a block of rows goes through the cache once, without the interpreter.

As calls of some 30 µs from Python, two threads spend their time handing each other the interpreter's lock, and two
cores do less than one. TorchScript makes the same calls without the lock, and needs no compiler where it is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from adapterkit.delta import Update
from adapterkit.rounding import midpoint_shift


def add_rounded(
    base: torch.Tensor, first: int, updates: Sequence[Update], out: torch.Tensor, sums: torch.Tensor, depth: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out = round(base + Σ strength·left·right)` for plain updates, summed in float32, rounded to a 16-bit dtype.

    `base` and `out` are rows `first …` of the matrix; as many at a time as `sums`, which is float32, has room for.
    Returns `Σ x²` of each such chunk, and what `on_midpoints` wants, of each `depth` rows.
    """
    bits = sums.view(torch.int32)
    spans = [(update.start - first, update.stop - first) for update in updates]
    lefts, rights = [update.left for update in updates], [update.right for update in updates]
    strengths = [update.strength for update in updates]
    shift = midpoint_shift(out.dtype)
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it would compile anew for each shape
        return _loop(  # type: ignore[no-any-return]
            base, out, sums, bits, bits.view(torch.int16), shift, depth, spans, lefts, rights, strengths
        )


def _chunks(
    base: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    bits: torch.Tensor,
    halves: torch.Tensor,
    shift: int,
    depth: int,
    spans: list[tuple[int, int]],
    lefts: list[torch.Tensor],
    rights: list[torch.Tensor],
    strengths: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop; `bits` and `halves` are `sums` seen as int32 and int16, which TorchScript cannot do itself."""
    squares: list[torch.Tensor] = []
    least: list[torch.Tensor] = []
    for first in range(0, base.shape[0], sums.shape[0]):
        last = min(base.shape[0], first + sums.shape[0])
        chunk = sums[: last - first]
        chunk.copy_(base[first:last])
        for (start, stop), left, right, strength in zip(spans, lefts, rights, strengths):  # noqa: B905  (unknown to it)
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                rows = chunk[begin - first : end - first]
                factor = left[begin - start : end - start]
                if min(rows.shape) > 1:
                    torch.addmm(rows, factor, right, alpha=strength, out=rows)
                else:  # as a matrix times a vector it would round after every term
                    rows.add_(factor @ right, alpha=strength)
        out[first:last] = chunk
        flat = chunk.view(-1)
        squares.append(flat.dot(flat))
        if shift > 0:  # in place, since the sums are not needed any more
            bits.bitwise_left_shift_(shift)
        least.append(halves[: last - first].view(-1, depth, halves.shape[1]).amin(1))
    return torch.stack(squares), torch.cat(least)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch has nothing else that does this
    _loop = torch.jit.script(_chunks)
