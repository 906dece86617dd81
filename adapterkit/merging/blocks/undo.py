"""What undoes a block of rows, recorded when they are merged, and the undoing.

Plain updates and DoRA's leave a residual (`residual.py`). What takes the place of the base's own values, and what
leaves more than it is worth, leaves the whole difference.
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

SPARSE = 0.2  # above that share of recorded elements the whole difference may take less


@dataclass(frozen=True, slots=True)
class Undo:
    """What restores a block: in code, and as float64 the gains of DoRA's updates, by row or by column.

    And what of its bytes, where they are quantized, is not told by their values.
    """

    code: bytes
    gains: bytes = b""
    shape: tuple[int, ...] = ()
    numbers: bytes = b""


def undo_nothing(before: torch.Tensor) -> Undo:
    """What restores rows that no update touches."""
    return Undo(encode(nothing(before)))


def undo_marked(updates: Sequence[Update], before: torch.Tensor, after: torch.Tensor, at: torch.Tensor) -> Undo:
    """What takes plain updates out again, where all but the elements `at` come back by themselves."""
    return Undo(encode(marked(before, after, updates, at)))


def undo(
    updates: Sequence[Update], before: torch.Tensor, first: int, after: torch.Tensor, step: int, dtype: torch.dtype
) -> Undo:
    """What takes any updates, computed in `dtype`, out of rows `first …`; `step` rows at a time."""
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
    """What restores values whatever became of them."""
    return Undo(encode_difference(before, after))


def restore(
    recorded: Recorded,
    updates: Sequence[Update],
    after: torch.Tensor,
    out: torch.Tensor,
    step: int,
    buffers: Buffers | None,
) -> None:
    """Restore `out` from `after`, rows `recorded.first …`; with `buffers` plain updates in float32.

    Raises FormatError where the code is not that of so many elements, or lacks gains.
    """
    info = recorded.residual
    code, where = bytes(info.read_bytes()), f"{info.file}: {info.name}"
    if is_difference(code):
        restore_difference(code, after, out, where)
        return
    if recorded.gains is None and any(update.renormalizes for update in updates):
        raise FormatError(f"{where}: is without gains, which DoRA is not undone without")
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
    """Whether DoRA's gains go by column: each is measured over the whole matrix."""
    return any(update.gain is not None for update in updates)
