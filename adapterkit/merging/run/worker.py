"""What one worker of a run works with: buffers for its place, and pages on their way to the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from adapterkit.files.outfile import PageBuffer

if TYPE_CHECKING:
    from adapterkit.merging.blocks.device import Buffers, ComputeDevice


Written = Future[Future[None] | None]


class Worker:
    """What one worker works with: of what may be written two buffers, since one can be on its way to the disk."""

    def __init__(self, writers: ThreadPoolExecutor) -> None:
        self.buffers: Buffers | None = None
        self.writers = writers
        self.outgoing: deque[tuple[PageBuffer, Written | None]] = deque([(PageBuffer(), None) for _ in range(4)])

    def move_to(self, place: ComputeDevice) -> Buffers:
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
