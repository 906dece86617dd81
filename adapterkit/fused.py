"""The inner loop of a merge, compiled: a block of rows goes through the cache once, without the interpreter.

As calls of some 30 µs from Python, two threads spend their time handing each other the interpreter's lock, and two
cores do less than one. TorchScript makes the same calls without the lock, and needs no compiler where it is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapterkit.delta import Update
from adapterkit.residual import spread
from adapterkit.rounding import midpoint_shift

FLUSHED = 1e-15  # whose square is far above the least float32


@dataclass(frozen=True)
class Doubts:
    """Where to note which elements of `base` may not come back when the updates are subtracted again.

    `marks` is of the base's shape and dtype, and not zero there; `sizes` and `off` are scratch of the shape of `sums`,
    in the base's dtype and in float32.
    """

    marks: torch.Tensor
    sizes: torch.Tensor
    off: torch.Tensor

    def found(self, base: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The flat positions of what is marked, in order; where the sums' `squares` are not finite, of NaN too.

        A NaN is the same by comparison of its bits only, which arithmetic need not keep.
        """
        if not bool(squares.isfinite().all()):
            self.marks.view(torch.int16)[~base.isfinite()] = -1
        bits = self.marks.view(torch.int16).view(-1)
        if bits.is_cuda:
            return bits.nonzero()[:, 0]
        return torch.from_numpy(np.flatnonzero(bits.numpy() != 0))  # where torch is several times slower


def add_rounded(
    base: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    out: torch.Tensor,
    sums: torch.Tensor,
    depth: int,
    doubts: Doubts | None = None,
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
    marked = [base] * 6
    norms: list[tuple[torch.Tensor, torch.Tensor]] = []
    if doubts is not None:
        marks, sizes = doubts.marks, doubts.sizes
        marked = [base.view(torch.int16), marks, marks.view(torch.int16), doubts.off, sizes, sizes.view(torch.int16)]
        norms = [_norms(update) for update in updates]
    shares = spread(updates) if doubts is not None else (0.0, 0.0)
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # it would compile anew for each shape
        return _loop(  # type: ignore[no-any-return]
            base, out, sums, bits, bits.view(torch.int16), shift, depth, spans, lefts, rights, strengths,
            marked, norms, shares,
        )  # fmt: skip


def _norms(update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """`|s|·‖B_i‖` and `‖A_:j‖`; what is not zero is large enough that nothing flushed to zero matters beside them."""
    strength = abs(update.strength)
    by_row, by_column = update.left.norm(dim=1), update.right.norm(dim=0)
    least = FLUSHED * max(1.0, strength)
    return (by_row * strength).clamp_(min=least) * (by_row > 0), by_column.clamp(min=FLUSHED) * (by_column > 0)


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
    marked: list[torch.Tensor],
    norms: list[tuple[torch.Tensor, torch.Tensor]],
    shares: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop; tensors are handed over as every dtype that they are seen as, which TorchScript cannot do itself.

    In doubt is where `|W| − |W' − S| − (shares of |W| and ‖B_i‖·‖A_:j‖)` does not round to |W|, S the sum that W' was
    rounded from. Towards zero, since there the values never lie less dense.
    """
    of_weight, of_update = shares
    squares: list[torch.Tensor] = []
    least: list[torch.Tensor] = []
    size, rows = sums.shape[0], base.shape[0]
    bases, outs = torch.split(base, size), torch.split(out, size)
    seen = [torch.split(one, size) for one in marked[:3]]
    for index in range(len(bases)):
        first = index * size
        last = min(rows, first + size)
        chunk, low = (sums, halves) if last - first == size else (sums[: last - first], halves[: last - first])
        chunk.copy_(bases[index])
        for (start, stop), left, right, strength in zip(spans, lefts, rights, strengths):  # noqa: B905  (unknown to it)
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                part = chunk[begin - first : end - first]
                factor = left[begin - start : end - start]
                if min(part.shape) > 1:
                    torch.addmm(part, factor, right, alpha=strength, out=part)
                else:  # as a matrix times a vector it would round after every term
                    part.add_(factor @ right, alpha=strength)
        outs[index].copy_(chunk)
        flat = chunk.view(-1)
        squares.append(flat.dot(flat))
        off, sizes, sizes16 = marked[3], marked[4], marked[5]
        if of_weight > 0:
            if last - first < size:
                off, sizes, sizes16 = off[: last - first], sizes[: last - first], sizes16[: last - first]
            off.copy_(outs[index])
            off.sub_(chunk)
        if shift > 0:  # in place, since the sums are not needed any more
            bits.bitwise_left_shift_(shift)
        least.append(low.view(-1, depth, halves.shape[1]).amin(1))
        if of_weight > 0:
            off.abs_()
            for (start, stop), (by_row, by_column) in zip(spans, norms):  # noqa: B905
                begin, end = max(first, start), min(last, stop)
                if begin < end:
                    off[begin - first : end - first].addr_(
                        by_row[begin - start : end - start], by_column, alpha=of_update
                    )
            torch.bitwise_or(seen[0][index], -32768, out=sizes16)  # −|W|
            chunk.copy_(sizes)
            off.add_(chunk, alpha=1 - of_weight)
            seen[1][index].copy_(off)
            seen[2][index].bitwise_xor_(sizes16)
    return torch.stack(squares), torch.cat(least)


def subtract_rounded(
    after: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    out: torch.Tensor,
    back: torch.Tensor,
    products: torch.Tensor,
) -> None:
    """`out = round(after − Σ strength·left·right)`, every product summed on its own; see `residual.product`.

    `back` and `products`, float32, have room for as many rows as are computed at a time.
    """
    spans = [(update.start - first, update.stop - first) for update in updates]
    lefts, rights = [update.left for update in updates], [update.right for update in updates]
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        _back(after, out, back, products, spans, lefts, rights, [update.strength for update in updates])


def _chunks_back(
    after: torch.Tensor,
    out: torch.Tensor,
    back: torch.Tensor,
    products: torch.Tensor,
    spans: list[tuple[int, int]],
    lefts: list[torch.Tensor],
    rights: list[torch.Tensor],
    strengths: list[float],
) -> None:
    """The loop of `subtract_rounded`."""
    for first in range(0, after.shape[0], back.shape[0]):
        last = min(after.shape[0], first + back.shape[0])
        chunk = back[: last - first]
        chunk.copy_(after[first:last])
        for (start, stop), left, right, strength in zip(spans, lefts, rights, strengths):  # noqa: B905
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                product = products[: end - begin]
                torch.mm(left[begin - start : end - start], right, out=product)
                chunk[begin - first : end - first].sub_(product, alpha=strength)
        out[first:last] = chunk


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch has nothing else that does this
    _loop, _back = torch.jit.script(_chunks), torch.jit.script(_chunks_back)
