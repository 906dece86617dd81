"""Schedule the pieces of all output files on threads.

Every input is read once for its SHA-256, and unchanged spans are written from the same read. `import torch` takes a
second, so hashing and copying start before it; afterwards they run just ahead of the blocks, so that blocks find their
input in the page cache. A file is opened for its first piece, and the number of open files is limited.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from adapterkit.merging.plan.types import FilePlan
from adapterkit.merging.receipts.finished_file import FileDone
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.builder import FileBuilder, Job
from adapterkit.merging.run.device import Place
from adapterkit.merging.run.hashing import InputHash
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run.pieces import Block, Bundle
from adapterkit.merging.run.worker import Worker

HASH_AHEAD = 256 << 20  # bytes ahead of the blocks; small beside any page cache, and none is left over at the end
MAX_OPEN = 24  # files, with four descriptors each: some systems limit a process to 256

_Task = Callable[[Worker], None]


class Scheduler:
    """Makes the files of a job. The adapters' files, `also`, are hashed first."""

    def __init__(
        self,
        job: Job,
        files: Sequence[FilePlan],
        inputs: Inputs,
        also: Sequence[Path],
        when_done: Callable[[FileDone], None],
    ) -> None:
        """Start nothing yet; `when_done` is called in some thread with the record of each finished file."""
        self.job, self.files, self._inputs, self._when_done = job, files, inputs, when_done
        self.also = {file: InputHash(file, file.stat().st_size) for file in also}
        self.place = Place()
        self.builders: list[FileBuilder] = []
        self._threads = job.options.threads or default_threads()
        self._starts: dict[FileBuilder, int] = {}  # offsets in the concatenated inputs
        self._hashes: list[tuple[InputHash, FileBuilder | None]] = []  # unfinished, in order
        self._pieces: deque[tuple[FileBuilder, Block | Bundle]] = deque()
        self._open: set[FileBuilder] = set()
        self._changed = threading.Condition()  # notified when new work may be due
        self._torch_ready = self._stopped = False
        self._tensors: SimpleQueue[str | None] = SimpleQueue()  # finished; None when a worker has ended

    def _create(self) -> None:
        """Create every file, so that a full disk is noticed before any work."""
        start = 0
        self._hashes += [(hash_, None) for hash_ in self.also.values()]
        for file in self.files:
            builder = FileBuilder(self.job, file, self._tensors.put, self._file_done)
            self.builders.append(builder)
            self._starts[builder] = start
            self._hashes.append((builder.input, builder))
            self._pieces.extend((builder, piece) for piece in builder.pieces)
            start += builder.input.left
        self._inputs.link([builder.input.file for builder in self.builders if builder.linked])

    def run(self) -> Iterator[str]:
        """Make every file, and yield the name of each finished tensor."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")
        writers = ThreadPoolExecutor(self._threads, thread_name_prefix="write")
        done = False
        try:
            self._create()
            workers = [pool.submit(self._work, Worker(writers, self._stop)) for _ in range(self._threads)]
            for worker in workers:
                worker.add_done_callback(lambda _: self._tensors.put(None))
            yield from self._with_torch(workers)
            done = True
        finally:
            if not done:
                self._stop()
            pool.shutdown(wait=True)
            writers.shutdown(wait=True)
            for builder in self.builders:
                builder.close()
            for hash_ in self.also.values():
                hash_.close()

    # --- the calling thread

    def _with_torch(self, workers: Sequence[Future[None]]) -> Iterator[str]:
        import torch

        import adapterkit.merging.blocks.bundle  # noqa: F401  (imported here, so that no worker does while others wait)
        from adapterkit.merging.blocks.device import choose, exact_products

        self.place.device = choose(self.job.options.device, self.job.plan, self._threads)
        threads_before = torch.get_num_threads()
        self._change(torch_ready=True)
        try:
            with exact_products():
                yield from self._progress(workers)
        finally:
            torch.set_num_threads(threads_before)

    def _progress(self, workers: Sequence[Future[None]]) -> Iterator[str]:
        """Yield finished tensors until every worker has ended; the first failure stops all."""
        running = len(workers)
        while running:
            name = self._tensors.get()
            if name is not None:
                yield name
                continue
            running -= 1
            for worker in workers:
                if worker.done() and (error := worker.exception()) is not None:
                    raise error

    def _change(self, *, torch_ready: bool = False, stopped: bool = False) -> None:
        with self._changed:
            self._torch_ready, self._stopped = self._torch_ready or torch_ready, self._stopped or stopped
            self._changed.notify_all()

    # --- the workers

    def _work(self, worker: Worker) -> None:
        try:
            while (task := self._next_task()) is not None:
                task(worker)
        except BaseException:
            self._stop()
            raise
        finally:
            worker.release()

    def _stop(self) -> None:
        """Stop all workers, and at once: their pages may wait for the bytes that a failed task does not write."""
        self._change(stopped=True)
        for builder in self.builders:
            builder.stop()

    def _next_task(self) -> _Task | None:
        """Wait for the next task: hashing until torch is imported, then also blocks; None when no work is left."""
        with self._changed:
            while not self._stopped:
                builder, piece = self._pieces[0] if self._torch_ready and self._pieces else (None, None)
                if (due := self._due_hash(builder, piece)) is not None:
                    return due
                if builder is not None and piece is not None and self._may_open(builder):
                    self._open.add(builder)
                    self._pieces.popleft()
                    return partial(builder.make, piece, self.place)
                if (
                    self._torch_ready
                    and not self._pieces
                    and all(hash_.busy or not hash_.left for hash_, _ in self._hashes)
                ):
                    return None
                self._changed.wait()
        return None

    def _due_hash(self, next_file: FileBuilder | None, next_piece: Block | Bundle | None) -> _Task | None:
        """The next hash step, unless that is too far ahead for its input to stay in the page cache."""
        limit = self._starts[next_file] + next_piece.source_start + HASH_AHEAD if next_file and next_piece else None
        while self._hashes and not self._hashes[0][0].left:
            self._hashes.pop(0)
        for hash_, builder in self._hashes:
            if limit is not None and builder is not None and self._starts[builder] + hash_.at > limit:
                return None
            if hash_.left and not hash_.busy:
                if builder is None:
                    hash_.busy = True
                    return partial(_hash_next, hash_)
                if not self._may_open(builder):
                    return None
                hash_.busy = True
                self._open.add(builder)
                return builder.hash_next
        return None

    def _may_open(self, builder: FileBuilder) -> bool:
        """Whether a file is open, or may be opened."""
        return builder in self._open or len(self._open) < MAX_OPEN

    def _file_done(self, builder: FileBuilder, done: FileDone) -> None:
        """Report a finished file."""
        self._when_done(done)
        with self._changed:
            self._open.discard(builder)
            self._changed.notify_all()


def _hash_next(hash_: InputHash, worker: Worker) -> None:
    """Hash the next bytes of an adapter's file."""
    page = worker.free_page()
    hash_.open()
    hash_.take_next(page)
    worker.put_back(page)
    if not hash_.left:
        hash_.close()
    hash_.busy = False
