"""The pieces of a run: output files, edits and their blocks, digests of inputs, and what a worker works with."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.digest import OutputDigest
from adapterkit.outfile import OutputFile, PageBuffer
from adapterkit.plan import Edit, FilePlan, Recorded
from adapterkit.sidecar import SidecarWriter
from adapterkit.tensorfile import Header

if TYPE_CHECKING:
    from adapterkit.blocks import Loaded
    from adapterkit.delta import Retention
    from adapterkit.device import Buffers, Place


@dataclass
class Output:
    """An output file and how many parts of it are still to do: every edit, the untouched spans as one, its hash."""

    plan: FilePlan
    shard: Header  # the base's
    file: OutputFile
    parts: int
    begin: int  # where in all of the base's bytes its source begins
    digest: OutputDigest | None = None
    sidecar: SidecarWriter | None = None


@dataclass
class EditWork:
    """An edit in progress: the first worker to get there reads its factors, the last block to be written drops them."""

    edit: Edit
    output: Output
    total: int  # blocks
    number: int | None = None  # of the tensor in the sidecar, if what undoes it is recorded
    computed: int = 0
    written: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    loaded: Loaded | None = None
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


@dataclass
class Digest:
    """The SHA-256 of an input, taken step by step; one worker at a time is `busy` with it.

    Bytes that `output` takes over untouched are written on the way.
    """

    file: Path
    fd: int
    left: int
    output: Output | None = None
    at: int = 0
    busy: bool = False
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def place(self) -> int:
        """How far in all of the base's bytes it has come; an adapter is due at once."""
        return self.output.begin + self.at if self.output else 0


Written = Future[Future[None] | None]


class Desk:
    """What one worker works with: of what may be written two buffers, since one can be on its way to the disk."""

    def __init__(self, writers: ThreadPoolExecutor) -> None:
        self.buffers: Buffers | None = None
        self.writers = writers
        self.outgoing: deque[tuple[PageBuffer, Written | None]] = deque([(PageBuffer(), None) for _ in range(4)])

    def move_to(self, place: Place) -> Buffers:
        """Buffers for that place."""
        if self.buffers is None or self.buffers.place != place:
            import torch

            torch.set_num_threads(1)  # of this worker, which computes on its own core
            self.leave()
            self.buffers = place.buffers()
            self.outgoing = deque((self.buffers.page(), written) for _, written in self.outgoing)
        return self.buffers

    def leave(self) -> None:
        """Have everything written, and give the buffers back."""
        try:
            for _, written in self.outgoing:
                if written is not None:
                    _wait(written)
        finally:
            if self.buffers is not None:
                self.buffers.close()
                self.buffers = None

    def free_page(self) -> PageBuffer:
        """A buffer whose last block is written; raises what went wrong with that."""
        page, written = self.outgoing.popleft()
        if written is not None:
            _wait(written)
        return page

    def keep(self, page: PageBuffer) -> None:
        """Put a page back that nothing of is written."""
        self.outgoing.appendleft((page, None))

    def send(self, page: PageBuffer, write: Callable[[], Future[None] | None]) -> None:
        """Have `write` called by another thread; its result is what else needs the page."""
        self.outgoing.append((page, self.writers.submit(write)))


def _wait(written: Written) -> None:
    """Until it is written, and nothing else needs the page."""
    needed = written.result()
    if needed is not None:
        needed.result()


def untouched_in(plan: FilePlan, data: memoryview, start: int) -> list[tuple[memoryview, int]]:
    """What of the input's bytes from `start` on, `data`, the output takes over as they are, and where to."""
    spans = []
    for copy in plan.copies:
        first, last = max(copy.start, start), min(copy.stop, start + len(data))
        if first < last:
            spans.append((data[first - start : last - start], copy.at + first - copy.start))
    return spans
