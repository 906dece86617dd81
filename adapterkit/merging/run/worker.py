"""The resources of a worker: buffers for its device, and pages that are being written."""

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
    """One worker's buffers, and the pages that it computes into while others are being written."""

    def __init__(self, writers: ThreadPoolExecutor, when_failed: Callable[[], None] = lambda: None) -> None:
        """Write with `writers`; `when_failed` is called as soon as a write fails."""
        self._when_failed = when_failed
        self.buffers: Buffers | None = None
        self.writers = writers
        self.outgoing: deque[tuple[PageBuffer, Written | None]] = deque([(PageBuffer(), None) for _ in range(4)])

    def move_to(self, place: ComputeDevice) -> Buffers:
        """Return buffers for a device."""
        if self.buffers is None or self.buffers.place != place:
            import torch

            torch.set_num_threads(1)  # each worker computes on one core
            self.release()
            self.buffers = place.buffers()
            self.outgoing = deque((self.buffers.page(), written) for _, written in self.outgoing)
        return self.buffers

    def release(self) -> None:
        """Wait until every page is written, and release the buffers."""
        try:
            for _, written in self.outgoing:
                if written is not None:
                    _wait(written)
        finally:
            if self.buffers is not None:
                self.buffers.close()
                self.buffers = None

    def free_page(self) -> PageBuffer:
        """Return a page once its last block is written, and raise any error of that write."""
        page, written = self.outgoing.popleft()
        if written is not None:
            _wait(written)
        return page

    def put_back(self, page: PageBuffer) -> None:
        """Put back a page that has nothing to write."""
        self.outgoing.appendleft((page, None))

    def send(self, page: PageBuffer, write: Callable[[], Future[None] | None]) -> None:
        """Call `write` in another thread; the page stays in use until the future that it returns ends."""
        written = self.writers.submit(write)
        self.outgoing.append((page, written))
        written.add_done_callback(self._check)

    def _check(self, written: Written) -> None:
        if written.exception() is not None:
            self._when_failed()


def _wait(written: Written) -> None:
    """Wait until a page is written and hashed."""
    hashed = written.result()
    if hashed is not None:
        hashed.result()
