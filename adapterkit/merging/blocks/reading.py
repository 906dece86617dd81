"""Read rows of an edit's source tensor: dequantized, and with an adapter's replacements applied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from adapterkit.base.quant.weight import QuantizedWeight, Rows
from adapterkit.files.safetensors import TensorInfo, read_span, tensor_bytes
from adapterkit.merging.blocks.device import CPU, Buffers
from adapterkit.merging.blocks.overflow import check_finite
from adapterkit.merging.plan.edits import Edit, MergeEdit, RestoreEdit

GROUP_ROWS = 32  # searched for midpoints together


def compute_dtype(edit: Edit) -> torch.dtype:
    """float32 for plain updates of 16-bit weights; float64 where float32 would not round once."""
    stored = "" if edit.source is None else edit.source.dtype
    wide = edit.dtype not in ("BF16", "F16") or stored == "F64" or (stored == "F32" and isinstance(edit, RestoreEdit))
    others = isinstance(edit, MergeEdit) and (edit.replaced or edit.added)
    return torch.float64 if wide or others or edit.renormalizes else torch.float32


def chunk_rows(columns: int, chunk: int) -> int:
    """The number of rows in a chunk of at most `chunk` elements: whole groups, or a power of two if fewer."""
    rows = max(1, chunk // max(1, columns))
    return rows - rows % GROUP_ROWS if rows > GROUP_ROWS else 1 << rows.bit_length() - 1


def rows_at_a_time(edit: MergeEdit, chunk: int) -> int:
    """The number of rows in a chunk that splits no block of a quantized output."""
    step, together = chunk_rows(edit.matrix[1], chunk), edit.rows_together
    if edit.packing and edit.packing.rounding.kind == "compensated":  # runs by column: more rows need fewer calls
        step *= 4
    return max(together, step - step % together)


def read_rows(edit: Edit, packed: Rows | None, fd: int, first: int, last: int, buffers: Buffers) -> torch.Tensor | None:
    """Rows `first:last` of the source tensor in its own dtype, valid until the next read; None for new rows."""
    info = edit.source
    if first >= edit.source_rows:
        return None
    if packed is not None:
        return packed(first, last, partial(buffers.read, fd))
    assert isinstance(info, TensorInfo)
    _, columns = edit.matrix
    row = tensor_bytes(info.dtype, (columns,))
    start, stop = info.start + first * row, info.start + last * row
    return buffers.read(fd, replace(info, start=start, stop=stop, shape=(last - first, columns)))


def stored_rows(edit: Edit, fd: int, first: int, last: int) -> torch.Tensor:
    """The packed bytes of rows `first:last` of a quantized weight; those of the last row include any padding."""
    packed, (_, columns), depth = edit.source, edit.matrix, edit.source_rows
    assert isinstance(packed, QuantizedWeight)
    info = packed.stored
    start = info.start + first * columns * packed.bits // 8
    stop = info.stop if last == depth else info.start + last * columns * packed.bits // 8
    data = bytearray(stop - start)
    read_span(fd, memoryview(data), start, info.file)
    return torch.frombuffer(data, dtype=torch.uint8)


def base_rows(
    edit: MergeEdit, source: torch.Tensor | None, first: int, start: int, stop: int, buffers: Buffers
) -> torch.Tensor:
    """Rows `start:stop` of the base with replacements applied, to which the updates are added.

    `source` holds the base's rows from `first` on, or is None for new rows: the first values are taken whole, whatever
    their weight, and rows without any are zero, as in an extended bias.
    """
    shape, dtype, device = (stop - start, edit.matrix[1]), compute_dtype(edit), buffers.place.device
    if source is None:
        rows = torch.zeros(shape, dtype=dtype, device=device)
    else:
        rows = source[start - first : stop - first].to(dtype, copy=True)
    known = source is not None
    for change in edit.replaced:
        if change.rows is None:
            values = change.values.read_rows(start, stop).reshape(shape).to(device, dtype)
            at: slice | list[int] = slice(None)
        else:
            hits = [(index, row - start) for index, row in enumerate(change.rows) if start <= row < stop]
            if not hits:
                continue
            picked, at = [index for index, _ in hits], [row for _, row in hits]
            values = change.values.read()[picked].to(device, dtype)
        check_finite(values, edit.name)
        if change.weight == 1.0 or not known:
            rows[at] = values
        else:
            rows[at] += change.weight * (values - rows[at])
        known |= change.rows is None
    return rows


def base_chunks(edit: MergeEdit, packed: Rows | None, fd: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The whole base tensor as `(first row, rows)`, a chunk at a time."""
    buffers = Buffers()
    for start, stop in edit.spans(chunk_rows(edit.matrix[1], CPU.chunk)):
        yield start, base_rows(edit, read_rows(edit, packed, fd, start, stop, buffers), start, start, stop, buffers)
