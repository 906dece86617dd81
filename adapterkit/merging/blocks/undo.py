"""Record the undo of a block of rows when it is merged, and restore it.

Plain and DoRA updates leave a residual (`algebra/residual.py`). Replaced values, and residuals that would be larger,
leave the whole difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapterkit.algebra.residual import joined, marked, nothing, record, subtracted
from adapterkit.algebra.updates import Update, gains, linear
from adapterkit.errors import FormatError
from adapterkit.kernels.cpu import subtract_rounded
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.residual_codec import (
    correct,
    encode,
    encode_difference,
    is_difference,
    restore_difference,
)
from adapterkit.merging.plan.edits import Recorded

SPARSE = 0.2  # above this share of recorded elements, the whole difference may be smaller


@dataclass(frozen=True, slots=True)
class Undo:
    """The data that restores a block: an encoded residual or difference, and float64 gains of DoRA updates, in `shape`.

    For a quantized block, `numbers` corrects the packed bytes that its values do not determine.
    """

    code: bytes
    gains: bytes = b""
    shape: tuple[int, ...] = ()
    numbers: bytes = b""


def undo_nothing(before: torch.Tensor) -> Undo:
    """The undo of rows that no update changes."""
    return Undo(encode(nothing(before)))


def undo_marked(updates: Sequence[Update], before: torch.Tensor, after: torch.Tensor, at: torch.Tensor) -> Undo:
    """The undo of plain updates if subtraction restores every element except those at `at`."""
    return Undo(encode(marked(before, after, updates, at)))


def undo(
    updates: Sequence[Update], before: torch.Tensor, first: int, after: torch.Tensor, step: int, dtype: torch.dtype
) -> Undo:
    """The undo of any updates, computed in `dtype`, on rows from `first` on, `step` rows at a time."""
    if not updates:
        return undo_nothing(before)
    parts, found = [], []
    for start in range(0, len(before), step):
        old, new = before[start : start + step], after[start : start + step]
        gain = gains(old.to(dtype), first + start, updates)
        plain, factor = linear((len(old), old.shape[1]), first + start, updates, gain)
        parts.append(record(old, new, first + start, plain, factor).moved(start * old.shape[1]))
        found.append(gain)
    code = encode(joined(parts))
    if sum(map(len, parts)) > SPARSE * before.numel():
        whole = difference(before, after)
        if len(whole.code) < len(code):
            return whole
    every = found[0] if _by_column(updates) else torch.cat(found, dim=1)
    return Undo(code, every.cpu().numpy().tobytes(), tuple(every.shape) if every.numel() else ())


def difference(before: torch.Tensor, after: torch.Tensor) -> Undo:
    """The undo that restores values from any others."""
    return Undo(encode_difference(before, after))


def restore(
    recorded: Recorded,
    updates: Sequence[Update],
    after: torch.Tensor,
    out: torch.Tensor,
    step: int,
    buffers: Buffers | None,
) -> None:
    """Restore `out` from `after`, rows from `recorded.first` on; with `buffers`, subtract plain updates in float32.

    Raises FormatError if the code is not for this number of elements, or lacks DoRA's gains.
    """
    info = recorded.residual
    code, where = bytes(info.read_bytes()), f"{info.file}: {info.name}"
    if is_difference(code):
        restore_difference(code, after, out, where)
        return
    if recorded.gains is None and any(update.renormalizes for update in updates):
        raise FormatError(f"{where}: no gains, which are needed to undo DoRA")
    if buffers is not None:
        chunk = min(len(out), step), out.shape[1]
        subtract_rounded(after, recorded.first, updates, out, buffers.sums(*chunk), buffers.products(*chunk))
    else:
        every = recorded.gains.read().to(out.device) if recorded.gains else torch.empty(0, 0, dtype=torch.float64)
        for start in range(0, len(out), step):
            rows, first = after[start : start + step], recorded.first + start
            gain = every if _by_column(updates) else every[:, start : start + step]
            plain, factor = linear((len(rows), out.shape[1]), first, updates, gain)
            out[start : start + step] = subtracted(rows, first, plain, factor).to(out.dtype)
    correct(code, out, where)


def _by_column(updates: Sequence[Update]) -> bool:
    """Whether DoRA's gains are by column, each measured on the whole matrix."""
    return any(update.gain is not None for update in updates)
