"""The residual that makes a rounded sum reversible bit for bit, in any arithmetic.

`W' = round(W + Δ)` loses information: `round(W' − Δ)` is not always W. The residual records W wherever `W' − Δ` rounds
to another value, or is so close to a rounding boundary that another order of summation could round it to another value.
Any arithmetic restores all other elements.

A value rounded k times has a relative error of at most `γ_k = k·u / (1 − k·u)`, u the unit roundoff of the dtype in
which Δ is computed. The sum of the terms of `s·B·A` takes r roundings in any order; s and its product take two more. So
the error is at most `γ_{r+2}·|s|·‖B_i‖·‖A_:j‖` (Cauchy and Schwarz). Where the bounds below say `+ 3`, the additional
one covers the few roundings in the bound itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from math import inf

import numpy as np
import torch

from adapterkit.algebra.updates import Update

SPARSEST = {
    torch.bfloat16: 9,
    torch.float16: 12,
}  # a weight is at most 2^SPARSEST times the distance to its nearest boundary
FAR = 2**14  # steps; larger distances are not distinguished
FLUSHED = 1e-15  # its square is far above the smallest float32


@dataclass(frozen=True)
class Residual:
    """Recorded elements: flat positions in order, their values, and how many steps off subtraction may be."""

    at: torch.Tensor
    values: torch.Tensor
    reach: torch.Tensor

    def __len__(self) -> int:
        return len(self.at)

    def moved(self, by: int) -> Residual:
        """The same residual with its positions shifted by `by`."""
        return Residual(self.at + by, self.values, self.reach)

    def to(self, device: torch.device) -> Residual:
        """The same on another device."""
        return Residual(self.at.to(device), self.values.to(device), self.reach.to(device))


def record(
    before: torch.Tensor,
    after: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    gain: torch.Tensor | None = None,
) -> Residual:
    """The residual that restores `before` from `after`, rows `first …` of a matrix, given the same `updates`.

    With a `gain` of the shape of the rows, `after` was rounded from `gain · W + Δ`.
    """
    back = subtracted(after, first, updates, gain)
    wanted, broken = ordered(before).view(-1), ~back.isfinite().view(-1)
    ends = [ordered(end.to(before.dtype)).view(-1) for end in _reach(back, after, first, updates, gain)]
    at = (broken | (ends[0] != wanted) | (ends[1] != wanted)).nonzero()[:, 0]
    low, high = ((end[at].long() - wanted[at].long()).abs() for end in ends)
    reach = torch.maximum(low, high).masked_fill_(broken[at], FAR).clamp_(max=FAR)
    return Residual(at.int(), before.reshape(-1)[at], reach.short())


def marked(
    before: torch.Tensor, after: torch.Tensor, updates: Sequence[Update], at: torch.Tensor, count: int = 1
) -> Residual:
    """The residual of the elements `at` of 16-bit weights: those that subtracting plain updates may not restore.

    The rounding error of W' is at most half its last place, which is 2^k times that of W, k the difference of their
    exponents. The error of Δ adds to it; and below a power of two, values are twice as dense.

    The rows may be those of `count` weights of one shape, stacked; then every update belongs to one of them.
    """
    values, others = (one.reshape(-1).index_select(0, at).cpu() for one in (before, after))
    mantissa = 7 if before.dtype is torch.bfloat16 else 10
    most = 0x7FFF >> mantissa
    old, new = values.view(torch.int16).numpy(), others.view(torch.int16).numpy()
    exponent, other = (np.maximum(bits >> mantissa & most, 1) for bits in (old, new))
    k = np.clip(other - exponent, 1, 10)
    weight = at.cpu().numpy() // (before.numel() // count) if count > 1 else 0
    reach = (np.int16(1) << k - 1) + _steps_off(updates, before.dtype, count, len(before) // count)[weight, exponent]
    reach += ((old & (1 << mantissa) - 1) <= reach) * (reach + 1)  # half a step is a whole one there, and −0 adds one
    reach[exponent == most] = FAR
    return Residual(at.cpu(), values, torch.from_numpy(reach))


def _steps_off(updates: Sequence[Update], dtype: torch.dtype, count: int, depth: int) -> np.ndarray:
    """The error bound of the sums in steps of a 16-bit weight, rounded, at most FAR: `(count, exponents)`.

    The weights have `depth` rows each; a single one may have more.
    """
    sizes = np.zeros((count, 1))
    for numbers, by_row, by_column in _norms_by_shape(updates):
        weights = [min(updates[number].start // depth, count - 1) for number in numbers]
        np.add.at(sizes[:, 0], weights, (by_row.amax(1).double() * by_column.amax(1).double()).cpu().numpy())
    finfo = torch.finfo(dtype)
    exponents = np.arange(256 if dtype is torch.bfloat16 else 32)
    of_boundary, of_delta = spread(updates, dtype)
    steps = of_delta * sizes / (finfo.tiny * finfo.eps) * np.exp2(1.0 - exponents) + of_boundary / 2 + 0.5
    least: np.ndarray = np.fmin(steps, FAR / 4).astype(np.int16)
    return least


def nothing(before: torch.Tensor) -> Residual:
    """An empty residual for `before`."""
    none = before.new_empty(0)
    return Residual(none.long(), none, none.short())


def joined(parts: Sequence[Residual]) -> Residual:
    """Concatenate residuals, in the order of their elements."""
    return Residual(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Residual)))


def gamma(count: int, dtype: torch.dtype) -> float:
    """The relative error bound of a value rounded `count` times to `dtype`."""
    off = count * torch.finfo(dtype).eps / 2
    return off / (1 - off) if off < 1 else inf


def norms(updates: Sequence[Update]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`|s|·‖B_i‖` and `‖A_:j‖` of each update; their product bounds an element of Δ.

    Nonzero norms are clamped so that values flushed to zero do not matter beside them; norms are float64, since squares
    could underflow in float32.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for numbers, by_row, by_column in _norms_by_shape(updates):
        found |= zip(numbers, zip(by_row.unbind(), by_column.unbind(), strict=True), strict=True)
    return [found[number] for number in range(len(updates))]


def _norms_by_shape(updates: Sequence[Update]) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """The `norms` of all updates whose factors have the same shapes, stacked, with the numbers of the updates."""
    by_shape: dict[tuple[torch.Size, torch.Size], list[int]] = {}
    for number, update in enumerate(updates):
        by_shape.setdefault((update.left.shape, update.right.shape), []).append(number)
    for numbers in by_shape.values():
        left, right = (_stacked([getattr(updates[n], side) for n in numbers]) for side in ("left", "right"))
        strength = left.new_tensor([abs(updates[n].strength) for n in numbers], dtype=torch.float64)[:, None]
        by_row = torch.linalg.vector_norm(left, dim=-1, dtype=torch.float64)
        by_column = torch.linalg.vector_norm(right, dim=-2, dtype=torch.float64)
        rows = (by_row * strength).maximum(FLUSHED * strength.clamp(min=1.0)) * (by_row > 0)
        columns = by_column.clamp(min=FLUSHED) * (by_column > 0)
        yield numbers, rows.to(left.dtype), columns.to(left.dtype)


def _stacked(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Matrices of one shape stacked; a single one is not copied."""
    return torch.stack(list(factors)) if len(factors) > 1 else factors[0][None]


def spread(updates: Sequence[Update], dtype: torch.dtype) -> tuple[float, float]:
    """The combined error bound of merging to `dtype` and subtracting, as two factors (see `kernels/cpu.py`).

    The first multiplies the distance from W to its nearest boundary, the second `N = Σ |s|·‖B_i‖·‖A_:j‖`. With n
    updates on a row, merging rounds W and every term at most `T = Σ (r + 3)` times, in any order of summation.
    Subtracting rounds the terms of one update `r + 2` times, and the rest of W', for all updates but the last, n − 1
    times. The sum is `γ_{T+n−1}·|W| + 2·γ_T·N`, the latter with room for the roundings of N. The comparison adds three
    roundings of W: its own, and those where it or the subtraction lands on a boundary that it is only close to.
    """
    kind = updates[0].left.dtype
    terms, count = _most_on_a_row(updates)
    share = gamma(terms + count + 2, kind) * 2 ** SPARSEST[dtype]
    return share / (1 - share) if share < 1 else inf, 2 * gamma(terms, kind)


def _most_on_a_row(updates: Sequence[Update]) -> tuple[int, int]:
    """The most terms on one row, `r + 3` of each update of rank r, and the most updates."""
    changes: dict[int, tuple[int, int]] = {}  # from a row on, terms and updates are so many more
    for update in updates:
        size = update.right.shape[0] + 3
        for row, terms, count in ((update.start, size, 1), (update.stop, -size, -1)):
            before = changes.get(row, (0, 0))
            changes[row] = before[0] + terms, before[1] + count
    by_row = zip(*(changes[row] for row in sorted(changes)), strict=True)
    terms, count = (max(accumulate(change)) for change in by_row)
    return terms, count


def restore(after: torch.Tensor, first: int, updates: Sequence[Update], residual: Residual) -> torch.Tensor:
    """Restore the rows that `record` took as `before`, in the dtype of `after`; for residuals without a gain."""
    rows = subtracted(after, first, updates).to(after.dtype)
    integers(rows).view(-1)[residual.at.long()] = integers(residual.values)
    return rows


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left · right`, not accumulated onto W': that would round every term at the magnitude of W'."""
    return left @ right


def subtracted(
    after: torch.Tensor, first: int, updates: Sequence[Update], gain: torch.Tensor | None = None
) -> torch.Tensor:
    """`(W' − Δ) / gain`, in the dtype of the factors."""
    back = after.to(updates[0].left.dtype if updates else torch.float64, copy=True)
    for update, rows, left in _inside(back, first, updates):
        rows.sub_(product(left, update.right), alpha=update.strength)
    return back if gain is None else back.div_(gain)


def _reach(
    back: torch.Tensor, after: torch.Tensor, first: int, updates: Sequence[Update], gain: torch.Tensor | None
) -> list[torch.Tensor]:
    """The smallest and largest possible `W' − Δ`, for any order of summation.

    Rounding never crosses a representable number, so the last subtraction can at most land on a boundary next to the
    exact difference: extending the range by one number on either side covers that.
    """
    unit = torch.finfo(back.dtype).eps / 2
    off = torch.zeros_like(back)
    sizes = torch.zeros_like(back)  # Σ |s|·‖B_i‖·‖A_:j‖, which bounds |Δ|
    roundings = -1 if gain is None else 0  # of the rest of W', without the last, which is monotonic
    for update, part, _ in _inside(off, first, updates):
        [(by_row, by_column)] = norms([update])
        start = max(update.start, first)
        rows = slice(start - update.start, start - update.start + len(part))
        size = by_row[rows, None] * by_column
        part += size * (2 * gamma(len(update.right) + 3, back.dtype))  # once for each of the two orders of summation
        sizes[start - first : start - first + len(part)] += size
        roundings += 1
    if roundings > 0:
        off += (after.to(back.dtype).abs() + sizes) * ((2 * roundings + 1) * unit)
    if gain is not None:
        off = off / gain.abs()
    off = off.nan_to_num_(nan=torch.inf)
    infinity = back.new_tensor(torch.inf)
    return [torch.nextafter(back - off, -infinity), torch.nextafter(back + off, infinity)]


def _inside(
    matrix: torch.Tensor, first: int, updates: Sequence[Update]
) -> Iterator[tuple[Update, torch.Tensor, torch.Tensor]]:
    """Each update with its rows of `matrix`, whose first row is `first`, and its left factor there."""
    for update in updates:
        start, stop = max(update.start, first), min(update.stop, first + len(matrix))
        if start < stop:
            left = update.left[start - update.start : stop - update.start]
            yield update, matrix[start - first : stop - first], left


def integers(values: torch.Tensor) -> torch.Tensor:
    """A view as integers: copying as floating point may change the bits of NaN."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def ordered(values: torch.Tensor) -> torch.Tensor:
    """Floating point bits as integers in the order of the values; neighbours differ by one."""
    bits = integers(values)
    return bits ^ (bits >> (8 * values.element_size() - 1) & torch.iinfo(bits.dtype).max)


def from_ordered(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of `ordered`; the mapping is its own inverse."""
    return ordered(steps).view(dtype)
