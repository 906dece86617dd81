"""A program on strangers' data in a process of its own, which can neither hang nor fill the memory."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

from adapterkit.errors import FormatError


class Bounded:
    """A context in which `program` answers requests, a JSON line each; it starts with the first, ends with the context.

    It gives itself `seconds` of processor time a request, and bounds its own memory. `what` is what errors blame.
    """

    def __init__(self, program: Path, seconds: int, what: str) -> None:
        self.program, self.seconds, self.what = program, seconds, what
        self.process: Popen[str] | None = None

    def __enter__(self) -> Bounded:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: str, longest: int) -> dict[str, Any]:
        """Answer a line of JSON; raises FormatError where that takes too long, or over `longest` characters."""
        if self.process is None:
            command = [sys.executable, "-P", str(self.program), str(self.seconds)]
            # In a group of its own, ctrl-C leaves it to us when it ends.
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8", process_group=0)
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
        if self.end() == -signal.SIGXCPU:
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
