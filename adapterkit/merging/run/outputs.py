"""The files that a run makes, each with what belongs to it: blocks to compute, a hash, a sidecar of the receipt."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.files.opening import descriptor_of
from adapterkit.files.outfile import LinkedFile, OutputFile
from adapterkit.files.safetensors import Header, read_span, tensor_bytes
from adapterkit.files.staging import FOLDER
from adapterkit.merging.plan.types import Edit, FilePlan, MergePlan, Recorded
from adapterkit.merging.receipts.receipt import sidecar_name, undoable
from adapterkit.merging.receipts.resume import Done
from adapterkit.merging.receipts.sidecar import GAINS, LARGEST, NUMBERS, SidecarWriter, entry, kept, not_in_output
from adapterkit.merging.run.budget import BLOCK_BYTES
from adapterkit.merging.run.hashing import OutputHash, is_copy

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.block import LoadedEdit
    from adapterkit.merging.blocks.undo import Undo

BLOCK_ROWS = 64  # a block has a multiple of them, since rows are searched for midpoints in groups


@dataclass
class InputHash:
    """The SHA-256 of an input, taken step by step; one worker at a time is `busy` with it.

    Bytes that `output` takes over untouched are written on the way.
    """

    file: Path
    left: int
    output: Output | None = None
    at: int = 0
    busy: bool = False
    fd: int = -1
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    def open(self) -> None:
        """Open the file to be read, unless it is open."""
        if self.fd < 0:
            self.fd = descriptor_of(self.file)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def place(self) -> int:
        """How far in all of the base's bytes it has come; an adapter is due at once."""
        return self.output.begin + self.at if self.output else 0


class Output:
    """An output file in the making; `when_done` is called when all of it is on the disk.

    What is still to do is counted in parts: every edit, the untouched spans as one, and its hash. Its files are open
    from `open` to its last part.
    """

    def __init__(
        self,
        merge: MergePlan,
        plan: FilePlan,
        shard: Header,
        path: Path,
        folder: Path,
        begin: int,
        records: bool,
        when_done: Callable[[Output], None],
    ) -> None:
        """Create the file, with its space reserved.

        `folder` is where its sidecar goes, if it `records` what undoes it; `begin` is where in all of the base's bytes
        `shard` begins.
        """
        self.plan, self.shard, self.begin, self._folder, self._when_done = plan, shard, begin, folder, when_done
        self.note: str | None = None  # what was done otherwise than asked for
        self.input = InputHash(shard.file, shard.size, self)  # as planned: if it shrank since, reading it fails
        self.file = self._create(merge, path)
        self.records = records
        self.hashed = merge.receipt or merge.restores
        self.blocks = tuple(_blocks_of(self))
        self.digest: OutputHash | None = None
        self.sidecar: SidecarWriter | None = None
        self._parts, self._lock = len(plan.edits) + 1, threading.Lock()
        self._opened, self._opening = False, threading.Lock()

    def open(self) -> None:
        """Open its files, and begin what is in none of the parts; the first who needs them does so."""
        with self._opening:
            if self._opened:
                return
            self.input.open()
            self.file.open()
            if self.hashed:
                self.digest = OutputHash(self.plan, self.input.fd, self.part_done)
                self._parts += self.digest.by_and_by
            if self.records:
                self.sidecar = self._begin_sidecar()
            for one in self.plan.kept:  # taken over from other files than its source
                self.file.write(memoryview(one.tensor.read_bytes()), one.at)
            self._opened = True

    def _begin_sidecar(self) -> SidecarWriter:
        """The sidecar, with what the base has and the output has not."""
        gone = not_in_output(self.shard, self.plan)
        expected = {name: shape for block in self.blocks for name, shape in block.entries()}
        expected |= {kept(index): info.shape for index, info in gone.items()}
        (self._folder / FOLDER).mkdir(exist_ok=True)
        header = bytearray(self.shard.nbytes)
        read_span(self.input.fd, memoryview(header), 0, self.shard.file)
        sidecar = SidecarWriter(self._folder / sidecar_name(self.plan.name), bytes(header), expected)
        for index, info in gone.items():
            sidecar.add(kept(index), bytes(info.read_bytes()), info.dtype, info.shape)
        return sidecar

    def _create(self, merge: MergePlan, path: Path) -> OutputFile:
        if merge.link and is_copy(self.plan):
            try:
                return LinkedFile(path, self.plan.source)
            except OSError as error:
                self.note = f"{self.plan.name}: copied, since it cannot be linked here: {error.strerror}"
        return OutputFile(path, self.plan.size)

    def add_part(self) -> None:
        """Count one more."""
        with self._lock:
            self._parts += 1

    def part_done(self) -> None:
        """Count a finished part; the last one writes the header, flushes the file and closes it."""
        with self._lock:
            self._parts -= 1
            if self._parts:
                return
        self.file.finish(self.plan.header)
        if self.sidecar is not None:
            self.sidecar.finish()
        self._when_done(self)
        self.close()

    def write(self, data: memoryview, at: int) -> Future[None] | None:
        """Write bytes, and return what else needs them."""
        self.file.write(data, at)
        return self.digest.feed(data, at) if self.digest is not None else None

    def input_ended(self) -> None:
        """All of the input is hashed, and what it has untouched is on its way."""
        self.part_done()
        if self.digest is not None:
            self.digest.go_on()

    def hashes(self) -> Done | None:
        """The SHA-256 of the base's file and its own, when it is done, if that was asked for."""
        before = self.input.sha256.hexdigest()
        return Done(before, self.digest.hexdigest(before, self.file)) if self.digest is not None else None

    def untouched_in(self, data: memoryview, start: int) -> list[tuple[memoryview, int]]:
        """What of the input's bytes from `start` on, `data`, it takes over as they are, and where to."""
        spans = []
        for copy in self.plan.copies:
            first, last = max(copy.start, start), min(copy.stop, start + len(data))
            if first < last:
                spans.append((data[first - start : last - start], copy.at + first - copy.start))
        return spans

    def record(self, block: Block, undo: Undo) -> None:
        """Have the sidecar keep what undoes a block."""
        assert self.sidecar is not None and block.work.number is not None
        name = entry(block.work.number, block.first, block.last)
        self.sidecar.add(name, undo.code)
        if undo.gains:
            self.sidecar.add(name + GAINS, undo.gains, "F64", undo.shape)
        if undo.numbers:
            self.sidecar.add(name + NUMBERS, undo.numbers)

    def stop(self) -> None:
        """Nothing that it waits for will come."""
        if self.digest is not None:
            self.digest.abandon()

    def close(self) -> None:
        """Close every descriptor."""
        self.file.close()
        self.input.close()
        if self.sidecar is not None:
            self.sidecar.close()


@dataclass
class EditWork:
    """An edit in progress: the first worker to get there reads its factors, the last block to be written drops them."""

    edit: Edit
    output: Output
    total: int  # blocks
    number: int | None = None  # of the tensor in the sidecar, if what undoes it is recorded
    computed: int = 0
    written: int = 0
    changed: bool = False  # whether any row is not the base's
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: LoadedEdit | None = None
    retention: Retention | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows `first:last` of an edit."""

    work: EditWork
    first: int
    last: int
    recorded: Recorded | None = None  # what restores them

    @property
    def place(self) -> int:
        """Where in all of the base's bytes its input begins."""
        source, (rows, _) = self.work.edit.source, self.work.edit.matrix
        return self.work.output.begin + (source.start + source.nbytes * self.first // rows if source and rows else 0)

    def entries(self) -> list[tuple[str, tuple[int, ...]]]:
        """What it may have in the sidecar, with the largest shape."""
        work, edit = self.work, self.work.edit
        if work.number is None:
            return []
        name = entry(work.number, self.first, self.last)
        gains = [(name + GAINS, (LARGEST, LARGEST))] if edit.renormalizes else []
        return [(name, (LARGEST,)), *gains, *([(name + NUMBERS, (LARGEST,))] if edit.is_quantized else [])]


def _blocks_of(output: Output) -> Iterator[Block]:
    """The blocks of an output, in its order."""
    number = 0
    for edit in output.plan.edits:
        spans = list(_spans(edit))
        work = EditWork(edit, output, len(edit.recorded or spans))
        if output.records and undoable(edit):
            work.number, number = number, number + 1
        if edit.recorded:
            yield from (Block(work, one.first, one.last, one) for one in edit.recorded)
        else:
            yield from (Block(work, first, last) for first, last in spans)


def _spans(edit: Edit) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a merge."""
    rows, columns = edit.matrix
    step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (columns,))))
    unit = BLOCK_ROWS * edit.rows_together
    step = step - step % unit if step > unit else max(edit.rows_together, step - step % edit.rows_together)
    for start in range(0, max(1, rows), step):
        yield start, min(rows, start + step)
