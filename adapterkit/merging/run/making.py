"""One output file in the making, from the first byte read to the last one flushed.

    read     `hash_next` reads the input in order, for its SHA-256, and has what stays as it is written from there
    change   `make` reads rows again, from the page cache, and computes them as the output stores them
    hash     what is written is fed to the output's SHA-256, which takes it in the output's order
    write    another thread writes, so that a worker computes while its last block is on its way to the disk
    record   what restores a block goes to the sidecar; what became of the file is its `FileDone`

Any thread may do any piece of it, in any order but that of the input's bytes. What is left is counted in parts: every
edit, the untouched spans as one, each piece of them on its way, and the hash. The last part finishes the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.files.outfile import LinkedFile, OutputFile
from adapterkit.files.safetensors import read_span
from adapterkit.files.staging import RECEIPT_FOLDER
from adapterkit.merging.options import RunOptions
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.done import FileDone, fingerprint_of
from adapterkit.merging.receipts.receipt import irreversible, sidecar_name
from adapterkit.merging.receipts.sidecar import GAINS, NUMBERS, SidecarWriter, kept, not_in_output
from adapterkit.merging.run.hashing import InputHash, OutputHash, is_copy
from adapterkit.merging.run.pieces import Block, Bundle, EditWork, pieces_of
from adapterkit.merging.run.place import Place
from adapterkit.merging.run.worker import Worker

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.device import Buffers
    from adapterkit.merging.blocks.undo import Undo


@dataclass(frozen=True)
class Job:
    """What the files of one run have in common: the plan, `where` they are made, and how.

    `where` is a folder, or the file to make where the base is a single one; its receipt's folder is `receipt` beside.
    """

    plan: MergePlan
    where: Path
    options: RunOptions

    @property
    def receipt(self) -> bool:
        """Whether a receipt is written."""
        return self.plan.undoable and self.options.receipt

    @cached_property
    def records(self) -> bool:
        """Whether what restores the base is recorded."""
        return self.receipt and irreversible(self.plan) is None

    @property
    def folder(self) -> Path:
        """Where receipt and companions go."""
        plan = self.plan
        beside = not plan.base.is_directory and (self.receipt or plan.restores_receipt)
        return self.where.with_name("receipt") if beside else self.where

    def path_of(self, file: FilePlan) -> Path:
        return self.where / file.name if self.plan.base.is_directory else self.where


class FileMaking:
    """One output file in the making. Its files are open from the first piece to the last."""

    def __init__(
        self, job: Job, file: FilePlan, when_tensor: Callable[[str], None], when_done: Callable[[FileMaking], None]
    ) -> None:
        """Create the file, with its space reserved.

        `when_tensor` is called with each tensor that is made, `when_done` when all of the file is on the disk.
        """
        self.job, self.file, self._when_tensor, self._when_done = job, file, when_tensor, when_done
        self._base = job.plan.header_of(file)
        self.input = InputHash(self._base.file, self._base.size)  # as planned: if it shrank since, reading it fails
        self._notes: list[str] = []
        self.output = self._create()
        self.pieces = tuple(pieces_of(file, job.records))
        self._hash: OutputHash | None = None
        self._sidecar: SidecarWriter | None = None
        self._retention: dict[str, Retention] = {}
        self._unchanged: list[str] = []
        self._parts = 1 + len({id(work) for piece in self.pieces for work in piece.works})
        self._lock = threading.Lock()
        self._opened, self._opening = False, threading.Lock()
        self._failure: BaseException | None = None  # of opening
        self._copies = sorted(file.copies, key=lambda copy: copy.start)
        self._copied = 0  # of them, those that the input's hash has passed
        self._place: Place | None = None  # where blocks were computed
        self.done: FileDone | None = None

    def _create(self) -> OutputFile:
        path = self.job.path_of(self.file)
        if self.job.options.link and is_copy(self.file):
            try:
                return LinkedFile(path, self.file.source)
            except OSError as error:
                self._notes.append(f"{self.file.name}: copied, since it cannot be linked here: {error.strerror}")
        return OutputFile(path, self.file.size)

    @property
    def linked(self) -> bool:
        return isinstance(self.output, LinkedFile)

    def open(self) -> None:
        """Open its files, and begin what is in none of the parts; the first who needs them does so.

        Where that fails, it fails in the same way for everyone: a second try would find what the first had created.
        """
        with self._opening:
            if self._failure is not None:
                raise self._failure
            if not self._opened:
                try:
                    self._open()
                except BaseException as error:
                    self._failure = error
                    raise
                self._opened = True

    def _open(self) -> None:
        self.input.open()
        self.output.open()
        if self.job.receipt or self.job.plan.restores:
            self._hash = OutputHash(self.file, self.input.fd, self._part_done)
            self._parts += self._hash.by_and_by
        if self.job.records:
            self._sidecar = self._begin_sidecar()
        for one in self.file.from_sidecar:
            self.output.write(memoryview(one.tensor.read_bytes()), one.at)

    # --- read, and what stays as it is

    def hash_next(self, worker: Worker) -> None:
        """Hash the next bytes of the input, and have written what of them is untouched."""
        self.open()
        page, start = worker.free_page(), self.input.at
        data = self.input.take_next(page)
        ended = not self.input.left
        untouched = self._untouched_in(data, start)
        self.input.busy = False
        if untouched:
            with self._lock:
                self._parts += 1
            worker.send(page, partial(self._copy, untouched))
        else:
            worker.keep(page)
        if ended:
            self._part_done()
            if self._hash is not None:
                self._hash.go_on()

    def _untouched_in(self, data: memoryview, start: int) -> list[tuple[memoryview, int]]:
        """What of the input's bytes from `start` on, `data`, the output takes over as they are, and where to."""
        spans, stop = [], start + len(data)
        for copy in islice(self._copies, self._copied, None):
            if copy.start >= stop:
                break
            first, last = max(copy.start, start), min(copy.stop, stop)
            if first < last:
                spans.append((data[first - start : last - start], copy.at + first - copy.start))
        while self._copied < len(self._copies) and self._copies[self._copied].stop <= stop:
            self._copied += 1
        return spans

    def _copy(self, untouched: list[tuple[memoryview, int]]) -> None:
        for data, at in untouched:
            self.output.write(data, at)
        self._part_done()

    # --- change

    def make(self, piece: Block | Bundle, place: Place, worker: Worker) -> None:
        """Compute a piece, and leave the writing to another thread."""
        self.open()
        self._place = place
        while True:
            device, page = place.device, None
            try:
                buffers = worker.move_to(device)
                page = worker.free_page()
                data = page.view(piece.stop - piece.start, piece.start)
                with buffers.at_work():
                    if isinstance(piece, Bundle):
                        kept = self._bundle(piece, buffers, data)
                    else:
                        kept = [self._block(piece, buffers, data)]
            except RuntimeError as error:
                if page is not None:
                    worker.keep(page)
                place.retreat(device, error)
            else:
                worker.send(page, partial(self._write, piece, kept, data))
                return

    def _bundle(self, bundle: Bundle, buffers: Buffers, data: memoryview) -> list[Retention | None]:
        """Small tensors as bytes `data`, and what is kept of their updates."""
        from adapterkit.merging.blocks.bundle import merge_bundle

        edits = [work.edit for work in bundle.works if isinstance(work.edit, MergeEdit)]
        made = merge_bundle(edits, self.input.fd, buffers, data, undoable=self._sidecar is not None)
        for work, merged in zip(bundle.works, made, strict=True):
            work.changed = merged.changed
        if self._sidecar is not None:
            codes = [merged.undo.code for merged in made if merged.undo is not None]
            entries = [(name, "U8", (len(code),)) for name, code in zip(bundle.names, codes, strict=True)]
            self._sidecar.add_all(entries, b"".join(codes))
        return [merged.kept for merged in made]

    def _block(self, block: Block, buffers: Buffers, data: memoryview) -> Retention | None:
        """Rows of a tensor as bytes `data`, and what is kept of the update as far as it is measured."""
        from adapterkit.merging.blocks.block import merge_rows, pack_rows, restore_rows
        from adapterkit.merging.blocks.loading import load

        work, edit = block.work, block.work.edit
        with work.lock:
            loaded = work.loaded or load(edit, self.input.fd)
            work.loaded = loaded = loaded if loaded.place == buffers.place else loaded.at(buffers.place)
        if block.recorded is not None:
            restore_rows(loaded, block.recorded, buffers, data)
            return None
        if not isinstance(edit, RestoreEdit) and edit.packing is not None:
            pack_rows(loaded, block.first, block.last, buffers, data)
            return self._finish_packing(work, buffers)
        made = merge_rows(
            loaded, block.first, block.last, buffers, data,
            measured=block.rows_to_measure(self.job.options.report), undoable=work.number is not None,
        )  # fmt: skip
        if made.changed:
            work.changed = True
        if made.undo is not None:
            self._record(block, made.undo)
        return made.kept

    def _finish_packing(self, work: EditWork, buffers: Buffers) -> Retention | None:
        """Count a packed block; after the last one of an edit write what belongs to all of them."""
        from adapterkit.merging.blocks.block import finish_packing

        with work.lock:
            work.computed += 1
            if work.computed < work.total:
                return None
        loaded = work.loaded
        assert loaded is not None
        parts, kept = finish_packing(loaded, buffers)
        work.changed = kept is None or kept.delta > 0
        for data, (start, stop) in zip(parts, loaded.edit.parts, strict=True):
            assert len(data) == stop - start
            self.output.write(memoryview(data), start)
        return kept

    # --- write and hash

    def _write(self, piece: Block | Bundle, kept: list[Retention | None], data: memoryview) -> Future[None] | None:
        """Write bytes of a piece; returns what else needs them."""
        self.output.write(data, piece.start)
        needed = self._hash.feed(data, piece.start) if self._hash is not None else None
        for work, measured in zip(piece.works, kept, strict=True):
            with work.lock:
                if measured is not None:
                    work.retention = measured if work.retention is None else work.retention + measured
                work.written += 1
                ended = work.written == work.total
            if ended:
                self._end(work)
        return needed

    def _end(self, work: EditWork) -> None:
        """All of an edit is written."""
        work.loaded, name = None, work.edit.name
        if not isinstance(work.edit, RestoreEdit) and work.edit.changes and not work.changed:
            self._unchanged.append(name)
        if work.retention is not None:
            self._retention[name] = work.retention
        self._part_done()
        self._when_tensor(name)

    # --- record

    def _begin_sidecar(self) -> SidecarWriter:
        """The sidecar, with what the base has and the output has not."""
        gone = not_in_output(self._base, self.file)
        expected = {name: shape for piece in self.pieces for name, shape in piece.entries()}
        expected |= {kept(index): info.shape for index, info in gone.items()}
        (self.job.folder / RECEIPT_FOLDER).mkdir(exist_ok=True)
        header = bytearray(self._base.nbytes)
        read_span(self.input.fd, memoryview(header), 0, self._base.file)
        sidecar = SidecarWriter(self.job.folder / sidecar_name(self.file.name), bytes(header), expected)
        for index, info in gone.items():
            sidecar.add(kept(index), bytes(info.read_bytes()), info.dtype, info.shape)
        return sidecar

    def _record(self, block: Block, undo: Undo) -> None:
        """Have the sidecar keep what undoes a block."""
        assert self._sidecar is not None
        self._sidecar.add(block.entry, undo.code)
        if undo.gains:
            self._sidecar.add(block.entry + GAINS, undo.gains, "F64", undo.shape)
        if undo.numbers:
            self._sidecar.add(block.entry + NUMBERS, undo.numbers)

    def _part_done(self) -> None:
        """Count a finished part; the last one writes the header, flushes the file and closes it."""
        with self._lock:
            self._parts -= 1
            if self._parts:
                return
        self.output.finish(self.file.header)
        sidecar = None if self._sidecar is None else self._sidecar.finish()
        before = self.input.sha256.hexdigest()
        after = None if self._hash is None else self._hash.hexdigest(before, self.output)
        job = self.job
        self.done = FileDone(
            self.file.name, fingerprint_of(job.plan, self.file, job.options), self.file.size, before, after, sidecar,
            self.linked, None if self._place is None else str(self._place), dict(sorted(self._retention.items())),
            tuple(sorted(self._unchanged)), tuple(self._notes),
        )  # fmt: skip
        self._when_done(self)
        self.close()

    def stop(self) -> None:
        """Nothing that it waits for will come."""
        if self._hash is not None:
            self._hash.abandon()

    def close(self) -> None:
        """Close every descriptor."""
        self.output.close()
        self.input.close()
        if self._sidecar is not None:
            self._sidecar.close()
