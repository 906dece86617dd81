"""What it takes to undo a rounded sum bit for bit, whatever arithmetic undoes it.

`W' = round(W + Δ)` forgets: `Ŵ = round(W' − Δ)` is not always W. Where every arithmetic gives the same Ŵ, the steps
from that to W are recorded, if there are any; where `W' − Δ` lies so close to a boundary between two values that
another order of summation could round it the other way, W itself. Sums differ from each other by no more than
the bound `γ_r·|s|·‖B_i‖·‖A_:j‖` (Cauchy and Schwarz on the standard bound of a dot product), `γ_r = r·u / (1 − r·u)`,
with u the unit roundoff of what Δ is computed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from adapterkit.delta import Update

# On the bound: for the rounding of the norms in it, and of the comparison itself.
MARGIN = 1 + 2.0**-10


@dataclass(frozen=True)
class Residual:
    """The recorded elements, by flat position: the steps from Ŵ to W among the values of the dtype, or W itself."""

    sure: torch.Tensor
    steps: torch.Tensor
    unsure: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.sure) + len(self.unsure)

    def to(self, device: torch.device) -> Residual:
        """The same on another device."""
        return Residual(*(getattr(self, field.name).to(device) for field in fields(self)))


def record(before: torch.Tensor, after: torch.Tensor, first: int, updates: Sequence[Update]) -> Residual:
    """What restores `before` from `after`, rows `first …` of a matrix, when `updates` are known again."""
    back = _subtracted(after, first, updates)
    low, high = (_ordered(end.to(before.dtype)) for end in _reach(back, after, first, updates))
    found, wanted = _ordered(back.to(before.dtype)), _ordered(before)
    # −0 − 0 is either zero, by the sign of the latter, on which sums need not agree.
    unsure = ((low != high) | ~back.isfinite() | ((after == 0) & after.signbit())).view(-1)
    sure = (found != wanted).view(-1) & ~unsure
    here, there = sure.nonzero()[:, 0].int(), unsure.nonzero()[:, 0].int()
    return Residual(here, (wanted - found).view(-1)[sure], there, before.reshape(-1)[unsure])


def restore(after: torch.Tensor, first: int, updates: Sequence[Update], residual: Residual) -> torch.Tensor:
    """The rows that `record` was given as `before`."""
    back = _ordered(_subtracted(after, first, updates).to(after.dtype)).view(-1)
    back[residual.sure.long()] += residual.steps
    restored = _from_ordered(back, after.dtype)
    restored[residual.unsure.long()] = residual.values
    return restored.view(after.shape)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left · right`, in any order, but on its own: summed onto W', every term would be rounded at the size of that."""
    return left @ right


def _subtracted(after: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """`W' − Δ`, in the dtype of the factors."""
    back = after.to(updates[0].left.dtype, copy=True)
    for update, rows, left in _inside(back, first, updates):
        rows.sub_(product(left, update.right), alpha=update.strength)
    return back


def _reach(back: torch.Tensor, after: torch.Tensor, first: int, updates: Sequence[Update]) -> list[torch.Tensor]:
    """The least and the greatest that `W' − Δ` can be, however its terms are added up.

    Rounding never crosses a number of its own precision, so the last subtraction can only land on a boundary between
    two values of the output that the exact difference is beside: one number to either side takes care of that.
    """
    limits = torch.finfo(back.dtype)
    unit = limits.eps / 2
    slack = torch.zeros_like(back)
    sizes = torch.zeros_like(back)  # Σ |s|·‖B_i‖·‖A_:j‖, which bounds |Δ|
    for update, part, left in _inside(slack, first, updates):
        terms = update.right.shape[0] + 3  # of the sum; and s, the norms, and s times the sum are rounded
        gamma = terms * unit / (1 - terms * unit)
        norms = left.norm(dim=1)[:, None] * update.right.norm(dim=0)
        part += norms * (abs(update.strength) * 2 * gamma * MARGIN)  # once for each of two ways to add up
        part += (norms > 0) * (2 * terms * limits.tiny * max(1.0, abs(update.strength)))  # what may be flushed to zero
        start = max(update.start, first) - first
        sizes[start : start + len(part)] += norms * abs(update.strength)
    if len(updates) > 1:  # then what comes after the first is subtracted from a number that is rounded already
        slack += (after.to(back.dtype).abs() + sizes) * (2 * (len(updates) - 1) * unit * MARGIN)
    slack = slack.nan_to_num_(nan=torch.inf)
    infinity = back.new_tensor(torch.inf)
    return [torch.nextafter(back - slack, -infinity), torch.nextafter(back + slack, infinity)]


def _inside(
    matrix: torch.Tensor, first: int, updates: Sequence[Update]
) -> Iterator[tuple[Update, torch.Tensor, torch.Tensor]]:
    """Each update with its rows of `matrix`, which begins with row `first`, and its left factor there."""
    for update in updates:
        start, stop = max(update.start, first), min(update.stop, first + len(matrix))
        if start < stop:
            left = update.left[start - update.start : stop - update.start]
            yield update, matrix[start - first : stop - first], left


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Floating point bits as integers in the order of the values, so that neighbours differ by one."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return bits ^ (bits >> (8 * values.element_size() - 1) & torch.iinfo(bits.dtype).max)


def _from_ordered(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values again; the mapping is its own inverse."""
    bits = steps ^ (steps >> (8 * steps.element_size() - 1) & torch.iinfo(steps.dtype).max)
    return bits.view(dtype)
