"""Run a merge plan: file by file, block of rows by block of rows, on as many threads as there are cores.

Untouched spans are copied by the kernel. A worker reads a block, computes and writes it; reading, computing and
writing overlap between the workers, and the disk starts on each block at once. `import torch` takes a second, so
reserving space, copying and hashing begin before it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from adapterkit.card import write_companions
from adapterkit.errors import FormatError, NoSpaceError
from adapterkit.plan import Edit, FilePlan, MergePlan
from adapterkit.staging import errors_of, staged
from adapterkit.tensorfile import tensor_bytes, write_span

if TYPE_CHECKING:
    from adapterkit.blocks import Buffers, Loaded
    from adapterkit.delta import Retention

BLOCK_BYTES = 8 << 20  # what a worker reads and writes at a time
COPY_BYTES = 64 << 20
HASH_BYTES = 16 << 20  # large, since after each the importing thread may hold the interpreter for some milliseconds
SAMPLE_ELEMENTS = 1 << 15  # of each tensor, where no full report is asked for
TORCH_BYTES = 230 << 20  # what importing torch itself takes, for the estimate


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
    hashes: dict[str, dict[str, str]]  # the base's and each adapter's label -> file name -> SHA-256
    retention: dict[str, Retention]


def default_threads() -> int:
    """As many as this process may use, up to 8: beyond that the disk is the limit."""
    return min(8, len(os.sched_getaffinity(0)))


def estimate_memory(plan: MergePlan, threads: int) -> int:
    """The peak resident bytes to expect: torch, a worker's blocks, and the factors in flight; not the model's size."""
    factors = sorted(
        sum(4 * d.weights.rank * (d.weights.in_features + d.weights.out_features) for d in edit.deltas)
        for file in plan.files
        for edit in file.edits
    )
    return TORCH_BYTES + threads * 3 * BLOCK_BYTES + 2 * sum(factors[-threads:])


def run(
    plan: MergePlan, *, threads: int | None = None, report: bool = False
) -> Generator[TensorMerged | Merged, None, None]:
    """Run `plan`, yielding an event for each tensor and the result last; nothing is left behind on failure.

    `report` measures what rounding kept of every element instead of a sample. Raises NoSpaceError where the disk is
    too small, before or while writing, and FitError where factors are not finite or results exceed their dtype.
    """
    _check_space(plan)
    with staged(plan.out, directory=plan.base.is_directory) as building:
        state = _Run(plan, building, threads or default_threads(), report)
        yield from state.tensors()
        if plan.base.is_directory:
            write_companions(plan, building, state.result.hashes)
    yield state.result


def _check_space(plan: MergePlan) -> None:
    folder = plan.out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if stats.f_blocks and plan.bytes_to_write > free:  # some file systems do not say
        raise NoSpaceError(
            f"{plan.out}: needs {plan.bytes_to_write / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
        )


@dataclass
class _Output:
    """An open output file; its header is written when everything else is, so that half a file never loads."""

    plan: FilePlan
    fd: int
    parts: int  # still to do: every edit, and the copies as one


@dataclass
class _EditWork:
    """An edit in progress: the first worker to get there reads its factors, the last one drops them."""

    edit: Edit
    output: _Output
    blocks: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Loaded | None = None
    retention: Retention | None = None


_Early = tuple[int, Callable[[], None]]  # (index of the file, what to do)
_Block = tuple[int, _EditWork, int, int]  # (index of the file, the edit, first row, last row + 1)


class _Run:
    """What the workers of one merge share."""

    def __init__(self, plan: MergePlan, building: Path, threads: int, report: bool) -> None:
        self.plan, self.building, self.threads, self.report = plan, building, threads, report
        self.lock = threading.Lock()
        self.torch_ready = threading.Event()
        self.stop = threading.Event()
        self.finished: SimpleQueue[str | None] = SimpleQueue()
        self.hashes: dict[Path, str] = {}
        self.retention: dict[str, Retention] = {}
        self.sources: dict[Path, int] = {}
        self.outputs: list[_Output] = []
        self.early: deque[_Early] = deque()
        self.blocks: deque[_Block] = deque()

    def tensors(self) -> Iterator[TensorMerged]:
        """Run everything; an event for each tensor that is done."""
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")
        try:
            self._open_files()
            self._list_tasks()
            workers = [pool.submit(self._work) for _ in range(self.threads)]
            for worker in workers:
                worker.add_done_callback(lambda _: self.finished.put(None))
            import torch

            import adapterkit.blocks  # noqa: F401  (here, so that no worker imports while another waits)

            threads_before = torch.get_num_threads()
            self.torch_ready.set()
            try:
                yield from self._progress(workers)
            finally:
                torch.set_num_threads(threads_before)
        finally:
            self.stop.set()
            self.torch_ready.set()
            pool.shutdown(wait=True)
            for fd in (*self.sources.values(), *(output.fd for output in self.outputs)):
                os.close(fd)

    @property
    def result(self) -> Merged:
        plan = self.plan
        hashes = {plan.base.name: {shard.file.name: self.hashes[shard.file] for shard in plan.base.shards}}
        for one in plan.given:
            hashes[one.label] = {file.name: self.hashes[file] for file in one.adapter.files}
        return Merged(plan.out, plan.bytes_to_write, plan.edits, hashes, dict(sorted(self.retention.items())))

    # --- before

    def _open_files(self) -> None:
        """Open every file and reserve the space of the output: a full disk shows itself now."""
        for file in self.plan.files:
            self.sources[file.source] = os.open(file.source, os.O_RDONLY | os.O_CLOEXEC)
            path = self.building / file.name if self.plan.base.is_directory else self.building
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self.outputs.append(_Output(file, fd, len(file.edits) + 1))
            if file.size:
                os.posix_fallocate(fd, 0, file.size)

    def _list_tasks(self) -> None:
        """What needs no torch (hashing the inputs, copying untouched spans) apart from what does."""
        self.early.extend((0, partial(self._hash, file)) for one in self.plan.given for file in one.adapter.files)
        for index, output in enumerate(self.outputs):
            self.early.append((index, partial(self._copy, output)))
            self.early.append((index, partial(self._hash, output.plan.source)))
            for edit in output.plan.edits:
                rows, columns = edit.matrix
                step = max(1, BLOCK_BYTES // max(1, tensor_bytes(edit.dtype, (columns,))))
                starts = range(0, max(1, rows), step)
                work = _EditWork(edit, output, len(starts))
                self.blocks.extend((index, work, start, min(rows, start + step)) for start in starts)

    # --- the workers

    def _work(self) -> None:
        """Take tasks until none is left: early ones while torch is on its way, then everything file by file."""
        buffers: Buffers | None = None
        while not self.stop.is_set():
            with self.lock:
                ready = self.torch_ready.is_set()
                at = self.blocks[0][0] if self.blocks else len(self.outputs)
                early = self.early.popleft() if self.early and (not ready or self.early[0][0] <= at) else None
                block = self.blocks.popleft() if early is None and ready and self.blocks else None
            if early is not None:
                early[1]()
            elif block is not None:
                buffers = buffers or _new_buffers()
                self._merge_block(*block[1:], buffers)
            elif ready:
                return
            else:
                self.torch_ready.wait()

    def _hash(self, file: Path) -> None:
        """The SHA-256 of an input, for the card; reading it here also brings it into the page cache."""
        digest, buffer = hashlib.sha256(), bytearray(HASH_BYTES)
        with errors_of(file), open(file, "rb", buffering=0) as stream:
            while (count := stream.readinto(buffer)) and not self.stop.is_set():
                digest.update(memoryview(buffer)[:count])
        self.hashes[file] = digest.hexdigest()

    def _copy(self, output: _Output) -> None:
        source = self.sources[output.plan.source]
        for copy in output.plan.copies:
            start, at = copy.start, copy.at
            while start < copy.stop and not self.stop.is_set():
                count = _copy_range(source, output.fd, min(COPY_BYTES, copy.stop - start), start, at)
                if count == 0:
                    raise FormatError(f"{output.plan.source}: ended at byte {start} while being copied")
                start, at = start + count, at + count
        self._part_done(output)

    def _merge_block(self, work: _EditWork, first: int, last: int, buffers: Buffers) -> None:
        from adapterkit.blocks import load, merge_rows

        edit, output = work.edit, work.output
        source = self.sources[output.plan.source]
        measured = self._rows_to_measure(edit, first, last)
        with work.lock:
            work.loaded = work.loaded or load(edit, source)
        data, kept = merge_rows(edit, work.loaded, source, first, last, buffers, measured)
        at = edit.start + first * tensor_bytes(edit.dtype, (edit.matrix[1],))
        write_span(output.fd, data, at)
        # The page cache need not keep these bytes; saying so makes the disk start on them now, not at the final flush.
        os.posix_fadvise(output.fd, at, len(data), os.POSIX_FADV_DONTNEED)
        with work.lock:
            if kept is not None:
                work.retention = kept if work.retention is None else work.retention + kept
            work.blocks -= 1
            if work.blocks:
                return
        work.loaded = None
        if work.retention is not None:
            self.retention[edit.name] = work.retention
        self._part_done(output)
        self.finished.put(edit.name)

    def _rows_to_measure(self, edit: Edit, first: int, last: int) -> int:
        """How many rows of a block show what rounding keeps: all for a report, else a few at the tensor's start."""
        if not edit.deltas or edit.replaced:
            return 0
        if self.report:
            return last - first
        return min(last, max(1, SAMPLE_ELEMENTS // max(1, edit.matrix[1]))) if first == 0 else 0

    def _part_done(self, output: _Output) -> None:
        """Count a finished part of a file; the last one writes the header and flushes the file."""
        with self.lock:
            output.parts -= 1
            if output.parts or self.stop.is_set():
                return
        write_span(output.fd, output.plan.header, 0)
        os.fsync(output.fd)

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


def _new_buffers() -> Buffers:
    """The buffers of this worker, which from now on computes on its own core only."""
    import torch

    from adapterkit.blocks import Buffers

    torch.set_num_threads(1)
    return Buffers()


def _copy_range(source: int, target: int, count: int, start: int, at: int) -> int:
    """Copy in the kernel; by hand between file systems that cannot."""
    try:
        return os.copy_file_range(source, target, count, start, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
            raise
        data = os.pread(source, min(count, BLOCK_BYTES), start)
        write_span(target, data, at)
        return len(data)
