"""Merge small tensors together, in the number of torch calls that one takes: those calls are their cost.

Tensors of the same shape, with updates of the same shapes, are stacked into one matrix. Each update is still a product
of its own, so the bits are the same as in separate merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd, prod
from typing import Any

import torch

from adapterkit.adapter.weights import read_all
from adapterkit.algebra.residual import marked
from adapterkit.algebra.updates import Update, add_updates, oriented, retentions
from adapterkit.files.safetensors import TensorInfo
from adapterkit.merging.blocks.block import MergedRows, add_plain
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.loading import load_merge
from adapterkit.merging.blocks.overflow import check_range, in_range
from adapterkit.merging.blocks.reading import GROUP_ROWS
from adapterkit.merging.blocks.residual_codec import encode_each
from adapterkit.merging.blocks.undo import Undo
from adapterkit.merging.plan.edits import MergeEdit

_Tensor = tuple[MergeEdit, list[torch.Tensor], torch.Tensor, torch.Tensor]  # edit, factors, base values, output values


def merge_bundle(
    edits: Sequence[MergeEdit], fd: int, buffers: Buffers, into: memoryview, *, undoable: bool
) -> list[MergedRows]:
    """Merge 16-bit tensors with plain updates, contiguous in the open file `fd`, into the bytes `into`.

    Retention is measured on all rows. Raises FitError if a factor, or the result of a finite weight, is not finite.
    """
    first, last = edits[0].source, edits[-1].source
    assert isinstance(first, TensorInfo) and isinstance(last, TensorInfo)
    sizes = [prod(edit.shape) for edit in edits]
    source = buffers.read(fd, replace(first, shape=(sum(sizes),), stop=last.stop))
    out = buffers.output(into, source.dtype)
    alike: dict[Any, list[_Tensor]] = {}
    for tensor in zip(edits, _factors(edits), torch.split(source, sizes), torch.split(out, sizes), strict=True):
        alike.setdefault(_kind(tensor[0]), []).append(tensor)
    made: dict[str, MergedRows] = {}
    for group in alike.values():
        same, factors, before, after = zip(*group, strict=True)
        stacked = torch.cat(before).view(-1, same[0].matrix[1])
        merged = torch.empty_like(stacked)
        updates = _updates(same, factors, stacked.device, fd)
        found = _merge_stacked(same, updates, stacked, merged, buffers, undoable)
        made |= zip((edit.name for edit in same), found, strict=True)
        for place, result in zip(after, torch.split(merged.view(-1), len(after[0])), strict=True):
            place.copy_(result)
    buffers.deliver(out, into)
    return [made[edit.name] for edit in edits]


def _factors(edits: Sequence[MergeEdit]) -> list[list[torch.Tensor]]:
    """A and B of every update of each tensor."""
    lazy = [[factor for delta in edit.deltas for factor in (delta.weights.A, delta.weights.B)] for edit in edits]
    read = iter(read_all([factor for factors in lazy for factor in factors]))
    return [[next(read) for _ in factors] for factors in lazy]


def _kind(edit: MergeEdit) -> tuple[Any, ...]:
    """A key that is equal for tensors that can be stacked."""
    return edit.matrix, *(
        (
            *(shape for factor in (delta.weights.A, delta.weights.B) for shape in (factor.shape, factor.dtype)),
            delta.target.rows, delta.target.delta_rows, delta.target.transposed,
        )
        for delta in edit.deltas
    )  # fmt: skip


def _updates(
    edits: Sequence[MergeEdit], factors: Sequence[list[torch.Tensor]], device: torch.device, fd: int
) -> list[Update]:
    """The updates of stacked tensors, tensor by tensor. Raises FitError if one is not finite."""
    rows, by_delta = edits[0].matrix[0], []
    for at, delta in enumerate(edits[0].deltas):
        A, B = (torch.stack([one[2 * at + side] for one in factors]).to(device).float().flatten(2) for side in (0, 1))
        strengths = [edit.deltas[at].weights.scaling * edit.deltas[at].weight for edit in edits]
        if not all(bool(x.isfinite().all()) for x in (A, B, torch.tensor(strengths, dtype=A.dtype))):
            for edit in edits:
                load_merge(edit, fd)  # raises for the one
        left, right = oriented(A, B, delta.target.delta_rows, delta.target.transposed)
        first, last = delta.target.rows or (0, rows)
        by_delta.append([
            Update(number * rows + first, number * rows + last, *update)
            for number, update in enumerate(zip(left.unbind(), right.unbind(), strengths, strict=True))
        ])  # fmt: skip
    return [update for updates in zip(*by_delta, strict=True) for update in updates]


def _merge_stacked(
    edits: Sequence[MergeEdit],
    updates: Sequence[Update],
    before: torch.Tensor,
    out: torch.Tensor,
    buffers: Buffers,
    undoable: bool,
) -> list[MergedRows]:
    """Merge tensors of one kind, stacked in `before`, into `out`."""
    count, rows, size = len(edits), edits[0].matrix[0], before.numel() // len(edits)
    squares, doubtful = add_plain(
        before, 0, updates, out, buffers, step=len(before), depth=gcd(rows, GROUP_ROWS), undoable=undoable
    )
    if not in_range(squares, out.dtype):
        for edit, old, new in zip(edits, torch.split(before, rows), torch.split(out, rows), strict=True):
            check_range(edit, squares, new, old, 0)
    exact = before.float()
    add_updates(exact, 0, updates)
    measured = retentions(before, exact, out, count)
    changed = (before != out).view(count, -1).any(1).tolist()
    undone: Sequence[Undo | None] = [None] * count
    if doubtful is not None:
        starts = range(0, before.numel(), size)
        undone = [Undo(code) for code in encode_each(marked(before, out, updates, doubtful, count), starts)]
    return [MergedRows(*rows) for rows in zip(measured, undone, changed, strict=True)]
