"""Add low-rank updates to rows of a weight matrix, in float32 or better, so that the caller rounds once.

A matrix here is a weight as stored, `(rows, columns)`. Every update covers a range of its rows and is `left · right`,
in the orientation of the stored weight.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import nan

import torch

from adapterkit.adapter.weights import LoraWeights
from adapterkit.algebra.dora import column_gain, row_gain
from adapterkit.errors import FitError


@dataclass(frozen=True, slots=True)
class Update:
    """`strength · left · right` on rows `start:stop`; with a magnitude, DoRA's renormalized direction instead.

    `left (stop − start, rank)`, `right (rank, columns)`, in the compute dtype. `gain` is m/n by column, for weights
    stored transposed: it needs the whole matrix, so it is measured beforehand; by row, each chunk computes its own.
    """

    start: int
    stop: int
    left: torch.Tensor
    right: torch.Tensor
    strength: float
    magnitude: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    weight: float = 1.0

    @property
    def renormalizes(self) -> bool:
        return self.magnitude is not None

    def to(self, device: torch.device) -> Update:
        """The same on another device."""
        left, right = self.left.to(device), self.right.to(device)
        magnitude, gain = (None if x is None else x.to(device) for x in (self.magnitude, self.gain))
        return replace(self, left=left, right=right, magnitude=magnitude, gain=gain)

    def read_as(self, dtype: torch.dtype) -> Update:
        """The same with factors and magnitude rounded to `dtype`, as by a tool that reads them in it."""
        left, right = (factor.to(dtype).to(factor.dtype) for factor in (self.left, self.right))
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype).to(self.magnitude.dtype)
        return replace(self, left=left, right=right, magnitude=magnitude)


def update_for(
    weights: LoraWeights[torch.Tensor],
    weight: float,
    rows: tuple[int, int],
    of: tuple[int, int] | None,
    expert: int | None,
    transposed: bool,
    dtype: torch.dtype = torch.float32,
    where: str = "a module",
) -> Update:
    """The update of the stored `rows` of a matrix by `weights` times `weight`, computed in `dtype`.

    Args:
        of: The rows of Δ as stored to use; all by default.
        expert: The expert whose factors to use.
        transposed: Whether the weight is stored as `(in, out)`.
        where: The name of the module in errors.

    Raises:
        FitError: A factor or the strength is not finite.
    """
    A, B = weights.A, weights.B
    if expert is not None:
        A = A.reshape(weights.experts, weights.rank, -1)[expert]
        B = B.reshape(B.shape[0], weights.rank, weights.experts)[:, :, expert]
    A, B = A.to(dtype), B.to(dtype)
    magnitude = None if weights.magnitude is None else weights.magnitude.to(dtype)
    strength = weights.scaling * (weight if magnitude is None else 1.0)
    if not bool(torch.tensor(strength, dtype=dtype).isfinite()):
        raise FitError(f"{where}: its scaling × weight is {strength:g}, beyond {dtype}: give a smaller weight or scale")
    for name, tensor in (("A", A), ("B", B), ("the magnitude", magnitude)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise FitError(
                f"{where}: {name} is NaN or Inf in {dtype}: the adapter is broken; did its training diverge?"
            )
    if of is not None and magnitude is not None:
        magnitude = magnitude[of[0] : of[1]]
    share = 1.0 if magnitude is None else weight
    return Update(*rows, *oriented(A.flatten(1), B.flatten(1), of, transposed), strength, magnitude, None, share)


def oriented(
    A: torch.Tensor, B: torch.Tensor, of: tuple[int, int] | None, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`left` and `right` of an `Update` by rows `of` of Δ as stored, from `A (…, rank, in)` and `B (…, out, rank)`."""
    left, right = (A.mT, B.mT) if transposed else (B, A)
    if of is not None:
        left = left[..., of[0] : of[1], :]
    return left.contiguous(), right.contiguous()


def add_updates(matrix: torch.Tensor, first: int, updates: Sequence[Update]) -> None:
    """Add every update to `matrix` (float32), rows `first …` of the weight, in place.

    Plain updates add `s·w·B·A`; a DoRA update adds `w·(diag(m/n)·(W + s·B·A) − W)`, so that several adapters add up to
    the weighted sum of their effective Δ in any order.
    """
    before = matrix.clone() if len(updates) > 1 and any(update.renormalizes for update in updates) else matrix
    for update in updates:
        start, stop = max(update.start, first), min(update.stop, first + matrix.shape[0])
        if start >= stop:
            continue
        rows, left = matrix[start - first : stop - first], update.left[start - update.start : stop - update.start]
        if not update.renormalizes:
            torch.addmm(rows, left, update.right, alpha=update.strength, out=rows)
            continue
        original = before[start - first : stop - first]
        direction = torch.addmm(original, left, update.right, alpha=update.strength)
        assert update.magnitude is not None
        if update.gain is not None:
            gain = update.gain
        else:
            gain = row_gain(direction, update.magnitude[start - update.start : stop - update.start])
        direction.mul_(gain)
        if before is matrix and update.weight == 1.0:
            rows.copy_(direction)
        else:
            rows.add_(direction.sub_(original), alpha=update.weight)


def gains(matrix: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """m/n of every DoRA update for `matrix`, rows `first …` of the weight: by row, or by column if transposed."""
    found = []
    for update in (update for update in updates if update.renormalizes):
        if update.gain is not None:
            found.append(update.gain[0])
            continue
        gain = matrix.new_ones(len(matrix))
        start, stop = max(update.start, first), min(update.stop, first + len(matrix))
        if start < stop:
            inside = slice(start - update.start, stop - update.start)
            rows = matrix[start - first : stop - first]
            direction = torch.addmm(rows, update.left[inside], update.right, alpha=update.strength)
            assert update.magnitude is not None
            gain[start - first : stop - first] = row_gain(direction, update.magnitude[inside])[:, 0]
        found.append(gain)
    return torch.stack(found) if found else matrix.new_empty(0, 0)


def linear(
    shape: tuple[int, int], first: int, updates: Sequence[Update], found: torch.Tensor
) -> tuple[list[Update], torch.Tensor | None]:
    """Plain updates and a factor with `W' = factor · W + Σ Δ`, which turn DoRA updates with known `gains` into a sum.

    A DoRA update adds `w·(g·(W + s·B·A) − W)`.
    """
    if not any(update.renormalizes for update in updates):
        return list(updates), None
    factor, plain, by = found.new_ones(shape), [], iter(found)
    for update in updates:
        if not update.renormalizes:
            plain.append(update)
            continue
        gain = next(by)
        start, stop = max(update.start, first), min(update.stop, first + shape[0])
        if start >= stop:
            continue
        left, right, share = update.left[start - update.start : stop - update.start], update.right, update.weight
        if update.gain is not None:
            factor[start - first : stop - first] += share * (gain - 1)
            right = right * gain
        else:
            gain = gain[start - first : stop - first, None]
            factor[start - first : stop - first] += share * (gain - 1)
            left = left * gain
        plain.append(Update(start, stop, left, right, share * update.strength))
    return plain, factor


def exact_sum(
    base: torch.Tensor, first: int, updates: Sequence[Update], i: torch.Tensor, j: torch.Tensor
) -> torch.Tensor:
    """Elements of `W + Σ Δ` in float64, for plain updates; `base` has rows `first …` of W.

    The elements are rows `i (hits, depth)` of `base` and columns `j (hits, 1)`.
    """
    total = base[i, j].double()
    groups, depth = sorted({*i[:, 0].tolist()}), i.shape[1]
    for update in updates:
        before = bisect_left(groups, update.stop - first)  # groups that begin before its end
        if not before or groups[before - 1] + depth <= update.start - first:
            continue
        at = i + (first - update.start)
        inside = (at >= 0) & (at < update.stop - update.start)
        left, right = update.left[at.where(inside, 0)].double(), update.right[:, j].permute(1, 0, 2).double()
        total += torch.where(inside, (left @ right).squeeze(2) * update.strength, 0.0)
    return total


def measure_columns(update: Update, chunks: Callable[[], Iterator[tuple[int, torch.Tensor]]]) -> Update:
    """`update` with its gain by column, measured in one pass over the weight's chunks `(first row, float32 rows)`."""

    def directions() -> Iterator[torch.Tensor]:
        for first, rows in chunks():
            start, stop = max(update.start, first), min(update.stop, first + rows.shape[0])
            if start < stop:
                left = update.left[start - update.start : stop - update.start]
                yield torch.addmm(rows[start - first : stop - first], left, update.right, alpha=update.strength)

    assert update.magnitude is not None
    return replace(update, gain=column_gain(directions(), update.magnitude))


@dataclass
class Retention:
    """The share of an update that survives rounding: float64 sums over the elements of `W' − W` and `Δ`.

    `retained` is `⟨W'−W, Δ⟩ / ‖Δ‖²` (1 is perfect); `error` is `‖W'−W−Δ‖ / ‖Δ‖`. Both are NaN if
    there is no update.
    """

    dot: float = 0.0
    delta: float = 0.0
    residual: float = 0.0

    @property
    def retained(self) -> float:
        return self.dot / self.delta if self.delta else nan

    @property
    def error(self) -> float:
        return (self.residual / self.delta) ** 0.5 if self.delta else nan

    def __add__(self, other: Retention) -> Retention:
        return Retention(self.dot + other.dot, self.delta + other.delta, self.residual + other.residual)


def retention(before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor) -> Retention:
    """Compare the rounded output with the exact one; `before` and `exact` float32, `rounded` in the output dtype."""
    return retentions(before, exact, rounded, 1)[0]


def retentions(before: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, count: int) -> list[Retention]:
    """The `retention` of each of `count` weights of one shape, stacked."""
    delta, applied = (after.to(torch.float64, copy=True).sub_(before).view(count, -1) for after in (exact, rounded))
    dot, square = torch.linalg.vecdot(applied, delta), torch.linalg.vecdot(delta, delta)
    residual = applied.sub_(delta)
    sums = torch.stack([dot, square, torch.linalg.vecdot(residual, residual)], dim=1)
    return [Retention(*each) for each in sums.tolist()]
