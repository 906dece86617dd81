"""The pieces of a file, which workers compute in any order: blocks of rows, and bundles of small tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from adapterkit.files.safetensors import TensorInfo, tensor_bytes
from adapterkit.merging.plan.edits import Edit, MergeEdit, Recorded, RestoreEdit
from adapterkit.merging.plan.types import FilePlan
from adapterkit.merging.receipts.receipt import undoable
from adapterkit.merging.receipts.sidecar import GAINS, MAX_OFFSET, NUMBERS, entry_name

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.loading import Loaded

BLOCK_BYTES = 8 << 20  # read and written at a time
SMALL_SHARE = 256  # tensors up to this fraction of a block are bundled
BUNDLE_SHARE = 16  # the largest bundle as a fraction of a block: larger ones are no faster
BLOCK_ROWS = 64  # blocks have a multiple of these rows, because midpoints are searched for in groups of rows
SAMPLE_ELEMENTS = 1 << 15  # of each tensor, measured without `report`


@dataclass
class EditWork:
    """An edit in progress: loaded by its first block, and released by its last."""

    edit: MergeEdit | RestoreEdit
    total: int  # number of blocks
    number: int | None = None  # of the tensor in the sidecar, if its undo is recorded
    computed: int = 0
    written: int = 0
    changed: bool = False  # whether any row differs from the base's
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Loaded[Any] | None = None
    retention: Retention | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """Small tensors, contiguous in input and output, which are merged together."""

    works: tuple[EditWork, ...]

    @property
    def start(self) -> int:
        """Offset in the output."""
        return self.works[0].edit.start

    @property
    def stop(self) -> int:
        """End offset in the output."""
        return self.works[-1].edit.stop

    @property
    def source_start(self) -> int:
        """Offset of the input in the base's file."""
        source = self.works[0].edit.source
        assert source is not None
        return source.start

    @property
    def entry_names(self) -> list[str]:
        """The names of its entries in the sidecar, if undo is recorded."""
        return [entry_name(work.number, 0, work.edit.matrix[0]) for work in self.works if work.number is not None]

    def entries(self) -> dict[str, tuple[int, ...]]:
        """The possible entries in the sidecar, each with its largest shape."""
        return dict.fromkeys(self.entry_names, (MAX_OFFSET,))


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first:last` of an edit."""

    work: EditWork
    first: int
    last: int
    recorded: Recorded | None = None  # restores them

    @property
    def works(self) -> tuple[EditWork, ...]:
        return (self.work,)

    @property
    def start(self) -> int:
        """Offset in the output."""
        return self.work.edit.offset(self.first)

    @property
    def stop(self) -> int:
        """End offset in the output."""
        return self.work.edit.offset(self.last)

    @property
    def source_start(self) -> int:
        """Offset of the input in the base's file."""
        source, rows = self.work.edit.source, self.work.edit.source_rows
        return source.start + source.nbytes * min(self.first, rows) // rows if source and rows else 0

    @property
    def entry_name(self) -> str:
        """The name of its main entry in the sidecar."""
        assert self.work.number is not None
        return entry_name(self.work.number, self.first, self.last)

    def entries(self) -> dict[str, tuple[int, ...]]:
        """The possible entries in the sidecar, each with its largest shape."""
        edit = self.work.edit
        if self.work.number is None or self.first >= edit.source_rows:
            return {}
        gains = {self.entry_name + GAINS: (MAX_OFFSET, MAX_OFFSET)} if edit.renormalizes else {}
        numbers = {self.entry_name + NUMBERS: (MAX_OFFSET,)} if edit.is_quantized else {}
        return {self.entry_name: (MAX_OFFSET,), **gains, **numbers}

    def rows_to_measure(self, report: bool) -> int:
        """The number of rows to measure retention on: all for a `report`, else a few at the tensor's start."""
        edit = self.work.edit
        if not isinstance(edit, MergeEdit) or not edit.deltas or edit.replaced:
            return 0
        if report:
            return self.last - self.first
        return min(self.last, max(1, SAMPLE_ELEMENTS // max(1, edit.matrix[1]))) if self.first == 0 else 0


def pieces_of(file: FilePlan, records: bool) -> Iterator[Block | Bundle]:
    """The pieces of a file, in its order; with `records`, undoable tensors are numbered for the sidecar."""
    numbers, bundle = count(), list[EditWork]()
    for edit in file.edits:
        number = next(numbers) if records and isinstance(edit, MergeEdit) and undoable(edit) else None
        small = _is_small(edit) and (number is not None) == records
        if bundle and not (small and _fits(bundle, edit)):
            yield Bundle(tuple(bundle))
            bundle = []
        if small:
            bundle.append(EditWork(edit, 1, number))
        else:
            yield from _blocks_of(edit, number)
    if bundle:
        yield Bundle(tuple(bundle))


def _is_small(edit: MergeEdit | RestoreEdit) -> bool:
    """Whether a tensor can be bundled: small, not empty, 16-bit before and after, with plain updates only."""
    if not isinstance(edit, MergeEdit) or not 0 < edit.stop - edit.start <= BLOCK_BYTES // SMALL_SHARE:
        return False
    plain = isinstance(edit.source, TensorInfo) and edit.source.dtype == edit.dtype and edit.dtype in ("BF16", "F16")
    others = edit.replaced or edit.added or edit.packing or edit.checked_against or edit.as_trained or edit.renormalizes
    return plain and not others and bool(edit.deltas) and all(delta.target.expert is None for delta in edit.deltas)


def _fits(bundle: Sequence[EditWork], edit: Edit) -> bool:
    """Whether a small tensor directly follows a bundle that can still grow."""
    first, last = bundle[0].edit, bundle[-1].edit
    assert isinstance(last.source, TensorInfo) and isinstance(edit.source, TensorInfo)
    follows = (last.stop, last.source.stop, last.dtype) == (edit.start, edit.source.start, edit.dtype)
    return follows and edit.stop - first.start <= BLOCK_BYTES // BUNDLE_SHARE


def _blocks_of(edit: MergeEdit | RestoreEdit, number: int | None) -> Iterator[Block]:
    if isinstance(edit, RestoreEdit):
        work = EditWork(edit, len(edit.recorded))
        yield from (Block(work, rows.first, rows.last, rows) for rows in edit.recorded)
    else:
        spans = list(edit.spans(_rows_per_block(edit))) or [(0, 0)]
        work = EditWork(edit, len(spans), number)
        yield from (Block(work, first, last) for first, last in spans)


def _rows_per_block(edit: MergeEdit) -> int:
    step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (edit.matrix[1],))))
    unit = BLOCK_ROWS * edit.rows_together
    return step - step % unit if step > unit else max(edit.rows_together, step - step % edit.rows_together)
