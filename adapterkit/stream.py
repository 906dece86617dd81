"""Run a merge plan: file by file, block of rows by block of rows, on as many threads as there are cores.

Every input is read through once for its SHA-256, and untouched spans are written from what that has in hand. A block is
read and computed while the worker's last one is on its way to the disk. `import torch` takes a second, so hashing and
copying begin before it; from then on they run just ahead of the blocks, which so find their input in the page cache.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from adapterkit.budget import BLOCK_BYTES, check_device, check_loss, check_space, default_threads
from adapterkit.card import finish_merge
from adapterkit.digest import HASH_BYTES, OutputDigest
from adapterkit.jobs import Block, Desk, Digest, EditWork, Output, untouched_in
from adapterkit.outfile import LinkedFile, OutputFile
from adapterkit.plan import Edit, FilePlan, Hashes, MergePlan
from adapterkit.receipt import FOLDER, folder_of, irreversible, sidecar_name, undoable
from adapterkit.resuming import Done, clear_notes, note_finished, take_over
from adapterkit.sidecar import GAINS, NUMBERS, SidecarWriter, entry, kept, not_in_output
from adapterkit.staging import staged
from adapterkit.tensorfile import read_span, tensor_bytes

if TYPE_CHECKING:
    from adapterkit.blocks import Loaded
    from adapterkit.delta import Retention
    from adapterkit.device import Buffers, Place

BLOCK_ROWS = 64  # a block has a multiple of them, since rows are searched for midpoints in groups
HASH_AHEAD = 256 << 20  # of the blocks, so that it is not left over at the end; little beside any page cache
SAMPLE_ELEMENTS = 1 << 15  # of each tensor, where no full report is asked for


@dataclass(frozen=True, slots=True)
class TensorMerged:
    """One output tensor is done: the `done`-th of `total`."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Merged:
    """The last event: what was made. `retention` by tensor covers its first rows, or all of them with a report."""

    out: Path
    bytes_written: int
    tensors: int
    hashes: Hashes
    retention: dict[str, Retention]
    place: str  # where it was computed in the end
    notes: tuple[str, ...]  # what was done otherwise than asked for


def run(
    plan: MergePlan,
    *,
    threads: int | None = None,
    report: bool = False,
    device: str = "auto",
    resume: bool = False,
) -> Generator[TensorMerged | Merged, None, None]:
    """Run `plan`, yielding an event for each tensor and the result last; nothing is left behind on failure.

    `report` measures what rounding kept of every element instead of a sample; `device` is auto, cpu, cuda or cuda:N.
    With `resume` shards are taken over that a run of this plan had finished when it was interrupted, and are left there
    if this one fails.
    Raises NoSpaceError where the disk is too small, before or while writing, FitError where factors are not finite or
    results exceed their dtype, and UsageError where there is no such device.
    """
    threads = threads or default_threads()
    check_device(plan, device, threads)
    check_space(plan)
    if plan.calibration is not None:
        from adapterkit.calibration import calibrated

        with calibrated(plan) as plan:
            yield from run(
                replace(plan, calibration=None), threads=threads, report=report, device=device, resume=resume
            )
        return
    directory = plan.base.is_directory
    keep = resume and directory
    with staged(plan.out, directory=directory, keep=keep) as building, _receipt_folder(plan, building) as folder:
        state = _Run(plan, building, folder, threads, report, device, take_over(plan, building) if keep else {})
        yield from state.tensors()
        check_loss(plan, state.retention)
        result = state.result()
        if directory:
            clear_notes(building)
        (plan.finish or finish_merge)(plan, folder, result.hashes)
    yield result


@contextmanager
def _receipt_folder(plan: MergePlan, building: Path) -> Iterator[Path]:
    """Where what belongs to the output is made: in its directory, or beside its file."""
    if not plan.beside:
        yield building
        return
    with staged(folder_of(plan.out, False), directory=True) as folder:
        yield folder


_Task = Callable[[Desk], None]


class _Run:
    """What the workers of one merge share."""

    def __init__(
        self,
        plan: MergePlan,
        building: Path,
        folder: Path,
        threads: int,
        report: bool,
        device: str,
        done: dict[str, Done],
    ) -> None:
        self.plan, self.building, self.folder, self.threads, self.report = plan, building, folder, threads, report
        self.device = device
        self.done = done  # by name the outputs, those that are taken over first
        self.resumable = plan.receipt and plan.base.is_directory
        self.noting = threading.Lock()
        self.records = plan.receipt and irreversible(plan) is None
        self.place: Place | None = None  # not known before torch is there
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self.torch_ready = threading.Event()
        self.stop = threading.Event()
        self.finished: SimpleQueue[str | None] = SimpleQueue()
        self.retention: dict[str, Retention] = {}
        self.digests: dict[Path, Digest] = {}  # adapters first, then the base's files in the order of the blocks
        self.outputs: list[Output] = []
        self.blocks: deque[Block] = deque()

    def tensors(self) -> Iterator[TensorMerged]:
        """Run everything; an event for each tensor that is done."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        writers = ThreadPoolExecutor(self.threads, thread_name_prefix="write")
        done = False
        try:
            self._open_files()
            self._list_blocks()
            workers = [pool.submit(self._work, Desk(writers)) for _ in range(self.threads)]
            for worker in workers:
                worker.add_done_callback(lambda _: self.finished.put(None))
            import torch

            import adapterkit.blocks  # noqa: F401  (here, so that no worker imports while another waits)
            from adapterkit.device import choose, exact_products

            self.place = choose(self.device, self.plan, self.threads)
            threads_before = torch.get_num_threads()
            self.torch_ready.set()
            try:
                with exact_products():
                    yield from self._progress(workers)
                done = True
            finally:
                torch.set_num_threads(threads_before)
        finally:
            self.stop.set()
            self.torch_ready.set()
            for output in self.outputs:
                if output.digest is not None and not done:
                    output.digest.abandon()
            pool.shutdown(wait=True)
            writers.shutdown(wait=True)
            for digest in self.digests.values():
                os.close(digest.fd)
            for output in self.outputs:
                output.file.close()
                if output.sidecar is not None:
                    output.sidecar.close()

    def result(self) -> Merged:
        """What was made, when all of it is."""
        plan = self.plan
        taken = {file: digest.sha256.hexdigest() for file, digest in self.digests.items()}
        shards = zip(plan.base.shards, plan.files, strict=True)
        base = {shard.file.name: taken.get(shard.file) or self.done[file.name].before for shard, file in shards}
        adapters = {one.label: {file.name: taken[file] for file in one.adapter.files} for one in plan.given}
        outputs = {file.name: self.done[file.name].after for file in plan.files if file.name in self.done}
        retention = dict(sorted(self.retention.items()))
        return Merged(
            plan.out, plan.bytes_to_write, plan.edits, Hashes(base, adapters, outputs), retention,
            str(self.place), tuple(self.notes),
        )  # fmt: skip

    # --- before

    def _open_files(self) -> None:
        """Open every input, and every output with its space reserved."""
        for file in (file for one in self.plan.given for file in one.adapter.files):
            self._open_input(file, file.stat().st_size)
        begin = 0
        for shard, plan in zip(self.plan.base.shards, self.plan.files, strict=True):
            if plan.name in self.done:
                continue
            path = self.building / plan.name if self.plan.base.is_directory else self.building
            output = Output(plan, shard, self._output_file(plan, path), len(plan.edits) + 1, begin)
            self.outputs.append(output)
            self._open_input(shard.file, shard.size, output)  # as planned: if it shrank since, reading it fails
            for kept_one in plan.kept:
                output.file.write(memoryview(kept_one.tensor.read_bytes()), kept_one.at)
            if self.plan.receipt or self.plan.restores:
                output.digest = OutputDigest(plan, self.digests[shard.file].fd, partial(self._part_done, output))
                output.parts += output.digest.by_and_by
            begin += shard.size

    def _output_file(self, plan: FilePlan, path: Path) -> OutputFile:
        if self.plan.link and plan.copies_all:
            try:
                return LinkedFile(path, plan.source)
            except OSError as error:
                self.notes.append(f"{plan.name}: copied, since it cannot be linked here: {error.strerror}")
        return OutputFile(path, plan.size)

    def _open_input(self, file: Path, size: int, output: Output | None = None) -> None:
        if file not in self.digests:
            self.digests[file] = Digest(file, os.open(file, os.O_RDONLY | os.O_CLOEXEC), size, output)

    def _list_blocks(self) -> None:
        if self.records:
            (self.folder / FOLDER).mkdir(exist_ok=True)
        for output in self.outputs:
            shard = output.shard
            names, number = [], 0
            for edit in output.plan.edits:
                rows, columns = edit.matrix
                step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (columns,))))
                unit = BLOCK_ROWS * edit.rows_together
                step = step - step % unit if step > unit else max(edit.rows_together, step - step % edit.rows_together)
                spans = [(start, min(rows, start + step)) for start in range(0, max(1, rows), step)]
                work = EditWork(edit, output, len(edit.recorded or spans))
                if self.records and undoable(edit):
                    work.number, number = number, number + 1
                    beside = ["", *([GAINS] if edit.renormalizes else []), *([NUMBERS] if edit.is_quantized else [])]
                    names += [entry(work.number, *span) + what for span in spans for what in beside]
                if edit.recorded:
                    self.blocks.extend(Block(work, one.first, one.last, one) for one in edit.recorded)
                else:
                    self.blocks.extend(Block(work, first, last) for first, last in spans)
            if self.records:
                with open(shard.file, "rb") as stream:
                    header = stream.read(shard.nbytes)
                gone = not_in_output(shard, output.plan)
                names += [kept(number) for number in gone]
                output.sidecar = SidecarWriter(self.folder / sidecar_name(output.plan.name), header, names)
                for number, info in gone.items():
                    output.sidecar.add(kept(number), bytes(info.read_bytes()), info.dtype, info.shape)

    # --- the workers

    def _work(self, desk: Desk) -> None:
        try:
            while not self.stop.is_set() and (task := self._next_task()) is not None:
                task(desk)
        finally:
            desk.leave()

    def _next_task(self) -> _Task | None:
        """Hashing while torch is on its way; then blocks, and hashing just ahead of them."""
        with self.lock:
            ready = self.torch_ready.is_set()
            digest = self._due_digest(self.blocks[0] if ready and self.blocks else None)
            if digest is not None:
                digest.busy = True
                return partial(self._hash, digest)
            if ready:
                return partial(self._merge_block, self.blocks.popleft()) if self.blocks else None
        return self._wait_for_torch

    def _wait_for_torch(self, _: Desk) -> None:
        self.torch_ready.wait()

    def _due_digest(self, block: Block | None) -> Digest | None:
        """The first digest to go on with; only as far ahead of the next block as its input stays in the page cache."""
        limit = block.place + HASH_AHEAD if block else None
        for digest in self.digests.values():
            if limit is not None and digest.place > limit:
                return None
            if digest.left and not digest.busy:
                return digest
        return None

    def _hash(self, digest: Digest, desk: Desk) -> None:
        """Hash the next bytes of an input, and copy what of them is untouched."""
        page, start, output = desk.free_page(), digest.at, digest.output
        data = page.view(min(HASH_BYTES, digest.left), start)
        read_span(digest.fd, data, start, digest.file)
        digest.sha256.update(data)
        digest.at += len(data)
        digest.left -= len(data)
        ended = not digest.left
        digest.busy = False
        untouched = untouched_in(output.plan, data, start) if output else []
        if output and untouched:
            with self.lock:
                output.parts += 1
            desk.send(page, partial(self._copy, output, untouched))
        else:
            desk.keep(page)
        if output and ended:
            self._part_done(output)
            if output.digest is not None:
                output.digest.go_on()

    def _copy(self, output: Output, untouched: list[tuple[memoryview, int]]) -> None:
        for data, at in untouched:
            output.file.write(data, at)
        self._part_done(output)

    def _merge_block(self, block: Block, desk: Desk) -> None:
        """Compute a block, and leave the writing to another thread."""
        work, first, last = block.work, block.first, block.last
        at = work.edit.offset(first)
        while True:
            assert self.place is not None
            place, page = self.place, None
            try:
                buffers = desk.move_to(place)
                page = desk.free_page()
                data = page.view(work.edit.offset(last) - at, at)
                with buffers.at_work():
                    kept = self._compute(block, buffers, data)
            except RuntimeError as error:
                if page is not None:
                    desk.keep(page)
                self._retreat(place, error)
            else:
                desk.send(page, partial(self._write, work, kept, data, at))
                return

    def _retreat(self, place: Place, error: RuntimeError) -> None:
        """Go on with less memory where a GPU had too little for `error`, which else is raised again."""
        from adapterkit.device import CPU, out_of_memory

        if place == CPU or not out_of_memory(error):
            raise error
        with self.lock:
            if self.place == place:  # else another worker has done it
                self.place = place.smaller()
                self.notes.append(f"{place.device} has too little memory free: went on with {self.place}")

    def _compute(self, block: Block, buffers: Buffers, data: memoryview) -> Retention | None:
        """The rows as bytes `data`, and what is kept of the update as far as it is measured."""
        from adapterkit.blocks import load, merge_rows, pack_rows, restore_rows

        work, first, last = block.work, block.first, block.last
        edit, source = work.edit, self.digests[work.output.plan.source].fd
        with work.lock:
            loaded = work.loaded or load(edit, source)
            work.loaded = loaded = loaded if loaded.place == buffers.place else loaded.at(buffers.place)
        if block.recorded is not None:
            restore_rows(edit, loaded, source, block.recorded, buffers, data)
            return None
        if edit.packing is None:
            measured = self._rows_to_measure(edit, first, last)
            kept, undo = merge_rows(edit, loaded, source, first, last, buffers, data, measured, work.number is not None)
            if undo is not None:
                assert work.number is not None and work.output.sidecar is not None
                name = entry(work.number, first, last)
                work.output.sidecar.add(name, undo.code)
                if undo.gains:
                    work.output.sidecar.add(name + GAINS, undo.gains, "F64", undo.shape)
                if undo.numbers:
                    work.output.sidecar.add(name + NUMBERS, undo.numbers)
            return kept
        pack_rows(edit, loaded, source, first, last, buffers, data)
        return self._finish_packing(work, loaded, source, buffers)

    def _finish_packing(self, work: EditWork, loaded: Loaded, source: int, buffers: Buffers) -> Retention | None:
        """Count a packed block; after the last one of an edit write what belongs to all of them."""
        from adapterkit.blocks import finish_packing

        with work.lock:
            work.computed += 1
            if work.computed < work.total:
                return None
        parts, kept = finish_packing(work.edit, loaded, source, buffers)
        for data, (start, stop) in zip(parts, work.edit.parts, strict=True):
            assert len(data) == stop - start
            work.output.file.write(memoryview(data), start)
        return kept

    def _write(self, work: EditWork, kept: Retention | None, data: memoryview, at: int) -> Future[None] | None:
        digest = work.output.digest
        work.output.file.write(data, at)
        with work.lock:
            if kept is not None:
                work.retention = kept if work.retention is None else work.retention + kept
            work.written += 1
            ended = work.written == work.total
        if ended:
            work.loaded = None
            if work.retention is not None:
                self.retention[work.edit.name] = work.retention
            self._part_done(work.output)
            self.finished.put(work.edit.name)
        return digest.feed(data, at) if digest is not None else None

    def _rows_to_measure(self, edit: Edit, first: int, last: int) -> int:
        """How many rows of a block show what rounding keeps: all for a report, else a few at the tensor's start."""
        if not edit.deltas or edit.replaced:
            return 0
        if self.report:
            return last - first
        return min(last, max(1, SAMPLE_ELEMENTS // max(1, edit.matrix[1]))) if first == 0 else 0

    def _part_done(self, output: Output) -> None:
        """Count a finished part of a file; the last one writes the header and flushes the file."""
        with self.lock:
            output.parts -= 1
            if output.parts or self.stop.is_set():
                return
        output.file.finish(output.plan.header)
        if output.sidecar is not None:
            output.sidecar.finish()
        if output.digest is not None:
            before = self.digests[output.plan.source].sha256.hexdigest()
            done = self.done[output.plan.name] = Done(before, output.digest.hexdigest(before, output.file))
            if self.resumable:
                with self.noting:
                    note_finished(self.plan, output.plan, self.building, done)

    # --- the main thread

    def _progress(self, workers: Sequence[Future[None]]) -> Iterator[TensorMerged]:
        """Pass finished tensors on until every worker has ended; the first failure stops them all."""
        done, running = 0, len(workers)
        while running:
            name = self.finished.get()
            if name is not None:
                done += 1
                yield TensorMerged(name, done, self.plan.edits)
                continue
            running -= 1
            for worker in workers:
                if worker.done() and (error := worker.exception()) is not None:
                    raise error
