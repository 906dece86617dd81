"""The pieces that a file is made of: blocks of rows, some megabytes each, which any worker can compute in any order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit.files.safetensors import tensor_bytes
from adapterkit.merging.plan.edits import MergeEdit, Recorded, RestoreEdit
from adapterkit.merging.plan.types import FilePlan
from adapterkit.merging.receipts.receipt import undoable
from adapterkit.merging.receipts.sidecar import GAINS, LARGEST, NUMBERS, entry

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.loading import Loaded

BLOCK_BYTES = 8 << 20  # what a worker reads and writes at a time
BLOCK_ROWS = 64  # a block has a multiple of them, since rows are searched for midpoints in groups
SAMPLE_ELEMENTS = 1 << 15  # of each tensor, where no full report is asked for


@dataclass
class EditWork:
    """An edit in progress: the first worker to get there loads it, the last block to be written drops it again."""

    edit: MergeEdit | RestoreEdit
    total: int  # blocks
    number: int | None = None  # of the tensor in the sidecar, if what undoes it is recorded
    computed: int = 0
    written: int = 0
    changed: bool = False  # whether any row is not the base's
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Loaded[Any] | None = None
    retention: Retention | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first:last` of an edit."""

    work: EditWork
    first: int
    last: int
    recorded: Recorded | None = None  # what restores them

    @property
    def begin(self) -> int:
        """Where in the base's file its input begins."""
        source, (rows, _) = self.work.edit.source, self.work.edit.matrix
        return source.start + source.nbytes * self.first // rows if source and rows else 0

    @property
    def entry(self) -> str:
        """What it is called in the sidecar."""
        assert self.work.number is not None
        return entry(self.work.number, self.first, self.last)

    def entries(self) -> list[tuple[str, tuple[int, ...]]]:
        """What it may have in the sidecar, with the largest shape."""
        edit = self.work.edit
        if self.work.number is None:
            return []
        gains = [(self.entry + GAINS, (LARGEST, LARGEST))] if edit.renormalizes else []
        numbers = [(self.entry + NUMBERS, (LARGEST,))] if edit.is_quantized else []
        return [(self.entry, (LARGEST,)), *gains, *numbers]

    def rows_to_measure(self, report: bool) -> int:
        """How many rows show what rounding keeps: all of them for a `report`, else a few at the tensor's start."""
        edit = self.work.edit
        if not isinstance(edit, MergeEdit) or not edit.deltas or edit.replaced:
            return 0
        if report:
            return self.last - self.first
        return min(self.last, max(1, SAMPLE_ELEMENTS // max(1, edit.matrix[1]))) if self.first == 0 else 0


def blocks_of(file: FilePlan, records: bool) -> Iterator[Block]:
    """The blocks of a file, in its order; with the number of the tensor where what undoes it is recorded."""
    number = 0
    for edit in file.edits:
        if isinstance(edit, RestoreEdit):
            work = EditWork(edit, len(edit.recorded))
            yield from (Block(work, rows.first, rows.last, rows) for rows in edit.recorded)
            continue
        spans = list(_spans(edit))
        work = EditWork(edit, len(spans))
        if records and undoable(edit):
            work.number, number = number, number + 1
        yield from (Block(work, first, last) for first, last in spans)


def _spans(edit: MergeEdit) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a merge."""
    rows, columns = edit.matrix
    step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (columns,))))
    unit = BLOCK_ROWS * edit.rows_together
    step = step - step % unit if step > unit else max(edit.rows_together, step - step % edit.rows_together)
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)
