"""How far a correct merge may lie from the exact one, in the arithmetic of common tools.

Tools compute `round(W + s·B·A)` in float32, in any order of summation: each element then has an error of at most
`γ_{r+3}·(|W| + |s|·|B|·|A|)`, with `γ_k = k·u / (1 − k·u)` (Higham, 2002, section 3.5). It is not relative to Δ,
whose terms may cancel. Some tools also round Δ on its own to 16 bits, once or, around the scaling, twice; those that
merge several adapters one after another round each sum.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import frexp, sqrt

import torch

from adapterkit.algebra.dora import row_gain
from adapterkit.algebra.residual import gamma
from adapterkit.algebra.updates import Update

FLOAT32 = torch.finfo(torch.float32).eps / 2  # the unit roundoff


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of W from `first` on, of W' before rounding, and of each adapter's Δ, in float64."""

    first: int
    before: torch.Tensor
    exact: torch.Tensor
    deltas: list[torch.Tensor]


class Tolerance:
    """The bounds for one tensor: `fine`, and `coarse` for tools whose arithmetic changes most of the elements.

    Args:
        updates: The updates in float64.
        result: The dtype to which W' is rounded.
        stored: The dtypes of the factors; a tool may compute Δ in them.
        written: The dtype in which W' is written; `result` by default.
    """

    def __init__(
        self, updates: Sequence[Update], result: torch.dtype, stored: Iterable[torch.dtype],
        written: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.result = result
        self.written = written if written not in (None, result) and written.itemsize == 2 else None
        narrow = {dtype for dtype in stored if dtype.itemsize == 2}
        self.usual = narrow | {result} if result.itemsize == 2 else set()  # Δ may be rounded to these
        self.renormalized = [update for update in updates if update.renormalizes]
        self.coarser = narrow if result.itemsize > 2 else self.usual if self.renormalized else set()
        self.strengths = {abs(update.strength) for update in updates} - {0.0}
        self.updates = [(update, _magnified(update)) for update in updates]

    def fine(self, rows: Rows) -> torch.Tensor:
        """The largest error if W + Δ is computed in float32."""
        return self._rounded(rows.exact, self._error(rows, self.usual))

    def coarse(self, rows: Rows, found: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The expected values and their largest error, if all is computed in 16 bits; None if no tool would.

        Then a DoRA gain, m/n with both n and the quotient rounded, is off by the same factor in a whole row.
        """
        if not self.coarser:
            return None
        exact, error = rows.exact, self._error(rows, self.usual | self.coarser)
        by_row = all(update.gain is None for update in self.renormalized)
        if self.renormalized and self.result.itemsize == 2 and by_row and len(rows.deltas) == 1:
            unit = max(torch.finfo(dtype).eps / 2 for dtype in self.coarser)
            squares = exact.square().sum(1, keepdim=True)
            factor = torch.where(squares > 0, (found * exact).sum(1, keepdim=True) / squares, 1.0)
            exact = exact * factor.clamp(1 - 2 * unit, 1 + 2 * unit)
            error = error + unit * exact.abs()  # of V = W + Δ
        return exact, self._rounded(exact, error)

    def _rounded(self, exact: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        error = error + half_unit(exact.abs() + error, self.result)
        return error if self.written is None else error + half_unit(exact.abs() + error, self.written)

    def _error(self, rows: Rows, dtypes: Collection[torch.dtype]) -> torch.Tensor:
        """The error of W', before it is rounded, if Δ is rounded to `dtypes`."""
        error = torch.zeros_like(rows.exact)
        for update, magnified in self.updates:
            start, stop = max(update.start, rows.first), min(update.stop, rows.first + len(error))
            if start >= stop:
                continue
            here, own = slice(start - rows.first, stop - rows.first), slice(start - update.start, stop - update.start)
            product = (magnified.left[own] @ magnified.right).double() * magnified.strength
            product.add_(rows.before[here].abs(), alpha=_gamma(update))  # a sum may begin with W
            if update.renormalizes:
                product = self._of_direction(update, own, rows.before[here], product, dtypes)
            error[here] += product
        for delta in rows.deltas:
            for dtype in dtypes if not self.renormalized else {self.result}.intersection(dtypes):
                error += self._of_delta(delta, dtype)
            if self.renormalized:  # W + (W' − W), in the result's dtype: rounded twice where the difference is inexact
                error += torch.where(delta.abs() > rows.before.abs(), half_unit(rows.exact, self.result), 0.0)
        if len(rows.deltas) > 1:
            largest = rows.before.abs() + torch.stack(rows.deltas).abs().sum(0)
            error += (len(rows.deltas) - 1) * half_unit(largest, self.result)
        if self.result.itemsize == 2:  # W + Δ is rounded to float32 first
            error.add_(rows.exact.abs(), alpha=FLOAT32)
        return error

    def _of_delta(self, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The error of rounding Δ to `dtype` before and after it is multiplied by its strength."""
        once = error = half_unit(delta, dtype)
        for s in self.strengths:
            before = half_unit(delta / s, dtype) * s
            twice = before + once
            if frexp(s)[0] == 0.5:  # a power of two multiplies exactly, except into the subnormals
                twice = torch.where(delta.abs() < torch.finfo(dtype).tiny, twice, torch.maximum(before, once))
            error = torch.maximum(error, twice)
        return error

    def _of_direction(
        self, update: Update, own: slice, before: torch.Tensor, error: torch.Tensor, dtypes: Collection[torch.dtype]
    ) -> torch.Tensor:
        """The error of a DoRA update `w·(m/n·V − W)` from the `error` of the product in `V = W + s·B·A`.

        A norm of k squares has a relative error of about `√k·u` (Higham and Mary, 2019), besides that of its elements.
        """
        assert update.magnitude is not None
        delta = (update.left[own] @ update.right) * update.strength
        direction = before + delta
        for dtype in dtypes:
            error = error + self._of_delta(delta, dtype)
        error = error + FLOAT32 * direction.abs()
        gain = row_gain(direction, update.magnitude[own]) if update.gain is None else update.gain
        dim = 1 if update.gain is None else 0
        square = direction.square().sum(dim, keepdim=True)
        # The errors of the elements have either sign: 4 deviations of their sum, at most all of them.
        together = (error * direction).square().sum(dim, keepdim=True).sqrt() * 4
        most = (error * direction.abs()).sum(dim, keepdim=True)
        off = torch.where(square > 0, torch.minimum(together, most) / square, 0.0)
        off = off + (sqrt(direction.shape[dim]) + 3) * FLOAT32
        return abs(update.weight) * gain.abs() * (error + off * direction.abs())


def half_unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place of `dtype` at each of `values`: the error of rounding them."""
    limit = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=limit.tiny)))) * (limit.eps / 2)


def _magnified(update: Update) -> Update:
    """`γ·|s|·|B|·|A|`, the error of a product in float32."""
    return replace(
        update, left=update.left.abs().float(), right=update.right.abs().float(),
        strength=abs(update.strength) * _gamma(update),
    )  # fmt: skip


def _gamma(update: Update) -> float:
    """The relative error of summing the terms of a product in float32."""
    return gamma(update.right.shape[0] + 3, torch.float32)
