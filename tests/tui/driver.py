"""The app driven by its keys, without a terminal, and what it shows."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from html import unescape
from pathlib import Path

from textual.pilot import Pilot
from textual.widgets import Static
from textual.worker import WorkerCancelled

from adapterkit.tui import app as module
from adapterkit.tui.app import AdapterkitApp
from adapterkit.tui.jobs import Job
from adapterkit.tui.widgets.sources import Sources

WIDE, USUAL, NARROW, TINY = (160, 48), (120, 30), (80, 24), (12, 4)  # what is drawn takes time: wide where it matters
BASE = "lab/base"
ROOT = Path(module.__file__).parents[2]


async def settled(pilot: Pilot[None]) -> None:
    """Until nothing is going on any more but jobs: no worker is there after timers and messages had their turn, twice."""
    quiet = 0
    while quiet < 2:
        await pilot.pause(0.002)
        workers = [worker for worker in pilot.app.workers if worker.group != "jobs"]
        for worker in workers:
            with suppress(WorkerCancelled):  # where another took its place
                await worker.wait()
        await pilot.pause()
        quiet = 0 if workers else quiet + 1


async def ended(pilot: Pilot[None]) -> Job:
    """The newest job, at its end."""
    jobs = [worker for worker in pilot.app.workers if worker.group == "jobs"]
    await pilot.app.workers.wait_for_complete(jobs)
    await settled(pilot)
    job: Job = pilot.app.jobs[-1]  # type: ignore[attr-defined]
    return job


@asynccontextmanager
async def running(*folders: Path, base: str = "", size: tuple[int, int] = USUAL) -> AsyncIterator[Pilot[None]]:
    """The app, with what is in `folders` read; how a test leaves it must be drawable."""
    app = AdapterkitApp(folders, base)
    async with app.run_test(size=size) as pilot:
        await settled(pilot)
        yield pilot
        if app.is_running:
            app.export_screenshot()


def text_of(widget: Static) -> str:
    """What a widget shows, as text."""
    from rich.console import Console

    console = Console(width=300, color_system=None, highlight=False, force_terminal=False)
    with console.capture() as capture:
        console.print(widget.content)  # type: ignore[arg-type]
    return capture.get()


def names(pilot: Pilot[None]) -> list[str]:
    """The rows of the table, in their order."""
    return [row.name for row in pilot.app.table._shown]  # type: ignore[attr-defined]


def facts(pilot: Pilot[None]) -> str:
    """The overview."""
    return text_of(pilot.app.screen.query_one("#facts", Static))


def drawn(pilot: Pilot[None]) -> str:
    """All that is on the screen."""
    return unescape("".join(re.findall(r"<text[^>]*>([^<]*)", pilot.app.export_screenshot()))).replace("\xa0", " ")


async def on_hub(pilot: Pilot[None]) -> None:
    """Pick the Hub in the sources."""
    tree = pilot.app.query_one(Sources)
    tree.focus()
    tree.move_cursor(tree.root.children[-1])
    await pilot.press("enter")
    await settled(pilot)
