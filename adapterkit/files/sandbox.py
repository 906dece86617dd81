"""A program on strangers' data in a process of its own, which can neither hang nor fill the memory."""

from __future__ import annotations

import json
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any

from adapterkit.errors import AdapterkitError, FormatError
from adapterkit.files import system

LIMITS = Path(__file__).with_name("limits.py")  # which is run, never imported
ITSELF = 1 << 30  # bytes that a program may hold before it takes in any data, where only those that it holds are seen
LOOKS = 0.05  # seconds between two looks at it


def start(program: Path, *arguments: str, memory: int, what: str, stdin: IO[Any] | int = PIPE) -> Popen[str]:
    """Start `program`, a file with `main(limits, *arguments)`, which may take `memory` bytes for `what` it reads.

    Without a way to limit it, as on Windows, it is refused: a stranger's template could take all the memory there is.
    Raises AdapterkitError for that.
    """
    if find_spec("resource") is None:
        raise AdapterkitError(f"{what} needs limits on time and memory, which Python has on Linux and macOS only")
    bytes_ = memory if system.LIMITS_MEMORY else 0
    command = [sys.executable, "-P", str(LIMITS), str(program), str(bytes_), *arguments]
    # In a group of its own, ctrl-C leaves it to us when it ends.
    process = Popen(command, stdin=stdin, stdout=PIPE, stderr=DEVNULL, encoding="utf-8", process_group=0)
    if not system.LIMITS_MEMORY:
        threading.Thread(target=_end_if_larger, args=(process, ITSELF + memory), daemon=True).start()
    return process


def _end_if_larger(process: Popen[str], most: int) -> None:
    """Look after a process whose memory the system does not limit, and end it where it holds more than `most` bytes."""
    import psutil

    with suppress(psutil.Error):
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            if seen.memory_info().rss > most:
                process.kill()
            threading.Event().wait(LOOKS)


class Bounded:
    """A context in which `program` answers requests, a JSON line each; it starts with the first, ends with the context.

    It has `seconds` of processor time a request, and `memory` bytes for them all. `what` is what errors blame.
    """

    def __init__(self, program: Path, seconds: int, memory: int, what: str) -> None:
        self.program, self.seconds, self.memory, self.what = program, seconds, memory, what
        self.process: Popen[str] | None = None

    def __enter__(self) -> Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: str, longest: int) -> dict[str, Any]:
        """Answer a line of JSON; raises FormatError where that takes too long, or over `longest` characters."""
        if self.process is None:
            self.process = start(self.program, str(self.seconds), memory=self.memory, what=self.what)
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline(longest + 1)
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        if line:
            self.end()
            raise FormatError(f"{self.what} writes more than {longest:,} characters for it")
        if self.end() == system.OUT_OF_TIME:
            raise FormatError(f"{self.what} takes more than {self.seconds} s of processor time for it")
        raise FormatError(f"{self.what} ends the process that it is given to, perhaps for want of memory")

    def end(self) -> int | None:
        """End the process; what it ended with before, if it had."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()
        return process.returncode
