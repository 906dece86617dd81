"""What it takes to undo a rounded sum bit for bit, whatever arithmetic undoes it.

`W' = round(W + Δ)` forgets: `Ŵ = round(W' − Δ)` is not always W. Where every arithmetic gives the same Ŵ, the steps
from that to W are recorded, if there are any; where `W' − Δ` lies so close to a boundary between two values that
another order of summation could round it the other way, the steps from W'. Sums differ from each other by no more than
the bound `γ_r·|s|·‖B_i‖·‖A_:j‖` (Cauchy and Schwarz on the standard bound of a dot product), `γ_r = r·u / (1 − r·u)`,
with u the unit roundoff of what Δ is computed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from adapterkit.delta import Update, add_updates

# On the bound: for the rounding of the norms in it, and of the comparison itself.
MARGIN = 1 + 2.0**-10


@dataclass(frozen=True)
class Residual:
    """The recorded elements, by flat position: `steps` are counted among the values of the dtype.

    At `sure` positions they lead from Ŵ to W, at `unsure` ones from W' to W.
    """

    sure: torch.Tensor
    sure_steps: torch.Tensor
    unsure: torch.Tensor
    unsure_steps: torch.Tensor

    def __len__(self) -> int:
        return len(self.sure) + len(self.unsure)

    def to(self, device: torch.device) -> Residual:
        """The same on another device."""
        return Residual(*(getattr(self, field.name).to(device) for field in fields(self)))


def record(before: torch.Tensor, after: torch.Tensor, first: int, updates: Sequence[Update]) -> Residual:
    """What restores `before` from `after`, rows `first …` of a matrix, when `updates` are known again."""
    back, slack = _subtracted(after, first, updates), _slack(after, first, updates)
    low, high = (_ordered((back + way).to(before.dtype)) for way in (-slack, slack))
    found, wanted, given = _ordered(back.to(before.dtype)), _ordered(before), _ordered(after)
    # −0 − 0 is either zero, by the sign of the latter, on which sums need not agree.
    unsure = ((low != high) | ~back.isfinite() | ((after == 0) & after.signbit())).view(-1)
    sure = (found != wanted).view(-1) & ~unsure
    here, there = sure.nonzero()[:, 0].int(), unsure.nonzero()[:, 0].int()
    return Residual(here, (wanted - found).view(-1)[sure], there, (wanted - given).view(-1)[unsure])


def restore(after: torch.Tensor, first: int, updates: Sequence[Update], residual: Residual) -> torch.Tensor:
    """The rows that `record` was given as `before`."""
    back = _ordered(_subtracted(after, first, updates).to(after.dtype)).view(-1)
    sure, unsure = residual.sure.long(), residual.unsure.long()
    back[sure] += residual.sure_steps
    back[unsure] = _ordered(after).view(-1)[unsure] + residual.unsure_steps
    return _from_ordered(back, after.dtype).view(after.shape)


def _subtracted(after: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """`W' − Δ`, in the dtype of the factors."""
    dtype = updates[0].left.dtype
    back = after.to(dtype, copy=True)
    negated = [Update(update.start, update.stop, update.left, update.right, -update.strength) for update in updates]
    add_updates(back, first, negated)
    return back


def _slack(after: torch.Tensor, first: int, updates: Sequence[Update]) -> torch.Tensor:
    """By how much `W' − Δ` may differ between two ways to compute it."""
    limits = torch.finfo(updates[0].left.dtype)
    unit = limits.eps / 2
    # Each update is one more addition to the sum, of |W'| at least; twice, once for each of the two ways.
    slack = after.to(updates[0].left.dtype).abs() * (2 * unit * (len(updates) + 1))
    for update in updates:
        start, stop = max(update.start, first), min(update.stop, first + len(after))
        if start < stop:
            terms = update.right.shape[0] + 4  # of the sum; rounding s, s·Σ, and adding that to W' and to others
            gamma = terms * unit / (1 - terms * unit)
            rows = update.left[start - update.start : stop - update.start].norm(dim=1)
            norms = rows[:, None] * update.right.norm(dim=0)
            bound = norms * (abs(update.strength) * 2 * gamma * MARGIN)
            # Products below the least normal number may be flushed to zero.
            flushed = (norms > 0) * (2 * terms * limits.tiny * max(1.0, abs(update.strength)))
            slack[start - first : stop - first] += bound + flushed
    return slack.nan_to_num_(nan=torch.inf)


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Floating point bits as integers in the order of the values, so that neighbours differ by one."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    return bits ^ (bits >> (8 * values.element_size() - 1) & torch.iinfo(bits.dtype).max)


def _from_ordered(steps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values again; the mapping is its own inverse."""
    bits = steps ^ (steps >> (8 * steps.element_size() - 1) & torch.iinfo(steps.dtype).max)
    return bits.view(dtype)
