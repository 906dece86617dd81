"""The compiled inner loop of a merge: a block of rows passes through the cache once, without the interpreter.

With calls of some 30 µs from Python, two threads contend for the interpreter lock, and two cores do less than one.
TorchScript makes the same calls without the lock, and needs no compiler on the user's machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapterkit.algebra.residual import norms, spread
from adapterkit.algebra.rounding import midpoint_shift
from adapterkit.algebra.updates import Update


@dataclass(frozen=True)
class DoubtMask:
    """Marks the elements of `base` that subtracting the updates may not restore.

    `marks` has the shape and dtype of the base, and is nonzero at those elements.
    """

    marks: torch.Tensor

    def changed(self, rows: torch.Tensor, columns: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Mark elements whose rounded value changed from `before` to `after`: their error was computed for `before`."""
        self.marks.view(torch.int16)[rows, columns] |= (before.view(torch.int16) != after.view(torch.int16)).short()

    def found(self, base: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """The flat positions of marked elements, in order, and of elements to be stored by their bits.

        Those are non-finite values, if the `squares` of the sums are not finite; and zeros in fp16, since values near
        zero round to it.
        """
        bits = self.marks.view(torch.int16)
        if not bool(squares.isfinite().all()):
            bits[~base.isfinite()] = -1
        if base.dtype is torch.float16:
            bits |= (base == 0).short()
        if bits.is_cuda:
            return bits.view(-1).nonzero()[:, 0]
        return torch.from_numpy(np.flatnonzero(bits.view(-1).numpy() != 0))  # several times faster than torch


def add_rounded(
    base: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    out: torch.Tensor,
    sums: torch.Tensor,
    products: torch.Tensor,
    depth: int,
    doubts: DoubtMask | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out = round(base + Σ strength·left·right)` for plain updates, summed in float32, rounded to a 16-bit dtype.

    Args:
        base, out: Rows `first …` of the matrix.
        sums, products: Float32 scratch; their size is that of a chunk.
        depth: The number of rows in a group of `on_midpoints`.

    Returns:
        `Σ x²` of each chunk, and the minima of each group for `on_midpoints`.
    """
    bits = sums.view(torch.int32)
    marked = [] if doubts is None else [doubts.marks, doubts.marks.view(torch.int16), base.view(torch.int16)]
    sizes = [] if doubts is None else norms(updates)
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]  # avoids recompiling for each shape
        return _loop(  # type: ignore[no-any-return]
            base, out, sums, products, bits, bits.view(torch.int16), midpoint_shift(out.dtype), depth,
            *_factors(updates, first), marked, sizes, spread(updates, out.dtype) if marked else (0.0, 0.0),
        )  # fmt: skip


def _factors(
    updates: Sequence[Update], first: int
) -> tuple[list[tuple[int, int]], list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Row spans relative to `first`, left factors, right factors and strengths, in lists for TorchScript."""
    spans = [(update.start - first, update.stop - first) for update in updates]
    lefts, rights = [update.left for update in updates], [update.right for update in updates]
    return spans, lefts, rights, [update.strength for update in updates]


def _chunks(
    base: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    products: torch.Tensor,
    bits: torch.Tensor,
    halves: torch.Tensor,
    shift: int,
    depth: int,
    spans: list[tuple[int, int]],
    lefts: list[torch.Tensor],
    rights: list[torch.Tensor],
    strengths: list[float],
    marked: list[torch.Tensor],
    sizes: list[tuple[torch.Tensor, torch.Tensor]],
    spreads: tuple[float, float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop; takes views of the tensors in every dtype it needs, since TorchScript cannot make them."""
    squares: list[torch.Tensor] = []
    least: list[torch.Tensor] = []
    size, rows = sums.shape[0], base.shape[0]
    bases, outs = torch.split(base, size), torch.split(out, size)
    seen = [torch.split(view, size) for view in marked]
    for index in range(len(bases)):
        first = index * size
        last = min(rows, first + size)
        chunk, low, other = sums, halves, products
        if last - first < size:
            chunk, low, other = sums[: last - first], halves[: last - first], products[: last - first]
        chunk.copy_(bases[index])
        for (start, stop), left, right, strength in zip(spans, lefts, rights, strengths):  # noqa: B905  (not in TorchScript)
            begin, end = max(first, start), min(last, stop)
            if begin < end:
                part, factor = chunk[begin - first : end - first], left[begin - start : end - start]
                if min(part.shape) > 1:
                    torch.addmm(part, factor, right, alpha=strength, out=part)
                else:  # a matrix-vector addmm would round after every term
                    part.add_(factor @ right, alpha=strength)
        outs[index].copy_(chunk)
        flat = chunk.view(-1)
        squares.append(flat.dot(flat))
        if len(marked) > 0:
            other.copy_(outs[index])
            other.sub_(chunk)
        if shift > 0:  # in place: the sums are no longer needed
            bits.bitwise_left_shift_(shift)
        least.append(low.view(-1, depth, halves.shape[1]).amin(1))
        if len(marked) > 0:
            _mark(
                first, chunk, other, bases[index], seen[0][index], seen[1][index], seen[2][index], spans, sizes, spreads
            )
    return torch.stack(squares), torch.cat(least)


def _mark(
    first: int,
    scratch: torch.Tensor,
    error: torch.Tensor,
    base: torch.Tensor,
    marks: torch.Tensor,
    marks16: torch.Tensor,
    base16: torch.Tensor,
    spans: list[tuple[int, int]],
    sizes: list[tuple[torch.Tensor, torch.Tensor]],
    spreads: tuple[float, float],
) -> None:
    """Mark where `W + (e ± 2·δ)·(1 + η)`, on the side of e, does not round to W; the chunk's first row is `first`.

    The `error` e is `W' − S`, S the sum before rounding to W'. Subtracting from W' gives `W + e + t`, where
    `|t| ≤ α·h + δ`: h is the distance from W to its nearest boundary, α and `δ = β·N` come from `spread`, and η is
    `α / (1 − α)`. Let H be the distance to the boundary on the side of e; an unmarked element has
    `|e| + 2·δ ≤ H·(1 − α)`.

    On that side `|e| + |t| ≤ H`, since `h ≤ H`. On the other side, if its boundary is no nearer, `|t| − |e| ≤ H`
    suffices. It is nearer where W is a power of two: then `h = H / 2` and `δ ≤ h·(1 − α)`, so `|t| ≤ h`. Rounding is
    monotonic, so W is restored; a value on a boundary rounds to W only if W is even, as in this comparison.

    Zeros: `W + …` is 0 only where Δ is, and where −0 became +0 the bits differ. Subnormals have boundaries at equal
    distances. NaN and Inf: see `DoubtMask.found`.
    """
    inflation, spread = spreads
    scratch.zero_()
    for (start, stop), (by_row, by_column) in zip(spans, sizes):  # noqa: B905
        begin, end = max(first, start), min(first + len(scratch), stop)
        if begin < end:
            part = scratch[begin - first : end - first]
            part.addr_(by_row[begin - start : end - start], by_column, alpha=2 * spread)
    scratch.copysign_(error)
    error.add_(scratch)
    scratch.copy_(base)
    scratch.add_(error, alpha=1 + inflation)
    marks.copy_(scratch)
    marks16.bitwise_xor_(base16)


def subtract_rounded(
    after: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    out: torch.Tensor,
    back: torch.Tensor,
    products: torch.Tensor,
) -> None:
    """`out = round(after − Σ strength·left·right)`, each product summed separately; see `residual.product`.

    `back` and `products` are float32 scratch; their size is that of a chunk.
    """
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        _back(after, out, back, products, *_factors(updates, first))


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
    warnings.simplefilter("ignore", DeprecationWarning)  # torch has no replacement for this
    _loop, _back = torch.jit.script(_chunks), torch.jit.script(_chunks_back)
