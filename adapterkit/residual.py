"""What it takes to undo a rounded sum bit for bit, whatever arithmetic undoes it.

`W' = round(W + Δ)` forgets: `round(W' − Δ)` is not always W. Recorded are the elements where it is not, and those where
`W' − Δ` lies so close to a boundary between two values that another order of summation could round it the other way.
Every other element is restored by any arithmetic within the bound `γ_r·|s|·‖B_i‖·‖A_:j‖` (Cauchy and Schwarz on the
standard bound of a dot product), with `γ_r = r·u / (1 − r·u)`; u is the unit roundoff of what Δ is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.delta import Update, add_updates


@dataclass(frozen=True)
class Residual:
    """The recorded elements: their flat positions, and the steps from W' to W among the values of the dtype."""

    at: torch.Tensor
    steps: torch.Tensor

    def to(self, device: torch.device) -> Residual:
        """The same on another device."""
        return Residual(self.at.to(device), self.steps.to(device))


def record(before: torch.Tensor, after: torch.Tensor, first: int, updates: Sequence[Update]) -> Residual:
    """What restores `before` from `after`, rows `first …` of a matrix, when `updates` are known again."""
    back, slack = _subtracted(after, first, updates), _slack(after, first, updates)
    low, high = (back - slack).to(before.dtype), (back + slack).to(before.dtype)
    back = back.to(before.dtype)  # rounded as `restore` does it
    sure = (low == high) & (_ordered(back) == _ordered(before)) & back.isfinite()
    at = (~sure).view(-1).nonzero()[:, 0]
    steps = _ordered(before).view(-1)[at] - _ordered(after).view(-1)[at]
    return Residual(at, steps)


def restore(after: torch.Tensor, first: int, updates: Sequence[Update], residual: Residual) -> torch.Tensor:
    """The rows that `record` was given as `before`."""
    back = _subtracted(after, first, updates).to(after.dtype).view(-1)
    back[residual.at] = _from_ordered(_ordered(after).view(-1)[residual.at] + residual.steps, after.dtype)
    return back.view(after.shape)


def _subtracted(after: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """`W' − Δ`, in the dtype of the factors."""
    dtype = updates[0].left.dtype
    back = after.to(dtype, copy=True)
    negated = [Update(update.start, update.stop, update.left, update.right, -update.strength) for update in updates]
    add_updates(back, first, negated)
    return back


def _slack(after: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """By how much `W' − Δ` may differ between two ways to compute it."""
    dtype = updates[0].left.dtype
    unit = torch.finfo(dtype).eps
    # Each update is one more addition to the sum, which grows to |W'| + |Δ| at most.
    slack = after.to(dtype).abs() * (unit * (len(updates) + 1))
    for update in updates:
        start, stop = max(update.start, first), min(update.stop, first + len(after))
        if start < stop:
            rank = update.right.shape[0] + 2
            gamma = rank * unit / (1 - rank * unit)
            rows = update.left[start - update.start : stop - update.start].norm(dim=1)
            bound = rows[:, None] * update.right.norm(dim=0) * (abs(update.strength) * (gamma + unit))
            slack[start - first : stop - first] += bound * 2  # once for each of the two ways
    return slack.nan_to_num_(nan=torch.inf)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Floating point bits as integers in the order of the values, so that neighbours differ by one."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return bits ^ (bits >> (8 * values.element_size() - 1) & torch.iinfo(bits.dtype).max)


def _from_ordered(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values again; the mapping is its own inverse."""
    bits = steps ^ (steps >> (8 * steps.element_size() - 1) & torch.iinfo(steps.dtype).max)
    return bits.view(dtype)
