"""The pieces of a file, which any worker can compute in any order: blocks of rows of a tensor, some megabytes each, and
bundles of small tensors.
"""

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
from adapterkit.merging.receipts.sidecar import GAINS, LARGEST, NUMBERS, entry

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.loading import Loaded

BLOCK_BYTES = 8 << 20  # what a worker reads and writes at a time
SMALL = 256  # a tensor of up to that part of a block is bundled with its neighbours
BUNDLE = 16  # and a bundle is up to that part of a block: more is no faster
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
class Bundle:
    """Whole small tensors, neighbours in input and output, which are merged together."""

    works: tuple[EditWork, ...]

    @property
    def start(self) -> int:
        """Where in the output it begins."""
        return self.works[0].edit.start

    @property
    def stop(self) -> int:
        """Where in the output it ends."""
        return self.works[-1].edit.stop

    @property
    def begin(self) -> int:
        """Where in the base's file its input begins."""
        source = self.works[0].edit.source
        assert source is not None
        return source.start

    @property
    def names(self) -> list[str]:
        """What its tensors are called in the sidecar, if what undoes them is recorded."""
        return [entry(work.number, 0, work.edit.matrix[0]) for work in self.works if work.number is not None]

    def entries(self) -> list[tuple[str, tuple[int, ...]]]:
        """What it may have in the sidecar, with the largest shape."""
        return [(name, (LARGEST,)) for name in self.names]


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first:last` of an edit."""

    work: EditWork
    first: int
    last: int
    recorded: Recorded | None = None  # what restores them

    @property
    def works(self) -> tuple[EditWork, ...]:
        return (self.work,)

    @property
    def start(self) -> int:
        """Where in the output it begins."""
        return self.work.edit.offset(self.first)

    @property
    def stop(self) -> int:
        """Where in the output it ends."""
        return self.work.edit.offset(self.last)

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


def pieces_of(file: FilePlan, records: bool) -> Iterator[Block | Bundle]:
    """The pieces of a file, in its order; with the number of the tensor where what undoes it is recorded."""
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
    """Whether a tensor can be bundled: small, not empty, of 16 bits before and after, with plain updates only."""
    if not isinstance(edit, MergeEdit) or not 0 < edit.stop - edit.start <= BLOCK_BYTES // SMALL:
        return False
    plain = isinstance(edit.source, TensorInfo) and edit.source.dtype == edit.dtype and edit.dtype in ("BF16", "F16")
    others = edit.replaced or edit.added or edit.packing or edit.checked_against or edit.renormalizes
    return plain and not others and bool(edit.deltas) and all(delta.target.expert is None for delta in edit.deltas)


def _fits(bundle: Sequence[EditWork], edit: Edit) -> bool:
    """Whether a small tensor lies right behind a bundle, which has room for it."""
    first, last = bundle[0].edit, bundle[-1].edit
    assert isinstance(last.source, TensorInfo) and isinstance(edit.source, TensorInfo)
    behind = (last.stop, last.source.stop, last.dtype) == (edit.start, edit.source.start, edit.dtype)
    return behind and edit.stop - first.start <= BLOCK_BYTES // BUNDLE


def _blocks_of(edit: MergeEdit | RestoreEdit, number: int | None) -> Iterator[Block]:
    if isinstance(edit, RestoreEdit):
        work = EditWork(edit, len(edit.recorded))
        yield from (Block(work, rows.first, rows.last, rows) for rows in edit.recorded)
    else:
        spans = list(_spans(edit))
        work = EditWork(edit, len(spans), number)
        yield from (Block(work, first, last) for first, last in spans)


def _spans(edit: MergeEdit) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a merge."""
    rows, columns = edit.matrix
    step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (columns,))))
    unit = BLOCK_ROWS * edit.rows_together
    step = step - step % unit if step > unit else max(edit.rows_together, step - step % edit.rows_together)
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)
