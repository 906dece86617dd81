"""Jobs: commands in subprocesses, which can be cancelled and may crash; progress comes as JSON lines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from adapterkit.files import os_calls
from adapterkit.text import visible
from adapterkit.tui.actions import line

State = Literal["running", "done", "failed", "cancelled"]
PATIENCE = 60.0  # seconds that a cancelled command may take to end: training finishes its step and saves
MAX_LINES = 500
LINE_BYTES = 1 << 20


@dataclass(eq=False)
class Job:
    """A command, its output and its progress."""

    argv: list[str]
    began: float = field(default_factory=time.monotonic)
    state: State = "running"
    doing: str = ""
    done: int = 0
    total: int | None = None
    ended: float | None = None
    code: int | None = None
    said: list[str] = field(default_factory=list)  # stderr without progress lines
    out: str = ""
    losses: list[float] = field(default_factory=list)
    process: asyncio.subprocess.Process | None = None
    cancelling: bool = False

    @property
    def command(self) -> str:
        """The command line, quoted for a shell."""
        return line(self.argv)

    @property
    def share(self) -> float | None:
        """The progress from 0 to 1, if known."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return (self.ended or time.monotonic()) - self.began

    @property
    def left(self) -> float | None:
        """The estimated seconds to the end."""
        share = self.share
        return self.seconds * (1 - share) / share if share and self.state == "running" else None

    @property
    def result(self) -> str:
        """The error, or the line that names the output."""
        if self.state != "done":
            errors = [text.partition(": ")[2] for text in self.said if text.startswith(("error: ", "hint: "))]
            return "; ".join(errors or self.said[-1:])
        lines = [text for text in self.out.splitlines() if text.strip()]
        return next((text for text in lines if text.startswith("wrote")), lines[-1] if lines else "")

    def hear(self, text: str) -> None:
        """Take a line of stderr: progress as JSON, or a message."""
        if text.startswith("{"):
            try:
                facts: dict[str, Any] = json.loads(text)
                self.doing, self.done, self.total = visible(str(facts["progress"])), int(facts["done"]), facts["total"]
                if isinstance(facts.get("loss"), float):
                    self.losses.append(facts["loss"])
                return
            except (ValueError, KeyError, TypeError):
                pass
        self.said = [*self.said, text][-MAX_LINES:]

    async def run(self, changed: Callable[[], None]) -> None:
        """Run the command to its end; calls `changed` on every change."""
        command = [sys.executable, "-m", "adapterkit", "--progress", "json", *self.argv]
        pipe = asyncio.subprocess.PIPE
        try:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=_environment(),
                start_new_session=True, limit=LINE_BYTES,
            )  # fmt: skip
        except OSError as error:
            self.said, self.code = [f"cannot start: {error.strerror}"], 1
        else:
            self.out, _ = await asyncio.gather(self._read_out(), self._read_err(changed))
            self.code = await self.process.wait()
        self.ended = time.monotonic()
        if self.code == 0:
            self.state = "done"
        else:
            self.state = "cancelled" if self.cancelling else "failed"
        changed()

    async def cancel(self) -> None:
        """Interrupt the command like Ctrl-C, so that it cleans up; kill it on a second call, or after `PATIENCE`."""
        process = self.process
        if process is None or process.returncode is not None:
            return
        if self.cancelling:
            os_calls.signal_group(process.pid, os_calls.KILL)
            return
        self.cancelling = True
        os_calls.signal_group(process.pid, signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), PATIENCE)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os_calls.signal_group(process.pid, os_calls.KILL)

    async def _read_out(self) -> str:
        assert self.process is not None and self.process.stdout is not None
        return (await self.process.stdout.read()).decode(errors="replace")

    async def _read_err(self, changed: Callable[[], None]) -> None:
        assert self.process is not None and self.process.stderr is not None
        while True:
            try:
                text = await self.process.stderr.readline()
            except ValueError:  # the line is longer than LINE_BYTES: skip it
                continue
            if not text:
                return
            self.hear(text.decode(errors="replace").rstrip("\n"))
            changed()


async def output_of(argv: Sequence[str]) -> tuple[int, str]:
    """Run a short command; returns its exit code and output. Cancelling the task interrupts the command."""
    job = Job(list(argv))
    try:
        await job.run(lambda: None)
    finally:
        if job.process is not None and job.process.returncode is None:
            os_calls.signal_group(job.process.pid, signal.SIGINT)
    assert job.code is not None
    return job.code, "\n".join([*job.said, *job.out.splitlines()]).strip()


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
