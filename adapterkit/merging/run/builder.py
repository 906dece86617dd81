"""Make one output file, from the first byte read to the last one flushed.

    read     `hash_next` reads the input in order for its SHA-256, and passes unchanged spans on to be written
    change   `make` reads rows again, from the page cache, and computes the output's rows
    hash     written bytes are fed to the output's SHA-256, which hashes them in the output's order
    write    another thread writes, so that a worker computes while its last block is being written
    record   the data that restores a block goes to the sidecar, and the finished file is recorded as `FileDone`

Any thread may do any step, in any order except that of the input's bytes. The remaining work is counted in parts: one
for each edit, one for the input's hash with the unchanged spans, one for each span being written, and one for the
output's hash. The last part finishes the file.
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
from adapterkit.merging.plan.edits import MergeEdit, RestoreEdit
from adapterkit.merging.plan.types import FilePlan, MergePlan
from adapterkit.merging.receipts.finished_file import FileDone, fingerprint_of
from adapterkit.merging.receipts.receipt import irreversible, sidecar_name
from adapterkit.merging.receipts.sidecar import GAINS, NUMBERS, Entry, SidecarWriter, dropped_name
from adapterkit.merging.run.device import Place
from adapterkit.merging.run.hashing import InputHash, OutputHash, is_copy
from adapterkit.merging.run.pieces import Block, Bundle, EditWork, pieces_of
from adapterkit.merging.run.worker import Worker
from adapterkit.merging.run_options import RunOptions

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.device import Buffers
    from adapterkit.merging.blocks.loading import FactorReader
    from adapterkit.merging.blocks.undo import Undo


@dataclass(frozen=True)
class Job:
    """The plan and options of a run, and `where` its files are made.

    `where` is a folder, or for a base of a single file the output file, with its receipt in `receipt` beside it.
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
        """Whether sidecars are written."""
        return self.receipt and irreversible(self.plan) is None

    @cached_property
    def factors(self) -> FactorReader:
        """Reads the factors of all tensors."""
        from adapterkit.merging.blocks.loading import FactorReader

        return FactorReader()

    @property
    def folder(self) -> Path:
        """The folder of receipt and companions."""
        plan = self.plan
        beside = not plan.base.is_directory and (self.receipt or plan.restores_receipt)
        return self.where.with_name("receipt") if beside else self.where

    def path_of(self, file: FilePlan) -> Path:
        return self.where / file.name if self.plan.base.is_directory else self.where


class FileBuilder:
    """Builds one output file, open from its first piece to its last."""

    def __init__(
        self,
        job: Job,
        file: FilePlan,
        when_tensor: Callable[[str], None],
        when_done: Callable[[FileBuilder, FileDone], None],
    ) -> None:
        """Create the file and reserve its disk space.

        `when_tensor` is called with the name of each finished tensor, `when_done` when the file is flushed to disk.
        """
        self.job, self.file, self._when_tensor, self._when_done = job, file, when_tensor, when_done
        self._base = job.plan.header_of(file)
        self.input = InputHash(self._base.file, self._base.size)  # the planned size: reading fails if it has shrunk
        self._notes: list[str] = []
        self.output = self._create()
        self.pieces = tuple(pieces_of(file, job.records))
        self._hash: OutputHash | None = None
        self._sidecar: SidecarWriter | None = None
        self._retention: dict[str, Retention] = {}
        self._unchanged: list[str] = []
        self._parts = 1 + len({id(work) for piece in self.pieces for work in piece.works})
        self._lock = threading.Lock()
        self._opened, self._stopped, self._opening = False, False, threading.Lock()
        self._failure: BaseException | None = None  # to open
        self._copies = sorted(file.copies, key=lambda copy: copy.start)
        self._copied = 0  # number of copies that the input's hash has passed
        self._place: Place | None = None  # of the computed blocks

    def _create(self) -> OutputFile:
        path = self.job.path_of(self.file)
        if self.job.options.link and is_copy(self.file):
            try:
                return LinkedFile(path, self.file.source)
            except OSError as error:
                self._notes.append(f"{self.file.name}: copied, cannot be linked: {error.strerror}")
        return OutputFile(path, self.file.size)

    @property
    def linked(self) -> bool:
        return isinstance(self.output, LinkedFile)

    def open(self) -> None:
        """Open input, output and sidecar, unless another thread has done so.

        A failure is raised in every thread: a second attempt would fail differently, on files that the first created.
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
            self._parts += self._hash.incremental
            if self._stopped:
                self._hash.abandon()
        if self.job.records:
            self._sidecar = self._begin_sidecar()
        for copy in self.file.from_sidecar:
            self.output.write(memoryview(copy.tensor.read_bytes()), copy.at)

    # --- read and copy

    def hash_next(self, worker: Worker) -> None:
        """Hash the next bytes of the input, and write the unchanged spans among them."""
        self.open()
        page, start = worker.free_page(), self.input.at
        data = self.input.take_next(page)
        ended = not self.input.left
        unchanged = self._unchanged_spans(data, start)
        self.input.busy = False
        if unchanged:
            with self._lock:
                self._parts += 1
            worker.send(page, partial(self._copy, unchanged))
        else:
            worker.put_back(page)
        if ended:
            self._part_done()
            if self._hash is not None:
                self._hash.advance()

    def _unchanged_spans(self, data: memoryview, start: int) -> list[tuple[memoryview, int]]:
        """The parts of `data`, read from `start`, that the output copies, with their offsets in the output."""
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

    def _copy(self, spans: list[tuple[memoryview, int]]) -> None:
        for data, at in spans:
            self.output.write(data, at)
        self._part_done()

    # --- change

    def make(self, piece: Block | Bundle, place: Place, worker: Worker) -> None:
        """Compute a piece, and pass it to a writing thread."""
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
                        retention = self._bundle(piece, buffers, data)
                    else:
                        retention = [self._block(piece, buffers, data)]
            except RuntimeError as error:
                if page is not None:
                    worker.put_back(page)
                place.fall_back(device, error)
            else:
                worker.send(page, partial(self._write, piece, retention, data))
                return

    def _bundle(self, bundle: Bundle, buffers: Buffers, data: memoryview) -> list[Retention | None]:
        """Compute small tensors into `data`, and return their retention."""
        from adapterkit.merging.blocks.bundle import merge_bundle

        edits = [work.edit for work in bundle.works if isinstance(work.edit, MergeEdit)]
        made = merge_bundle(edits, self.input.fd, buffers, data, undoable=self._sidecar is not None)
        for work, merged in zip(bundle.works, made, strict=True):
            work.changed = merged.changed
        if self._sidecar is not None:
            codes = [merged.undo.code for merged in made if merged.undo is not None]
            entries = [(name, "U8", (len(code),)) for name, code in zip(bundle.entry_names, codes, strict=True)]
            self._sidecar.add(entries, b"".join(codes))
        return [merged.retention for merged in made]

    def _block(self, block: Block, buffers: Buffers, data: memoryview) -> Retention | None:
        """Compute rows of a tensor into `data`, and return their retention if it is measured."""
        from adapterkit.merging.blocks.block import merge_rows, pack_rows, restore_rows
        from adapterkit.merging.blocks.loading import load

        work, edit = block.work, block.work.edit
        with work.lock:
            loaded = work.loaded or load(edit, self.input.fd, self.job.factors)
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
        return made.retention

    def _finish_packing(self, work: EditWork, buffers: Buffers) -> Retention | None:
        """Count a packed block; after an edit's last block, write the weight's other tensors."""
        from adapterkit.merging.blocks.block import finish_packing

        with work.lock:
            work.computed += 1
            if work.computed < work.total:
                return None
        loaded = work.loaded
        assert loaded is not None
        parts, retention = finish_packing(loaded, buffers)
        work.changed = retention is None or retention.delta > 0
        for data, (start, stop) in zip(parts, loaded.edit.parts, strict=True):
            assert len(data) == stop - start
            self.output.write(memoryview(data), start)
        return retention

    # --- write and hash

    def _write(self, piece: Block | Bundle, retention: list[Retention | None], data: memoryview) -> Future[None] | None:
        """Write a piece; the returned future ends when its bytes are hashed."""
        self.output.write(data, piece.start)
        hashed = self._hash.feed(data, piece.start) if self._hash is not None else None
        for work, measured in zip(piece.works, retention, strict=True):
            with work.lock:
                if measured is not None:
                    work.retention = measured if work.retention is None else work.retention + measured
                work.written += 1
                ended = work.written == work.total
            if ended:
                self._end(work)
        return hashed

    def _end(self, work: EditWork) -> None:
        """Release a completely written edit."""
        work.loaded, name = None, work.edit.name
        if not isinstance(work.edit, RestoreEdit) and work.edit.changes and not work.changed:
            self._unchanged.append(name)
        if work.retention is not None:
            self._retention[name] = work.retention
        self._part_done()
        self._when_tensor(name)

    # --- record

    def _begin_sidecar(self) -> SidecarWriter:
        """Create the sidecar, with the base's tensors and rows that the output lacks."""
        dropped = {dropped_name(number): info for number, info in self.file.dropped}
        expected = [{name: info.shape} for name, info in dropped.items()]
        expected += [entries for piece in self.pieces if (entries := piece.entries())]
        (self.job.folder / RECEIPT_FOLDER).mkdir(exist_ok=True)
        header = bytearray(self._base.nbytes)
        read_span(self.input.fd, memoryview(header), 0, self._base.file)
        sidecar = SidecarWriter(self.job.folder / sidecar_name(self.file.name), bytes(header), expected)
        for name, info in dropped.items():
            sidecar.add([(name, info.dtype, info.shape)], bytes(info.read_bytes()))
        return sidecar

    def _record(self, block: Block, undo: Undo) -> None:
        """Add the undo of a block to the sidecar."""
        assert self._sidecar is not None
        entries: list[Entry] = [(block.entry_name, "U8", (len(undo.code),))]
        if undo.gains:
            entries.append((block.entry_name + GAINS, "F64", undo.shape))
        if undo.numbers:
            entries.append((block.entry_name + NUMBERS, "U8", (len(undo.numbers),)))
        self._sidecar.add(entries, undo.code + undo.gains + undo.numbers)

    def _part_done(self) -> None:
        """Count a finished part; the last one writes the header, flushes and closes the file."""
        with self._lock:
            self._parts -= 1
            if self._parts:
                return
        self.output.finish(self.file.header)
        sidecar = None if self._sidecar is None else self._sidecar.finish()
        before = self.input.sha256.hexdigest()
        after = None if self._hash is None else self._hash.hexdigest(before, self.output)
        job = self.job
        done = FileDone(
            self.file.name, fingerprint_of(job.plan, self.file, job.options), self.file.size, before, after, sidecar,
            self.linked, None if self._place is None else str(self._place), dict(sorted(self._retention.items())),
            tuple(sorted(self._unchanged)), tuple(self._notes),
        )  # fmt: skip
        self._when_done(self, done)
        self.close()

    def stop(self) -> None:
        """Stop waiting for further pieces."""
        with self._opening:
            self._stopped = True
            if self._hash is not None:
                self._hash.abandon()

    def close(self) -> None:
        """Close all descriptors."""
        self.output.close()
        self.input.close()
        if self._sidecar is not None:
            self._sidecar.close()
