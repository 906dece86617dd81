"""SHA-256 of inputs as they are read, and of outputs in file order, although pieces are made in any order."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.files.opening import open_descriptor, open_regular
from adapterkit.files.safetensors import read_span
from adapterkit.merging.plan.edits import MergeEdit
from adapterkit.merging.plan.types import FilePlan

if TYPE_CHECKING:
    from adapterkit.files.outfile import OutputFile, PageBuffer

HASH_BYTES = 4 << 20  # per step, faster than 16: after each one the thread that imports may hold the GIL for some ms


def is_copy(plan: FilePlan) -> bool:
    """Whether an output is the same file as its source."""
    if not plan.copies_all:
        return False
    with open_regular(plan.source) as stream:
        return stream.read(len(plan.header)) == plan.header


@dataclass
class InputHash:
    """The SHA-256 of an input, computed in steps by one `busy` worker at a time."""

    file: Path
    left: int
    at: int = 0
    busy: bool = False
    fd: int = -1
    sha256: hashlib._Hash = field(default_factory=hashlib.sha256)

    def open(self) -> None:
        """Open the file, unless it is open."""
        if self.fd < 0:
            self.fd = open_descriptor(self.file)

    def take_next(self, page: PageBuffer) -> memoryview:
        """Read the next bytes into `page` and hash them."""
        data = page.view(min(HASH_BYTES, self.left), self.at)
        read_span(self.fd, data, self.at, self.file)
        self.sha256.update(data)
        self.at += len(data)
        self.left -= len(data)
        return data

    def close(self) -> None:
        """Close the file, if it is open."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OutputHash:
    """The SHA-256 of an output: its header, the pieces that are fed, and the spans copied from the open file `source`.

    Pieces that are fed early wait for their turn; their futures end when they are hashed. A copy has the hash of its
    source. A quantized output, whose tensors are not made in file order, is read back at the end.
    """

    def __init__(self, plan: FilePlan, source: int, when_done: Callable[[], None]) -> None:
        self._plan, self._source, self._when_done = plan, source, when_done
        self._sha256 = hashlib.sha256(plan.header)
        self._at = len(plan.header)
        self._copies = {copy.at: copy for copy in plan.copies}
        self._from_sidecar = {copy.at: copy.tensor for copy in plan.from_sidecar}
        self._waiting: dict[int, tuple[memoryview, Future[None]]] = {}
        self._lock = threading.Lock()
        self._is_copy = is_copy(plan)
        self._at_the_end = any(isinstance(edit, MergeEdit) and edit.packing for edit in plan.edits)
        self._busy, self._stopped = False, self._is_copy or self._at_the_end

    @property
    def incremental(self) -> bool:
        """Whether it is computed while the output is made, and calls `when_done` at its end."""
        return not (self._is_copy or self._at_the_end)

    def feed(self, data: memoryview, at: int) -> Future[None] | None:
        """Hash `data` at offset `at` when its turn comes; None if it is not needed."""
        done: Future[None] = Future()
        with self._lock:
            if self._stopped or not data:
                return None
            self._waiting[at] = data, done
        self.advance()
        return done

    def abandon(self) -> None:
        """Stop, and release all waiting pieces."""
        with self._lock:
            self._stopped = True
            for _, done in self._waiting.values():
                done.set_result(None)
            self._waiting.clear()

    def hexdigest(self, source: str, output: OutputFile) -> str:
        """The finished hash; `source` is the hash of the source file."""
        if self._is_copy:
            return source
        if self._at_the_end:
            self._hash_span(output.fileno(), self._at, self._plan.size, output.path)
        return self._sha256.hexdigest()

    def advance(self) -> None:
        """Hash up to the first gap, unless another thread is doing so."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
        while self._next():
            pass

    def _next(self) -> bool:
        """Hash the next piece, if it is available."""
        with self._lock:
            stopped, at = self._stopped, self._at
            found = None if stopped else self._waiting.pop(at, None)
            copy, tensor = self._copies.get(at), self._from_sidecar.get(at)
            if stopped or (found is None and copy is None and tensor is None):
                ended = at == self._plan.size and not stopped
                self._busy, self._stopped = False, stopped or ended
                if not ended:
                    return False
        if found is not None:
            data, done = found
            self._sha256.update(data)
            self._at += len(data)
            done.set_result(None)
        elif copy is not None:
            self._hash_span(self._source, copy.start, copy.stop, self._plan.source)
            self._at += copy.stop - copy.start
        elif tensor is not None:
            self._sha256.update(tensor.read_bytes())
            self._at += tensor.nbytes
        else:
            self._when_done()
            return False
        return True

    def _hash_span(self, fd: int, start: int, stop: int, file: Path) -> None:
        page = memoryview(bytearray(min(HASH_BYTES, stop - start)))
        for at in range(start, stop, HASH_BYTES):
            data = page[: min(HASH_BYTES, stop - at)]
            read_span(fd, data, at, file)
            self._sha256.update(data)
