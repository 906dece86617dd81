"""Round columns with error compensation, in compiled loops: there are thousands of columns per weight."""

from __future__ import annotations

import warnings

import torch


def _compensated_next(
    columns: torch.Tensor, units: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """Round each of `columns (columns, rows)` to the index of a code, carrying its error over to the next column.

    Values are in `units` of their own. At most half of the largest step is carried over, so that the errors of values
    outside the range of codes don't accumulate.
    """
    limit = float((code[1:] - code[:-1]).max()) / 2
    index = torch.empty_like(columns, dtype=torch.int32)
    error = torch.zeros_like(columns[0])
    for j in range(columns.shape[0]):
        value = columns[j] + torch.where(units[j] > 0, error / units[j], torch.zeros_like(error))
        torch.bucketize(value, bounds, out_int32=True, out=index[j])
        error = (value - code.index_select(0, index[j])).clamp_(-limit, limit) * units[j]
    return index


def _compensated_all(
    columns: torch.Tensor, units: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor, shares: torch.Tensor
) -> torch.Tensor:
    """Round like `_compensated_next`, but distribute each error over all later columns of its span (GPTQ, algorithm 1).

    arXiv 2210.17323. `shares (columns, width)`: row j holds the factors of column j's error for the columns of its span
    of `width`. The errors of a batch of columns reach the columns after it in one matrix product.
    """
    batch, width, count = 64, shares.shape[1], columns.shape[0]
    values = columns * units
    index = torch.empty_like(columns, dtype=torch.int32)
    errors = torch.empty_like(columns[:batch])
    for start in range(0, count, width):
        stop = min(count, start + width)
        for low in range(start, stop, batch):
            high = min(stop, low + batch)
            for j in range(low, high):
                scaled = torch.where(units[j] > 0, values[j] / units[j], torch.zeros_like(values[j]))
                torch.bucketize(scaled, bounds, out_int32=True, out=index[j])
                errors[j - low] = values[j] - code.index_select(0, index[j]) * units[j]
                if j + 1 < high:
                    values[j + 1 : high].addr_(shares[j, j + 1 - start : high - start], errors[j - low], alpha=-1)
            if high < stop:
                part = shares[low:high, high - start : stop - start]
                values[high:stop].addmm_(part.t(), errors[: high - low], alpha=-1)
    return index


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _next, _all = torch.jit.script(_compensated_next), torch.jit.script(_compensated_all)


def compensated_codes(
    scaled: torch.Tensor, unit: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor, shares: torch.Tensor | None
) -> torch.Tensor:
    """Do `choose_codes` with compensated rounding: `scaled` and `unit` are `(rows, columns)`."""
    columns, units = scaled.T.contiguous(), unit.T.contiguous()
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        if shares is None:
            index: torch.Tensor = _next(columns, units, code, bounds)
        else:
            index = _all(columns, units, code, bounds, shares.to(columns.device))
    return index.T
