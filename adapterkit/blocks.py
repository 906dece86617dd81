"""One block of rows of one edited tensor: read it, change it a cache-sized chunk at a time, round it once.

Nothing here knows about threads or files beyond a descriptor to read from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from adapterkit.adapter import load_weights
from adapterkit.delta import (
    Retention,
    Update,
    add_updates,
    exact_sum,
    measure_columns,
    retention,
    settle_ties,
    update_for,
)
from adapterkit.errors import FitError
from adapterkit.plan import Edit
from adapterkit.tensorfile import TORCH_NAMES, read_span, tensor_bytes

# How many of float32's lowest bits the output lacks.
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
CHUNK_ELEMENTS = 1 << 20  # 4 MB in float32: measured best of 0.5 to 8; smaller ones pay more for each call


@dataclass
class Buffers:
    """What one worker reuses from block to block, grown to the largest it met."""

    read: bytearray = field(default_factory=bytearray)
    write: bytearray = field(default_factory=bytearray)
    sums: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    narrow: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    bits: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def bytes(self, which: str, size: int) -> memoryview:
        if len(getattr(self, which)) < size:
            setattr(self, which, bytearray(size))
        return memoryview(getattr(self, which))[:size]

    def chunk(self, which: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        held: torch.Tensor = getattr(self, which)
        if held.numel() < shape[0] * shape[1] or held.dtype != dtype:
            held = torch.empty(shape[0] * shape[1], dtype=dtype)
            setattr(self, which, held)
        return held[: shape[0] * shape[1]].view(shape)


@dataclass(frozen=True)
class Loaded:
    """What an edit needs in memory: its factors, and the vectors added to a bias."""

    updates: list[Update]
    added: list[torch.Tensor]


def load(edit: Edit, fd: int) -> Loaded:
    """Read the factors of `edit`; raises FitError where one is not finite."""
    depth, _ = edit.matrix
    dtype = _compute_dtype(edit)
    updates = []
    for delta in edit.deltas:
        target = delta.target
        update = update_for(
            load_weights(delta.weights), delta.weight, target.rows or (0, depth), target.of, target.expert,
            target.transposed, dtype, where=delta.module,
        )  # fmt: skip
        if update.magnitude is not None and target.transposed:
            update = measure_columns(update, lambda: _base_chunks(edit, fd))
        updates.append(update)
    added = []
    for addition in edit.added:
        vector = addition.vector.read().to(dtype) * addition.scale
        _check_finite(vector, edit.name)
        added.append(vector[:, None])
    return Loaded(updates, added)


def merge_rows(
    edit: Edit, loaded: Loaded, fd: int, first: int, last: int, buffers: Buffers, measured: int
) -> tuple[memoryview, Retention | None]:
    """The output bytes of rows `first:last` of `edit`, and what rounding kept of the update in the `measured` first.

    Raises FitError where a finite input becomes infinite in the output dtype.
    """
    _, columns = edit.matrix
    source = _read_rows(edit, fd, first, last, buffers)
    out_dtype = getattr(torch, TORCH_NAMES[edit.dtype])
    in_place = edit.source is not None and edit.source.dtype == edit.dtype
    # In place a row is only overwritten once it has been read into the chunk.
    raw = buffers.bytes("read" if in_place else "write", tensor_bytes(edit.dtype, (last - first, columns)))
    out = torch.frombuffer(raw, dtype=out_dtype).view(-1, columns) if raw else torch.empty(0, columns, dtype=out_dtype)
    kept = Retention()
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    for start in range(first, last, step):
        chunk = buffers.chunk("sums", (min(last, start + step) - start, columns), _compute_dtype(edit))
        _base_rows(edit, source, first, start, chunk)
        sample = max(0, min(len(chunk), first + measured - start))
        before = chunk[:sample].clone()
        add_updates(chunk, start, loaded.updates)
        for vector in loaded.added:
            chunk.add_(vector[start : start + len(chunk)])
        rows = slice(start - first, start - first + len(chunk))
        base = source[rows] if source is not None else None
        _check_range(edit, chunk, base, out_dtype)
        _round(chunk, out[rows], None if edit.replaced else base, start, loaded, buffers)
        if sample:
            kept += retention(before, chunk[:sample], out[rows][:sample])
    return raw, kept if measured else None


def _round(
    exact: torch.Tensor, out: torch.Tensor, base: torch.Tensor | None, start: int, loaded: Loaded, buffers: Buffers
) -> None:
    """Round `exact` into `out` once: float32 sums are rounded themselves, and torch takes float64 by way of float32."""
    dropped, shape, total = DROPPED_BITS.get(out.dtype), (exact.shape[0], exact.shape[1]), exact
    if dropped is not None and exact.dtype is torch.float64:
        total = buffers.chunk("narrow", shape, torch.float32).copy_(exact)
        settle_ties(total, dropped, buffers.chunk("bits", shape, torch.int32), lambda i, j: exact[i, j])
    elif dropped is not None and loaded.updates and base is not None:
        exact_at = partial(exact_sum, base, start, loaded.updates)
        settle_ties(total, dropped, buffers.chunk("bits", shape, torch.int32), exact_at)
    out.copy_(total)


def _compute_dtype(edit: Edit) -> torch.dtype:
    """float32 for plain updates of 16-bit weights; float64 where float32 would not round once."""
    computed = edit.deltas or edit.replaced or edit.added
    wide = edit.dtype not in ("BF16", "F16") or (edit.source is not None and edit.source.dtype == "F64")
    involved = edit.replaced or any(delta.weights.magnitude for delta in edit.deltas)
    return torch.float64 if wide or (computed and involved) else torch.float32


def _read_rows(edit: Edit, fd: int, first: int, last: int, buffers: Buffers) -> torch.Tensor | None:
    """Rows `first:last` of the source tensor in its own dtype, in the read buffer; None where the tensor is new."""
    info = edit.source
    if info is None:
        return None
    _, columns = edit.matrix
    row = tensor_bytes(info.dtype, (columns,))
    raw = buffers.bytes("read", (last - first) * row)
    if not raw:
        return None
    read_span(fd, raw, info.start + first * row, info.file)
    return torch.frombuffer(raw, dtype=getattr(torch, TORCH_NAMES[info.dtype])).view(-1, columns)


def _base_rows(edit: Edit, source: torch.Tensor | None, first: int, start: int, chunk: torch.Tensor) -> None:
    """Fill `chunk` with rows `start …` of the base as the updates find it: what the adapter replaces is replaced."""
    stop = start + chunk.shape[0]
    if source is not None:
        chunk.copy_(source[start - first : stop - first])
    for change in edit.replaced:
        if change.rows is None:
            values = change.values.read_rows(start, stop).reshape(chunk.shape).to(chunk.dtype)
            at: slice | list[int] = slice(None)
        else:
            hits = [(index, row - start) for index, row in enumerate(change.rows) if start <= row < stop]
            if not hits:
                continue
            picked, at = [index for index, _ in hits], [row for _, row in hits]
            values = change.values.read()[picked].to(chunk.dtype)
        _check_finite(values, edit.name)
        if change.weight == 1.0 or source is None:
            chunk[at] = values
        else:  # a weighted adapter goes that share of the way to its own values
            chunk[at] += change.weight * (values - chunk[at])


def _base_chunks(edit: Edit, fd: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The whole base tensor as `(first row, rows)`, a chunk at a time."""
    depth, columns = edit.matrix
    step, buffers = max(1, CHUNK_ELEMENTS // max(1, columns)), Buffers()
    for start in range(0, depth, step):
        stop = min(depth, start + step)
        source = _read_rows(edit, fd, start, stop, buffers)
        chunk = buffers.chunk("sums", (stop - start, columns), _compute_dtype(edit))
        _base_rows(edit, source, start, start, chunk)
        yield start, chunk


def _check_finite(values: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise FitError(f"{name}: the adapter brings NaN or Inf for it: the adapter is broken")


def _check_range(edit: Edit, exact: torch.Tensor, base: torch.Tensor | None, dtype: torch.dtype) -> None:
    """Refuse results beyond the output dtype, except where the base itself is not finite."""
    limit = torch.finfo(dtype).max
    # No element exceeds the norm of all, which is the cheapest pass there is; false for NaN and overflowing squares.
    if float(torch.linalg.vector_norm(exact)) <= limit:
        return
    broken = ~torch.isfinite(exact.to(dtype))
    if base is not None:
        broken &= torch.isfinite(base)
    if bool(broken.any()):
        beyond, name = float(exact[broken].abs().max()), str(dtype).removeprefix("torch.")
        wider = {torch.float16: "--dtype bf16", torch.bfloat16: "--dtype fp32"}.get(dtype, "a smaller --scale")
        raise FitError(f"{edit.name}: reaches {beyond:.4g}, and {name} ends at {limit:.5g}: use {wider}")
