"""One block of rows of one edited tensor: read it, change it a cache-sized chunk at a time, round it once.

Nothing here knows about threads, or files beyond a descriptor to read from. The buffers know where to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import gcd

import torch

from adapterkit.adapter.weights import load_weights
from adapterkit.algebra.rounding import on_midpoints, round_once
from adapterkit.algebra.updates import Retention, Update, add_updates, exact_sum, measure_columns, retention, update_for
from adapterkit.base.quant.weight import Codes, QuantizedWeight, Quantizer, Rows
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TORCH_NAMES, TensorInfo, read_span, tensor_bytes
from adapterkit.kernels.cpu import add_rounded
from adapterkit.merging.blocks.device import CPU, Buffers, ComputeDevice
from adapterkit.merging.blocks.limits import check_finite, check_packable, check_range, check_scales
from adapterkit.merging.blocks.residual_codec import correct_bytes, encode_bytes
from adapterkit.merging.blocks.undo import Undo, difference, restore, undo, undo_marked, undo_nothing
from adapterkit.merging.plan.types import Edit, Recorded

GROUP_ROWS = 32  # how many rows the search for midpoints takes together


@dataclass(frozen=True)
class LoadedEdit:
    """What an edit needs in memory, at the place where it is computed.

    Its factors, the vectors added to a bias, and what quantized weights need, which goes where their rows are.
    """

    place: ComputeDevice
    updates: list[Update]
    added: list[torch.Tensor]
    packed: Rows | None
    codes: Codes | None
    packer: Quantizer | None
    twin: Twin | None

    def at(self, place: ComputeDevice) -> LoadedEdit:
        """The same at another place."""
        updates = [update.to(place.device) for update in self.updates]
        return replace(self, place=place, updates=updates, added=[vector.to(place.device) for vector in self.added])


@dataclass(frozen=True)
class Twin:
    """What was quantized from the source, and how far it may be from that."""

    rows: Rows
    slack: Callable[[int, int], torch.Tensor]


def load(edit: Edit, fd: int) -> LoadedEdit:
    """Read the factors of `edit`; raises FitError where one is not finite."""
    depth, columns = edit.matrix
    dtype = _compute_dtype(edit)
    packed = edit.source.open(columns) if isinstance(edit.source, QuantizedWeight) else None
    updates: list[Update] = []
    for delta in edit.deltas:
        target = delta.target
        update = update_for(
            load_weights(delta.weights), delta.weight, target.rows or (0, depth), target.of, target.expert,
            target.transposed, dtype, where=delta.module,
        )  # fmt: skip
        if update.magnitude is not None and target.transposed and not edit.recorded:
            update = measure_columns(update, lambda: _base_chunks(edit, packed, fd))
        elif update.magnitude is not None and target.transposed:
            by_column = next((one.gains for one in edit.recorded if one.gains is not None), None)
            if by_column is not None:  # else no block needs them
                update = replace(update, gain=by_column.read()[sum(one.renormalizes for one in updates)][None])
        updates.append(update)
    added = []
    for addition in edit.added:
        vector = addition.vector.read().to(dtype) * addition.scale
        check_finite(vector, edit.name)
        added.append(vector[:, None])
    packer = edit.packing.start(columns) if edit.packing else None
    twin = Twin(edit.twin.open(columns), edit.twin.slack(columns)) if edit.twin else None
    quantized = edit.quantized or (edit.source if isinstance(edit.source, QuantizedWeight) else None)
    codes = quantized.codes(columns) if quantized and not edit.packing else None
    return LoadedEdit(CPU, updates, added, packed, codes, packer, twin)


def merge_rows(
    edit: Edit,
    loaded: LoadedEdit,
    fd: int,
    first: int,
    last: int,
    buffers: Buffers,
    into: memoryview,
    measured: int,
    undoable: bool,
) -> tuple[Retention | None, Undo | None, bool]:
    """Compute rows `first:last` of `edit` as bytes `into`.

    Returns what rounding kept of the first `measured` of them, what restores the base's, if they are `undoable`, and
    whether any differs from the base's.
    Raises FitError where a finite input becomes infinite in the output dtype.
    """
    _, columns = edit.matrix
    if not into:
        return None, None, False
    source = _read_rows(edit, loaded.packed, fd, first, last, buffers)
    _check_twin(edit, loaded, source, first, last)
    out = buffers.output(into, getattr(torch, TORCH_NAMES[edit.dtype])).view(-1, columns)
    undone = None
    if source is not None and _compute_dtype(edit) is torch.float32:
        squares, undone = _merge_plain(source, first, loaded.updates, out, buffers, undoable)
    else:
        by_chunk = []
        for start, sums in _sums(edit, loaded, source, first, last, buffers):
            out[start - first :][: len(sums)] = round_once(sums, out.dtype)
            by_chunk.append((flat := sums.view(-1)).dot(flat))
        squares = torch.stack(by_chunk)
    check_range(edit, squares, out, source, first)
    if undoable and undone is None and source is not None:
        if edit.replaced or edit.added:
            undone = difference(source, out)
        else:
            step = _chunk_rows(columns, buffers.place.chunk)
            undone = undo(loaded.updates, source, first, out, step, _compute_dtype(edit))
    if undone is not None and loaded.codes is not None:
        assert source is not None
        stored = _stored_rows(edit, fd, first, last)
        undone = replace(undone, numbers=encode_bytes(stored, _filled(loaded.codes(source, first), len(stored))))
    changed = not _same(source, out)
    buffers.deliver(out, into)
    if not measured:
        return None, undone, changed
    kept = Retention()
    for start, sums in _sums(edit, loaded, source, first, first + measured, buffers):
        before = _base_rows(edit, source, first, start, start + len(sums), buffers)
        kept += retention(before, sums, out[start - first :][: len(sums)])
    return kept, undone, changed


def _same(source: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Whether the rows are the base's; mostly the first tells that they are not."""
    if source is None:
        return False
    return all(torch.equal(source[:rows].to(out.dtype), out[:rows]) for rows in (1, len(out)))


def restore_rows(
    edit: Edit, loaded: LoadedEdit, fd: int, recorded: Recorded, buffers: Buffers, into: memoryview
) -> None:
    """Restore the base's rows of `edit` that a receipt has `recorded`, as bytes `into`.

    Raises FormatError where what it holds cannot belong to them.
    """
    _, columns = edit.matrix
    after = _read_rows(edit, None, fd, recorded.first, recorded.last, buffers)
    assert after is not None
    dtype, step = getattr(torch, TORCH_NAMES[edit.dtype]), _chunk_rows(columns, buffers.place.chunk)
    codes = loaded.codes
    out = buffers.output(into, dtype).view(-1, columns) if codes is None else torch.empty_like(after, dtype=dtype)
    restore(recorded, loaded.updates, after, out, step, buffers if _compute_dtype(edit) is torch.float32 else None)
    if codes is None:
        buffers.deliver(out, into)
        return
    stored = _filled(codes(out, recorded.first), len(into))
    if (more := recorded.numbers) is not None:
        correct_bytes(bytes(more.read_bytes()), stored, f"{more.file}: {more.name}")
    into[:] = stored.cpu().numpy().data


def pack_rows(
    edit: Edit, loaded: LoadedEdit, fd: int, first: int, last: int, buffers: Buffers, into: memoryview
) -> None:
    """Compute rows `first:last` of `edit` and quantize them into `into`. Raises FitError where they are not finite."""
    packing, packer = edit.packing, loaded.packer
    assert packing is not None and packer is not None
    source = _read_rows(edit, loaded.packed, fd, first, last, buffers)
    _check_twin(edit, loaded, source, first, last)
    for start, sums in _sums(edit, loaded, source, first, last, buffers):
        check_packable(edit.name, sums, packing)
        at = edit.offset(start) - edit.offset(first)
        packed = packer.pack(sums.float(), start)
        into[at : at + len(packed)] = packed.cpu().numpy().data


def finish_packing(edit: Edit, loaded: LoadedEdit, fd: int, buffers: Buffers) -> tuple[list[bytes], Retention | None]:
    """The other tensors of a quantized weight of which all rows are packed, and what is kept of its update."""
    packer, depth = loaded.packer, edit.matrix[0]
    assert packer is not None and edit.packing is not None
    parts = packer.finish()
    check_scales(edit.name, packer.most(), edit.packing)
    if not edit.deltas or edit.replaced:
        return parts, None
    kept, step = Retention(), _step(edit, buffers.place.chunk)
    for first in range(0, depth, step):
        last = min(depth, first + step)
        source = _read_rows(edit, loaded.packed, fd, first, last, buffers)
        before = _base_rows(edit, source, first, first, last, buffers)
        [(_, sums)] = _sums(edit, loaded, source, first, last, buffers)
        kept += retention(before, sums, packer.unpack(packer.pack(sums.float(), first), first, last))
    return parts, kept


def replayed(
    edit: Edit, loaded: LoadedEdit, fd: int, first: int, last: int, buffers: Buffers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `first:last` of the base, zero where the tensor is new, and with everything added but not rounded."""
    source = _read_rows(edit, loaded.packed, fd, first, last, buffers)
    before = torch.zeros(last - first, edit.matrix[1], dtype=_compute_dtype(edit))
    if source is not None:
        before.copy_(source)
    return before, torch.cat([sums for _, sums in _sums(edit, loaded, source, first, last, buffers)])


def _merge_plain(
    source: torch.Tensor, first: int, updates: Sequence[Update], out: torch.Tensor, buffers: Buffers, undoable: bool
) -> tuple[torch.Tensor, Undo | None]:
    """Plain updates of 16-bit weights in float32, which rounds twice: what lands on a midpoint is settled after.

    Returns the sum of squares of each chunk, and what undoes it all.
    """
    rows, columns = out.shape
    here = [update for update in updates if update.start < first + rows and first < update.stop]
    step = _chunk_rows(columns, buffers.place.chunk)
    depth = gcd(rows, step, GROUP_ROWS)
    sums, products = buffers.sums(min(rows, step), columns), buffers.products(min(rows, step), columns)
    doubts = buffers.doubts(source) if undoable and here else None
    squares, least = add_rounded(source, first, here, out, sums, products, depth, doubts)
    i, j = on_midpoints(least, depth)
    settled = round_once(exact_sum(source, first, here, i, j), out.dtype)
    if doubts is not None:
        doubts.changed(i, j, out[i, j], settled)
    out[i, j] = settled
    if not undoable:
        return squares, None
    return squares, undo_marked(here, source, out, doubts.found(source, squares)) if doubts else undo_nothing(source)


def _sums(
    edit: Edit, loaded: LoadedEdit, source: torch.Tensor | None, first: int, last: int, buffers: Buffers
) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows `first:last` with everything added but not rounded yet, as `(first row, rows)`, a chunk at a time."""
    step = _step(edit, buffers.place.chunk)
    for start in range(first, last, step):
        stop = min(last, start + step)
        sums = _base_rows(edit, source, first, start, stop, buffers)
        add_updates(sums, start, loaded.updates)
        for vector in loaded.added:
            sums.add_(vector[start:stop])
        yield start, sums


def _chunk_rows(columns: int, chunk: int) -> int:
    """How many rows have `chunk` elements at most; where it is more than one group of them, whole groups."""
    rows = max(1, chunk // max(1, columns))
    return rows - rows % GROUP_ROWS if rows > GROUP_ROWS else 1 << rows.bit_length() - 1


def _step(edit: Edit, chunk: int) -> int:
    """How many rows to take at a time, so that no block of a quantized output is cut."""
    step, together = _chunk_rows(edit.matrix[1], chunk), edit.rows_together
    if edit.packing and edit.packing.rounding.kind == "compensated":  # goes by columns: the longer, the fewer calls
        step *= 4
    return max(together, step - step % together)


def _compute_dtype(edit: Edit) -> torch.dtype:
    """float32 for plain updates of 16-bit weights; float64 where float32 would not round once."""
    stored = "" if edit.source is None else edit.source.dtype
    wide = edit.dtype not in ("BF16", "F16") or stored == "F64" or (stored == "F32" and bool(edit.recorded))
    involved = edit.replaced or edit.added or any(delta.weights.magnitude for delta in edit.deltas)
    return torch.float64 if wide or involved else torch.float32


def _read_rows(
    edit: Edit, packed: Rows | None, fd: int, first: int, last: int, buffers: Buffers
) -> torch.Tensor | None:
    """Rows `first:last` of the source tensor in its own dtype, valid until the next; None where the tensor is new."""
    info = edit.source
    if packed is not None:
        return packed(first, last, partial(buffers.read, fd))
    if not isinstance(info, TensorInfo):
        return None
    _, columns = edit.matrix
    row = tensor_bytes(info.dtype, (columns,))
    start, stop = info.start + first * row, info.start + last * row
    return buffers.read(fd, replace(info, start=start, stop=stop, shape=(last - first, columns)))


def _stored_rows(edit: Edit, fd: int, first: int, last: int) -> torch.Tensor:
    """The bytes that rows `first:last` of a quantized weight are stored in; the last ones with what fills them up."""
    packed, (depth, columns) = edit.source, edit.matrix
    assert isinstance(packed, QuantizedWeight)
    info = packed.stored
    start = info.start + first * columns * packed.bits // 8
    stop = info.stop if last == depth else info.start + last * columns * packed.bits // 8
    data = bytearray(stop - start)
    read_span(fd, memoryview(data), start, info.file)
    return torch.frombuffer(data, dtype=torch.uint8)


def _filled(raw: torch.Tensor, size: int) -> torch.Tensor:
    """`raw` with zeros up to `size` bytes."""
    return torch.cat([raw, raw.new_zeros(size - len(raw))]) if len(raw) < size else raw


def _base_rows(
    edit: Edit, source: torch.Tensor | None, first: int, start: int, stop: int, buffers: Buffers
) -> torch.Tensor:
    """Rows `start:stop` of the base as the updates find it: what the adapter replaces is replaced.

    `source` holds rows `first …` of the base tensor, or is None where it is new.
    """
    shape, dtype, device = (stop - start, edit.matrix[1]), _compute_dtype(edit), buffers.place.device
    if source is None:
        rows = torch.empty(shape, dtype=dtype, device=device)
    else:
        rows = source[start - first : stop - first].to(dtype, copy=True)
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
        if change.weight == 1.0 or source is None:
            rows[at] = values
        else:  # a weighted adapter goes that share of the way to its own values
            rows[at] += change.weight * (values - rows[at])
    return rows


def _base_chunks(edit: Edit, packed: Rows | None, fd: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The whole base tensor as `(first row, rows)`, a chunk at a time."""
    depth, columns = edit.matrix
    step, buffers = _chunk_rows(columns, CPU.chunk), Buffers()
    for start in range(0, depth, step):
        stop = min(depth, start + step)
        yield start, _base_rows(edit, _read_rows(edit, packed, fd, start, stop, buffers), start, start, stop, buffers)


def _check_twin(edit: Edit, loaded: LoadedEdit, source: torch.Tensor | None, first: int, last: int) -> None:
    """Refuse an original that its quantized twin cannot have been made from.

    Both may have been rounded to 16 bits: the original before it was quantized, the twin when it was dequantized.
    """
    if loaded.twin is None or source is None:
        return
    other = loaded.twin.rows(first, last, lambda info: info.read().to(source.device)).float()
    slack = loaded.twin.slack(first, last).to(source.device)
    rounding = (source.float().abs() + other.abs()) * 2**-8 + 2**-24  # bf16's of both, or fp16's of the least
    off = (source.float() - other).abs() > slack + rounding
    if bool(off.any()):
        i, j = off.nonzero()[0].tolist()
        here, there = float(source[i, j]), float(other[i, j])
        raise FitError(
            f"{edit.name}: is {here:.6g} at [{first + i}, {j}] in the original and {there:.6g} in the quantized base, "
            "further than rounding explains: is it the model that was quantized?"
        )
