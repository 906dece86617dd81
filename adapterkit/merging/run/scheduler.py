"""Run a merge plan: file by file, block of rows by block of rows, on as many threads as there are cores.

Every input is read through once for its SHA-256, and untouched spans are written from what that has in hand. A block is
read and computed while the worker's last one is on its way to the disk. `import torch` takes a second, so hashing and
copying begin before it; from then on they run just ahead of the blocks, which so find their input in the page cache.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from adapterkit.errors import ChangedError
from adapterkit.files.hub_cache import check_name
from adapterkit.files.outfile import LinkedFile
from adapterkit.files.safetensors import read_span
from adapterkit.files.staging import staged
from adapterkit.files.stamps import Stamp, check_unchanged, stamps_of, with_links
from adapterkit.merging.card import companions_of, finish_merge
from adapterkit.merging.plan.types import Edit, Hashes, MergePlan
from adapterkit.merging.receipts.receipt import irreversible
from adapterkit.merging.receipts.resume import Done, clear_notes, in_words, job_of, note_finished, take_over
from adapterkit.merging.run.budget import check_device, check_loss, check_space, default_threads, warnings_of
from adapterkit.merging.run.hashing import HASH_BYTES
from adapterkit.merging.run.outputs import Block, EditWork, InputHash, Output
from adapterkit.merging.run.worker import Worker

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.updates import Retention
    from adapterkit.merging.blocks.block import LoadedEdit
    from adapterkit.merging.blocks.device import Buffers, ComputeDevice

HASH_AHEAD = 256 << 20  # of the blocks, so that it is not left over at the end; little beside any page cache
MOST_OPEN = 24  # outputs at a time, with four descriptors each: a process may have 1024, on some systems 256
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
    warnings: tuple[str, ...] = ()  # where the result is hardly what was meant: little or nothing is left of the update


def run(
    plan: MergePlan,
    *,
    threads: int | None = None,
    report: bool = False,
    device: str | torch.device = "auto",
    resume: bool = False,
) -> Generator[TensorMerged | Merged, None, None]:
    """Run `plan`, yielding an event for each tensor and the result last; nothing is left behind on failure.

    `report` measures what rounding kept of every element instead of a sample; `device` is auto, cpu, cuda or cuda:N.
    With `resume` shards are taken over that a run of this plan had finished when it was interrupted, and are left there
    if this one fails.
    Raises NoSpaceError where the disk is too small, before or while writing, FitError where factors are not finite or
    results exceed their dtype, and UsageError where there is no such device.
    """
    threads, device = default_threads() if threads is None else threads, str(device)
    check_device(plan, device, threads)
    check_space(plan)
    if plan.calibration is not None:
        from adapterkit.merging.calibration import calibrated

        with calibrated(plan) as plan:
            yield from run(
                replace(plan, calibration=None), threads=threads, report=report, device=device, resume=resume
            )
        return
    directory = plan.base.is_directory
    stamps = {**stamps_of(companions_of(plan.base)), **plan.stamps}
    check_unchanged(stamps)  # since the plan was made
    job = job_of(plan) if directory and plan.receipt else None
    with staged(plan.destination, job=job, resume=resume, kept=in_words if resume else lambda _: "") as building:
        folder = building
        if plan.beside:
            folder = building.with_name("receipt")
            folder.mkdir()
        done = take_over(plan, building) if resume and directory else {}
        state = _Run(plan, stamps, building, folder, threads, report, device, done)
        yield from state.tensors()
        check_loss(plan, state.retention)
        result = state.result()
        if directory:
            clear_notes(building)
        told = replace(plan, notes=plan.notes + result.warnings)
        (plan.finish or finish_merge)(told, folder, result.hashes)
        state.check_inputs()
    yield result


_Task = Callable[[Worker], None]


class _Run:
    """What the workers of one merge share."""

    def __init__(
        self,
        plan: MergePlan,
        stamps: Mapping[Path, Stamp],
        building: Path,
        folder: Path,
        threads: int,
        report: bool,
        device: str,
        done: dict[str, Done],
    ) -> None:
        self.plan, self.building, self.folder, self.threads, self.report = plan, building, folder, threads, report
        self.stamps, self.device = stamps, device
        self.done = done  # by name the outputs, those that are taken over first
        self.noting = threading.Lock()
        self.place: ComputeDevice | None = None  # not known before torch is there
        self.notes: list[str] = []
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # of what there is to do
        self.torch_ready = self.stopped = False
        self.finished: SimpleQueue[str | None] = SimpleQueue()
        self.retention: dict[str, Retention] = {}
        self.unchanged: list[str] = []  # tensors that adapters change, and that came out as the base has them
        self.digests: dict[Path, InputHash] = {}  # adapters first, then the base's files in the order of the blocks
        self.outputs: list[Output] = []
        self.begun: set[Output] = set()  # and not done
        self.blocks: deque[Block] = deque()

    def tensors(self) -> Iterator[TensorMerged]:
        """Run everything; an event for each tensor that is done."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        writers = ThreadPoolExecutor(self.threads, thread_name_prefix="write")
        done = False
        try:
            self._create_outputs()
            workers = [pool.submit(self._work, Worker(writers)) for _ in range(self.threads)]
            for worker in workers:
                worker.add_done_callback(lambda _: self.finished.put(None))
            import torch

            import adapterkit.merging.blocks.block  # noqa: F401  (here, so that no worker imports while another waits)
            from adapterkit.merging.blocks.device import choose, exact_products

            self.place = choose(self.device, self.plan, self.threads)
            threads_before = torch.get_num_threads()
            self._change(torch_ready=True)
            try:
                with exact_products():
                    yield from self._progress(workers)
                done = True
            finally:
                torch.set_num_threads(threads_before)
        finally:
            if not done:
                self._change(stopped=True)
                for output in self.outputs:
                    output.stop()
            pool.shutdown(wait=True)
            writers.shutdown(wait=True)
            for output in self.outputs:
                output.close()
            for digest in self.digests.values():
                digest.close()

    def result(self) -> Merged:
        """What was made, when all of it is."""
        plan = self.plan
        taken = {file: digest.sha256.hexdigest() for file, digest in self.digests.items()}
        shards = zip(plan.base.shards, plan.files, strict=True)
        base = {shard.file.name: taken.get(shard.file) or self.done[file.name].before for shard, file in shards}
        adapters = tuple({file.name: taken[file] for file in one.adapter.files} for one in plan.given)
        for file in (
            *(shard.file for shard in plan.base.shards),
            *(f for one in plan.given for f in one.adapter.files),
        ):
            check_name(file, taken.get(file) or base[file.name])
        outputs = {file.name: self.done[file.name].after for file in plan.files if file.name in self.done}
        retention = dict(sorted(self.retention.items()))
        return Merged(
            plan.out, plan.bytes_to_write, plan.edits, Hashes(base, adapters, outputs), retention,
            str(self.place), tuple(self.notes), warnings_of(plan, retention, sorted(self.unchanged)),
        )  # fmt: skip

    def check_inputs(self) -> None:
        """Raise ChangedError where an input is not what it was, or there are others."""
        for file in companions_of(self.plan.base):
            if file not in self.stamps:
                raise ChangedError(f"{file}: was not there when this began. Try again when nothing else writes there.")
        check_unchanged(self.stamps)

    # --- before

    def _create_outputs(self) -> None:
        """Create every output that is not taken over, so that what the disk has no room for shows itself now."""
        plan = self.plan
        for file in (file for one in plan.given for file in one.adapter.files):
            self.digests.setdefault(file, InputHash(file, file.stat().st_size))
        begin, records = 0, plan.receipt and irreversible(plan) is None
        for shard, file_plan in zip(plan.base.shards, plan.files, strict=True):
            if file_plan.name not in self.done:
                path = self.building / file_plan.name if plan.base.is_directory else self.building
                output = Output(plan, file_plan, shard, path, self.folder, begin, records, self._output_done)
                self.outputs.append(output)
                self.digests[shard.file] = output.input
                self.notes += [output.note] if output.note else []
                self.blocks.extend(output.blocks)
                begin += shard.size
        linked = [output.shard.file for output in self.outputs if isinstance(output.file, LinkedFile)]
        self.stamps = with_links(self.stamps, linked)

    def _output_done(self, output: Output) -> None:
        """An output is on the disk."""
        done = output.hashes()
        if done is not None:
            self.done[output.plan.name] = done
            if self.plan.receipt and self.plan.base.is_directory:
                with self.noting:
                    note_finished(self.plan, output.plan, self.building, done)
        with self.changed:
            self.begun.discard(output)
            self.changed.notify_all()

    # --- the workers

    def _work(self, desk: Worker) -> None:
        try:
            while (task := self._next_task()) is not None:
                task(desk)
        finally:
            desk.leave()

    def _change(self, *, torch_ready: bool = False, stopped: bool = False) -> None:
        with self.changed:
            self.torch_ready, self.stopped = self.torch_ready or torch_ready, self.stopped or stopped
            self.changed.notify_all()

    def _next_task(self) -> _Task | None:
        """Hashing while torch is on its way; then blocks, and hashing just ahead of them; None when all is begun."""
        with self.changed:
            while not self.stopped:
                block = self.blocks[0] if self.torch_ready and self.blocks else None
                digest = self._due_digest(block)
                if digest is not None:
                    digest.busy = True
                    if digest.output is not None:
                        self.begun.add(digest.output)
                    return partial(self._hash, digest)
                if block is not None and self._may_begin(block.work.output):
                    self.begun.add(block.work.output)
                    return partial(self._merge_block, self.blocks.popleft())
                waiting = self.blocks or any(one.left and not one.busy for one in self.digests.values())
                if self.torch_ready and not waiting:
                    return None
                self.changed.wait()
        return None

    def _due_digest(self, block: Block | None) -> InputHash | None:
        """The first digest to go on with; only as far ahead of the next block as its input stays in the page cache."""
        limit = block.place + HASH_AHEAD if block else None
        for digest in self.digests.values():
            if limit is not None and digest.place > limit:
                return None
            if digest.left and not digest.busy:
                return digest if self._may_begin(digest.output) else None
        return None

    def _may_begin(self, output: Output | None) -> bool:
        """Whether an output is open, or may be opened now."""
        return output is None or output in self.begun or len(self.begun) < MOST_OPEN

    def _hash(self, digest: InputHash, desk: Worker) -> None:
        """Hash the next bytes of an input, and copy what of them is untouched."""
        page, start, output = desk.free_page(), digest.at, digest.output
        (output or digest).open()
        data = page.view(min(HASH_BYTES, digest.left), start)
        read_span(digest.fd, data, start, digest.file)
        digest.sha256.update(data)
        digest.at += len(data)
        digest.left -= len(data)
        ended = not digest.left
        digest.busy = False
        untouched = output.untouched_in(data, start) if output else []
        if output and untouched:
            output.add_part()
            desk.send(page, partial(self._copy, output, untouched))
        else:
            desk.keep(page)
        if ended and output:
            output.input_ended()
        elif ended:
            digest.close()

    def _copy(self, output: Output, untouched: list[tuple[memoryview, int]]) -> None:
        for data, at in untouched:
            output.file.write(data, at)
        output.part_done()

    def _merge_block(self, block: Block, desk: Worker) -> None:
        """Compute a block, and leave the writing to another thread."""
        work, first, last = block.work, block.first, block.last
        at = work.edit.offset(first)
        work.output.open()
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

    def _retreat(self, place: ComputeDevice, error: RuntimeError) -> None:
        """Go on with less memory where a GPU had too little for `error`, which else is raised again."""
        from adapterkit.merging.blocks.device import CPU, out_of_memory

        if place == CPU or not out_of_memory(error):
            raise error
        with self.lock:
            if self.place == place:  # else another worker has done it
                self.place = place.smaller()
                self.notes.append(f"{place.device} has too little memory free: went on with {self.place}")

    def _compute(self, block: Block, buffers: Buffers, data: memoryview) -> Retention | None:
        """The rows as bytes `data`, and what is kept of the update as far as it is measured."""
        from adapterkit.merging.blocks.block import load, merge_rows, pack_rows, restore_rows

        work, first, last = block.work, block.first, block.last
        edit, source = work.edit, work.output.input.fd
        with work.lock:
            loaded = work.loaded or load(edit, source)
            work.loaded = loaded = loaded if loaded.place == buffers.place else loaded.at(buffers.place)
        if block.recorded is not None:
            restore_rows(edit, loaded, source, block.recorded, buffers, data)
            return None
        if edit.packing is None:
            measured = self._rows_to_measure(edit, first, last)
            kept, undo, changed = merge_rows(
                edit, loaded, source, first, last, buffers, data, measured, work.number is not None
            )
            if changed:
                work.changed = True
            if undo is not None:
                work.output.record(block, undo)
            return kept
        pack_rows(edit, loaded, source, first, last, buffers, data)
        return self._finish_packing(work, loaded, source, buffers)

    def _finish_packing(self, work: EditWork, loaded: LoadedEdit, source: int, buffers: Buffers) -> Retention | None:
        """Count a packed block; after the last one of an edit write what belongs to all of them."""
        from adapterkit.merging.blocks.block import finish_packing

        with work.lock:
            work.computed += 1
            if work.computed < work.total:
                return None
        parts, kept = finish_packing(work.edit, loaded, source, buffers)
        work.changed = kept is None or kept.delta > 0
        for data, (start, stop) in zip(parts, work.edit.parts, strict=True):
            assert len(data) == stop - start
            work.output.file.write(memoryview(data), start)
        return kept

    def _write(self, work: EditWork, kept: Retention | None, data: memoryview, at: int) -> Future[None] | None:
        needed = work.output.write(data, at)
        with work.lock:
            if kept is not None:
                work.retention = kept if work.retention is None else work.retention + kept
            work.written += 1
            ended = work.written == work.total
        if ended:
            work.loaded = None
            if work.edit.changes and not work.changed:
                self.unchanged.append(work.edit.name)
            if work.retention is not None:
                self.retention[work.edit.name] = work.retention
            work.output.part_done()
            self.finished.put(work.edit.name)
        return needed

    def _rows_to_measure(self, edit: Edit, first: int, last: int) -> int:
        """How many rows of a block show what rounding keeps: all for a report, else a few at the tensor's start."""
        if not edit.deltas or edit.replaced:
            return 0
        if self.report:
            return last - first
        return min(last, max(1, SAMPLE_ELEMENTS // max(1, edit.matrix[1]))) if first == 0 else 0

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
