"""One block of rows of an edited tensor: read it, change it in cache-sized chunks, round it once.

Threads and output files are the caller's; the device is that of the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch

from adapterkit.algebra.rounding import on_midpoints, round_once
from adapterkit.algebra.updates import Retention, Update, add_updates, exact_sum, retention
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TORCH_NAMES
from adapterkit.kernels.cpu import add_rounded
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.loading import Loaded
from adapterkit.merging.blocks.overflow import check_packable, check_range, check_scales
from adapterkit.merging.blocks.reading import (
    GROUP_ROWS,
    base_rows,
    chunk_rows,
    compute_dtype,
    read_rows,
    rows_at_a_time,
    stored_rows,
)
from adapterkit.merging.blocks.residual_codec import correct_bytes, encode_bytes
from adapterkit.merging.blocks.undo import Undo, difference, restore, undo, undo_marked, undo_nothing
from adapterkit.merging.plan.edits import MergeEdit, Recorded, RestoreEdit


@dataclass(frozen=True, slots=True)
class MergedRows:
    """A merged block: its retention if measured, its undo if recorded, and whether it differs from the base."""

    retention: Retention | None = None
    undo: Undo | None = None
    changed: bool = False


def merge_rows(
    loaded: Loaded[MergeEdit],
    first: int,
    last: int,
    buffers: Buffers,
    into: memoryview,
    *,
    measured: int = 0,
    undoable: bool = False,
) -> MergedRows:
    """Compute rows `first:last` of an edit into the bytes `into`.

    Retention is measured on the first `measured` rows; the undo is computed if `undoable`. Raises FitError if a finite
    input becomes infinite in the output dtype.
    """
    edit = loaded.edit
    if not into:
        return MergedRows()
    source = read_rows(edit, loaded.packed, loaded.fd, first, last, buffers)
    _check_original(loaded, source, first, last)
    out = buffers.output(into, getattr(torch, TORCH_NAMES[edit.dtype])).view(-1, edit.matrix[1])
    undone = None
    if source is not None and compute_dtype(edit) is torch.float32:
        recorded = undoable and edit.as_trained is None
        squares, undone = _merge_plain(source, first, loaded.updates, out, buffers, recorded)
    else:
        by_chunk = []
        for start, sums in _sums(loaded, source, first, last, buffers):
            out[start - first :][: len(sums)] = round_once(sums, out.dtype)
            by_chunk.append((flat := sums.view(-1)).dot(flat))
        squares = torch.stack(by_chunk)
    check_range(edit, squares, out, source, first)
    if undoable and source is not None:
        undone = _undo(loaded, source, first, out, undone, buffers)
    changed = not _same(source, out)
    buffers.deliver(out, into)
    if not measured:
        return MergedRows(None, undone, changed)
    total = Retention()
    for start, sums in _sums(loaded, source, first, first + measured, buffers):
        before = base_rows(edit, source, first, start, start + len(sums), buffers)
        total += retention(before, sums, out[start - first :][: len(sums)])
    return MergedRows(total, undone, changed)


def _undo(
    loaded: Loaded[MergeEdit], source: torch.Tensor, first: int, out: torch.Tensor, found: Undo | None, buffers: Buffers
) -> Undo:
    """The undo that restores `source`, rows from `first` on, from `out`; `found` if only plain updates were added."""
    edit = loaded.edit
    if edit.as_trained is not None:  # `source` has lost what quantization loses
        stored = read_rows(edit, None, loaded.fd, first, first + len(source), buffers)
        assert stored is not None
        return difference(stored, out)
    if found is None and (edit.replaced or edit.added):
        found = difference(source, out)
    elif found is None:
        step = chunk_rows(edit.matrix[1], buffers.place.chunk)
        found = undo(loaded.updates, source, first, out, step, compute_dtype(edit))
    if loaded.codes is None:
        return found
    stored = stored_rows(edit, loaded.fd, first, first + len(source)).to(source.device)
    return replace(found, numbers=encode_bytes(stored, _filled(loaded.codes(source, first), len(stored))))


def _same(source: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Whether the rows equal the base's; usually the first row shows that they don't."""
    if source is None:
        return False
    return all(torch.equal(source[:rows].to(out.dtype), out[:rows]) for rows in (1, len(out)))


def restore_rows(loaded: Loaded[RestoreEdit], recorded: Recorded, buffers: Buffers, into: memoryview) -> None:
    """Restore the base's rows that a receipt has `recorded`, into the bytes `into`.

    Raises FormatError if the record does not fit the rows.
    """
    edit, columns = loaded.edit, loaded.edit.matrix[1]
    after = read_rows(edit, None, loaded.fd, recorded.first, recorded.last, buffers)
    assert after is not None
    dtype, step = getattr(torch, TORCH_NAMES[edit.dtype]), chunk_rows(columns, buffers.place.chunk)
    codes = loaded.codes
    out = buffers.output(into, dtype).view(-1, columns) if codes is None else torch.empty_like(after, dtype=dtype)
    restore(recorded, loaded.updates, after, out, step, buffers if compute_dtype(edit) is torch.float32 else None)
    if codes is None:
        buffers.deliver(out, into)
        return
    stored = _filled(codes(out, recorded.first), len(into))
    if (more := recorded.numbers) is not None:
        correct_bytes(bytes(more.read_bytes()), stored, f"{more.file}: {more.name}")
    into[:] = stored.cpu().numpy().data


def pack_rows(loaded: Loaded[MergeEdit], first: int, last: int, buffers: Buffers, into: memoryview) -> None:
    """Compute rows `first:last` of an edit and quantize them into `into`. Raises FitError if they are not finite."""
    edit, packing, packer = loaded.edit, loaded.edit.packing, loaded.packer
    assert packing is not None and packer is not None
    source = read_rows(edit, loaded.packed, loaded.fd, first, last, buffers)
    _check_original(loaded, source, first, last)
    for start, sums in _sums(loaded, source, first, last, buffers):
        check_packable(edit.name, sums, packing)
        at = edit.offset(start) - edit.offset(first)
        packed = packer.pack(sums.float(), start)
        into[at : at + len(packed)] = packed.cpu().numpy().data


def finish_packing(loaded: Loaded[MergeEdit], buffers: Buffers) -> tuple[list[bytes], Retention | None]:
    """The other tensors of a quantized weight, once all rows are packed, and the retention of its update."""
    edit, packer, depth = loaded.edit, loaded.packer, loaded.edit.matrix[0]
    assert packer is not None and edit.packing is not None
    parts = packer.finish()
    check_scales(edit.name, packer.max_magnitude(), edit.packing)
    if not edit.deltas or edit.replaced:
        return parts, None
    total, step = Retention(), rows_at_a_time(edit, buffers.place.chunk)
    for first in range(0, depth, step):
        last = min(depth, first + step)
        source = read_rows(edit, loaded.packed, loaded.fd, first, last, buffers)
        before = base_rows(edit, source, first, first, last, buffers)
        [(_, sums)] = _sums(loaded, source, first, last, buffers)
        total += retention(before, sums, packer.unpack(packer.pack(sums.float(), first), first, last))
    return parts, total


def replayed(
    loaded: Loaded[MergeEdit], first: int, last: int, buffers: Buffers, read_as: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `first:last` of the base, or zeros for a new tensor, and the same rows merged but not rounded.

    With `read_as` the base is rounded to that dtype first.
    """
    edit = loaded.edit
    source = read_rows(edit, loaded.packed, loaded.fd, first, last, buffers)
    if source is not None and read_as is not None:
        source = source.to(read_as)
    before = torch.zeros(last - first, edit.matrix[1], dtype=compute_dtype(edit))
    if source is not None:
        before.copy_(source)
    return before, torch.cat([sums for _, sums in _sums(loaded, source, first, last, buffers)])


def _merge_plain(
    source: torch.Tensor, first: int, updates: Sequence[Update], out: torch.Tensor, buffers: Buffers, undoable: bool
) -> tuple[torch.Tensor, Undo | None]:
    """Add plain updates to 16-bit weights; return the sum of squares of each chunk, and the undo."""
    rows, columns = out.shape
    here = [update for update in updates if update.start < first + rows and first < update.stop]
    step = min(rows, chunk_rows(columns, buffers.place.chunk))
    squares, doubtful = add_plain(
        source,
        first,
        here,
        out,
        buffers,
        step=step,
        depth=gcd(rows, step, GROUP_ROWS),
        undoable=undoable and bool(here),
    )
    if not undoable:
        return squares, None
    return squares, undo_nothing(source) if doubtful is None else undo_marked(here, source, out, doubtful)


def add_plain(
    source: torch.Tensor,
    first: int,
    updates: Sequence[Update],
    out: torch.Tensor,
    buffers: Buffers,
    *,
    step: int,
    depth: int,
    undoable: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Add plain updates in float32, `step` rows at a time; sums near a midpoint are then computed exactly.

    Midpoints are searched for in groups of `depth` rows, which divides `step` and the number of rows. Returns the sum
    of squares of each chunk, and if `undoable` the flat positions that subtraction may not restore.
    """
    sums, products = buffers.sums(step, out.shape[1]), buffers.products(step, out.shape[1])
    doubts = buffers.doubts(source) if undoable else None
    squares, least = add_rounded(source, first, updates, out, sums, products, depth, doubts)
    i, j = on_midpoints(least, depth)
    if len(i):
        settled = round_once(exact_sum(source, first, updates, i, j), out.dtype)
        if doubts is not None:
            doubts.changed(i, j, out[i, j], settled)
        out[i, j] = settled
    return squares, None if doubts is None else doubts.found(source, squares)


def _sums(
    loaded: Loaded[MergeEdit], source: torch.Tensor | None, first: int, last: int, buffers: Buffers
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows `first:last` merged but not rounded, as `(first row, rows)`, a chunk at a time."""
    edit = loaded.edit
    step = rows_at_a_time(edit, buffers.place.chunk)
    for start in range(first, last, step):
        stop = min(last, start + step)
        sums = base_rows(edit, source, first, start, stop, buffers)
        add_updates(sums, start, loaded.updates)
        for vector in loaded.added:
            sums.add_(vector[start:stop])
        yield start, sums


def _filled(raw: torch.Tensor, size: int) -> torch.Tensor:
    """`raw` padded with zeros to `size` bytes."""
    return torch.cat([raw, raw.new_zeros(size - len(raw))]) if len(raw) < size else raw


def _check_original(loaded: Loaded[MergeEdit], source: torch.Tensor | None, first: int, last: int) -> None:
    """Raise FitError unless quantizing the original can give the quantized base.

    Both may have been rounded to 16 bits: the original before quantization, the base by dequantization.
    """
    quantized, name = loaded.checked_against, loaded.edit.name
    if quantized is None or source is None:
        return
    other = quantized.rows(first, last, lambda info: info.read().to(source.device)).float()
    slack = quantized.slack(first, last).to(source.device)
    rounding = (source.float().abs() + other.abs()) * 2**-8 + 2**-24  # in bf16 of both, or fp16 near zero
    off = (source.float() - other).abs() > slack + rounding
    if bool(off.any()):
        i, j = off.nonzero()[0].tolist()
        here, there = float(source[i, j]), float(other[i, j])
        raise FitError(
            f"{name}: [{first + i}, {j}] is {here:.6g} in the original but {there:.6g} in the quantized base, "
            "more than quantization explains",
            hint="give the model that was quantized as `original`",
        )
