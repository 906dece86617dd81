"""Direct I/O: the same bytes for every alignment and file system."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from adapterkit.files import outfile
from adapterkit.files.outfile import PAGE, OutputFile, PageBuffer

# Spans that start and end inside a page, at page boundaries, and within a single page.
CUTS = [0, 8, 100, PAGE, 3 * PAGE + 17, 5 * PAGE, 5 * PAGE + 1, 9 * PAGE - 2, 12 * PAGE + 5]


def write_in_spans(path: Path, content: bytes, shift: int = 0) -> None:
    """Write `content` in shuffled spans; a `shift` misaligns the memory."""
    file = OutputFile(path, len(content))
    file.open()
    spans = list(pairwise(CUTS[1:]))
    random.Random(0).shuffle(spans)
    for start, stop in spans:
        data = PageBuffer().view(stop - start, start + shift)
        data[:] = content[start:stop]
        file.write(data, start)
    file.finish(content[: CUTS[1]])
    file.close()


@pytest.mark.parametrize("shift", [0, 2])
def test_every_byte_arrives(tmp_path: Path, shift: int) -> None:
    content = random.Random(1).randbytes(CUTS[-1])
    write_in_spans(tmp_path / "file", content, shift)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    real: Callable[..., Any] = getattr(os, refused)
    direct: set[int] = set()
    opened = os.open

    def refuse(*args: Any) -> Any:
        if (args[1] & os.O_DIRECT) if refused == "open" else (args[0] in direct):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*args)

    def note(path: Any, flags: int, *rest: Any) -> int:
        fd = opened(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    if refused == "pwrite":
        monkeypatch.setattr(outfile.os, "open", note)
    monkeypatch.setattr(outfile.os, refused, refuse)
    content = random.Random(2).randbytes(CUTS[-1])
    write_in_spans(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == content


def test_a_failing_direct_write_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = OutputFile(tmp_path / "file", 4 * PAGE)
    file.open()
    monkeypatch.setattr(outfile.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(PageBuffer().view(2 * PAGE, 0), 0)
    file.close()


def test_a_page_buffer_grows_and_preserves_the_page_offset() -> None:
    buffer = PageBuffer()
    assert len(buffer.view(10, 5)) == 10
    assert len(buffer.view(3 * PAGE, 7 * PAGE + 9)) == 3 * PAGE
