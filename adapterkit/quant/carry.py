"""The loop of compensated rounding, compiled: a call a column is thousands of calls a weight (see `fused.py`)."""

from __future__ import annotations

import warnings

import torch


def _carried(columns: torch.Tensor, units: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """The index of a code for `columns (columns, rows)`, each with the error of the one before, in `units` of its own.

    At most half of the greatest step is carried on, so that what is beyond the codes does not pile up.
    """
    most = float((code[1:] - code[:-1]).max()) / 2
    index = torch.empty_like(columns, dtype=torch.int32)
    error = torch.zeros_like(columns[0])
    for j in range(columns.shape[0]):
        value = columns[j] + torch.where(units[j] > 0, error / units[j], torch.zeros_like(error))
        torch.bucketize(value, bounds, out_int32=True, out=index[j])
        error = (value - code.index_select(0, index[j])).clamp_(-most, most) * units[j]
    return index


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    _loop = torch.jit.script(_carried)


def carry_errors(scaled: torch.Tensor, unit: torch.Tensor, code: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """`choose` for compensated rounding: `scaled` and `unit` are `(rows, columns)`."""
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        return _loop(scaled.T.contiguous(), unit.T.contiguous(), code, bounds).T  # type: ignore[no-any-return]
