"""Files of a plan made by threads, as many as there are cores, each of which takes the piece that is due.

Every input is read through once for its SHA-256, and untouched spans are written from what that has in hand. `import
torch` takes a second, so hashing and copying begin before it; from then on they run just ahead of the blocks, so that
blocks find their input in the page cache. A file is opened with its first piece; only so many are open at a time.
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
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.hashing import InputHash
from adapterkit.merging.run.inputs import Inputs
from adapterkit.merging.run.making import FileMaking, Job
from adapterkit.merging.run.pieces import Block, Bundle
from adapterkit.merging.run.place import Place
from adapterkit.merging.run.worker import Worker

HASH_AHEAD = 256 << 20  # of the blocks, so that it is not left over at the end; little beside any page cache
MOST_OPEN = 24  # files at a time, with four descriptors each: a process may have 1024, on some systems 256

_Task = Callable[[Worker], None]


class Scheduler:
    """Makes files of a job; `also` are hashed first, which are the adapters' files."""

    def __init__(
        self,
        job: Job,
        files: Sequence[FilePlan],
        inputs: Inputs,
        also: Sequence[Path],
        when_done: Callable[[FileMaking], None],
    ) -> None:
        """Nothing is begun; `when_done` is called by some thread with each file that is on the disk."""
        self.job, self.files, self._inputs, self._when_done = job, files, inputs, when_done
        self.also = {file: InputHash(file, file.stat().st_size) for file in also}
        self.place = Place()
        self.made: list[FileMaking] = []
        self._threads = job.options.threads or default_threads()
        self._begins: dict[FileMaking, int] = {}  # in the bytes of all inputs, one after the other
        self._hashes: list[tuple[InputHash, FileMaking | None]] = []  # not ended, in the order that they are due
        self._pieces: deque[tuple[FileMaking, Block | Bundle]] = deque()
        self._open: set[FileMaking] = set()
        self._changed = threading.Condition()  # what there is to do
        self._torch_ready = self._stopped = False
        self._tensors: SimpleQueue[str | None] = SimpleQueue()  # that are made; None: a worker has ended

    def _create(self) -> None:
        """Create every file, so that what the disk has no room for shows itself now."""
        begin = 0
        self._hashes += [(hash_, None) for hash_ in self.also.values()]
        for file in self.files:
            making = FileMaking(self.job, file, self._tensors.put, self._file_done)
            self.made.append(making)
            self._begins[making] = begin
            self._hashes.append((making.input, making))
            self._pieces.extend((making, piece) for piece in making.pieces)
            begin += making.input.left
        self._inputs.link([making.input.file for making in self.made if making.linked])

    def run(self) -> Iterator[str]:
        """Make every file, yielding the name of each tensor that is done."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="merge")
        writers = ThreadPoolExecutor(self._threads, thread_name_prefix="write")
        done = False
        try:
            self._create()
            workers = [pool.submit(self._work, Worker(writers)) for _ in range(self._threads)]
            for worker in workers:
                worker.add_done_callback(lambda _: self._tensors.put(None))
            yield from self._with_torch(workers)
            done = True
        finally:
            if not done:
                self._change(stopped=True)
                for making in self.made:
                    making.stop()
            pool.shutdown(wait=True)
            writers.shutdown(wait=True)
            for making in self.made:
                making.close()
            for hash_ in self.also.values():
                hash_.close()

    # --- the thread that waits for all

    def _with_torch(self, workers: Sequence[Future[None]]) -> Iterator[str]:
        import torch

        import adapterkit.merging.blocks.bundle  # noqa: F401  (here, so that no worker imports while another waits)
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
        """Pass finished tensors on until every worker has ended; the first failure stops them all."""
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
        finally:
            worker.leave()

    def _next_task(self) -> _Task | None:
        """Hashing while torch is on its way; then blocks, and hashing just ahead of them; None when all is begun."""
        with self._changed:
            while not self._stopped:
                making, piece = self._pieces[0] if self._torch_ready and self._pieces else (None, None)
                if (due := self._due_hash(making, piece)) is not None:
                    return due
                if making is not None and piece is not None and self._may_open(making):
                    self._open.add(making)
                    self._pieces.popleft()
                    return partial(making.make, piece, self.place)
                if (
                    self._torch_ready
                    and not self._pieces
                    and all(hash_.busy or not hash_.left for hash_, _ in self._hashes)
                ):
                    return None
                self._changed.wait()
        return None

    def _due_hash(self, of: FileMaking | None, following: Block | Bundle | None) -> _Task | None:
        """The first hash to go on with; only as far ahead of the next block as its input stays in the page cache."""
        limit = self._begins[of] + following.begin + HASH_AHEAD if of and following else None
        while self._hashes and not self._hashes[0][0].left:
            self._hashes.pop(0)
        for hash_, making in self._hashes:
            if limit is not None and making is not None and self._begins[making] + hash_.at > limit:
                return None
            if hash_.left and not hash_.busy:
                if making is None:
                    hash_.busy = True
                    return partial(_hash_next, hash_)
                if not self._may_open(making):
                    return None
                hash_.busy = True
                self._open.add(making)
                return making.hash_next
        return None

    def _may_open(self, making: FileMaking) -> bool:
        """Whether a file is open, or may be opened now."""
        return making in self._open or len(self._open) < MOST_OPEN

    def _file_done(self, making: FileMaking) -> None:
        """A file is on the disk."""
        self._when_done(making)
        with self._changed:
            self._open.discard(making)
            self._changed.notify_all()


def _hash_next(hash_: InputHash, worker: Worker) -> None:
    """Hash the next bytes of a file that no output is made from."""
    page = worker.free_page()
    hash_.open()
    hash_.take_next(page)
    worker.keep(page)
    if not hash_.left:
        hash_.close()
    hash_.busy = False
