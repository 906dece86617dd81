"""Run programs on untrusted data in a child process with limits on CPU time and memory."""

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
from adapterkit.files import os_calls

CHILD = Path(__file__).with_name("sandbox_subprocess.py")
BASELINE_BYTES = 1 << 30  # allowed for the program itself, where only its total memory can be measured
POLL_SECONDS = 0.05  # between measurements


def start(program: Path, *arguments: str, memory: int, what: str, stdin: IO[Any] | int = PIPE) -> Popen[str]:
    """Start `program`, a file with `main(limits, *arguments)`, limited to `memory` bytes for the data it reads.

    Raises AdapterkitError, which names `what`, where limits are not supported, as on Windows.
    """
    if find_spec("resource") is None:
        raise AdapterkitError(f"{what} needs limits on time and memory, which Python supports on Linux and macOS only")
    bytes_ = memory if os_calls.LIMITS_MEMORY else 0
    command = [sys.executable, "-P", str(CHILD), str(program), str(bytes_), *arguments]
    # In its own process group, so that ctrl-C doesn't reach it and we decide when it ends.
    process = Popen(command, stdin=stdin, stdout=PIPE, stderr=DEVNULL, encoding="utf-8", process_group=0)
    if not os_calls.LIMITS_MEMORY:
        threading.Thread(target=_kill_above, args=(process, BASELINE_BYTES + memory), daemon=True).start()
    return process


def _kill_above(process: Popen[str], limit: int) -> None:
    """Poll the memory of a process and kill it above `limit` bytes, for systems that cannot enforce a limit."""
    import psutil

    with suppress(psutil.Error):
        monitored = psutil.Process(process.pid)
        while process.poll() is None:
            if monitored.memory_info().rss > limit:
                process.kill()
            threading.Event().wait(POLL_SECONDS)


class Sandbox:
    """A context manager in which `program`, started on the first request, answers requests of one JSON line each.

    Args:
        seconds: CPU time for each request.
        memory: Bytes for all requests together.
        what: The subject of error messages.
    """

    def __init__(self, program: Path, seconds: int, memory: int, what: str) -> None:
        self.program, self.seconds, self.memory, self.what = program, seconds, memory, what
        self.process: Popen[str] | None = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: str, max_chars: int) -> dict[str, Any]:
        """Return the answer to a JSON line; raises FormatError if it takes too long or has over `max_chars`."""
        if self.process is None:
            self.process = start(self.program, str(self.seconds), memory=self.memory, what=self.what)
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline(max_chars + 1)
        if line.endswith("\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        if line:
            self.end()
            raise FormatError(f"{self.what} produced more than {max_chars:,} characters")
        if self.end() == os_calls.CPU_TIME_EXCEEDED:
            raise FormatError(f"{self.what} took more than {self.seconds} s of CPU time")
        raise FormatError(f"{self.what} crashed its sandbox process, possibly out of memory")

    def end(self) -> int | None:
        """Kill the process; returns its exit code if it had already ended."""
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.kill()
        with suppress(BrokenPipeError):
            process.communicate()
        return process.returncode
