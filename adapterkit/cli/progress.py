"""Progress on stderr: a bar on a terminal, JSON lines with `--progress json`, otherwise nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Protocol

from adapterkit.cli.output import console, say_json
from adapterkit.text import visible

Mode = Literal["auto", "json", "none"]

JSON_INTERVAL = 0.05  # seconds between JSON lines, except the last

# The value of --progress.
mode: ContextVar[Mode] = ContextVar("mode", default="auto")


class Show(Protocol):
    """A callback for progress; `what` changes the description, `facts` go to JSON."""

    def __call__(self, done: int, total: int | None, what: str = "", **facts: Any) -> None: ...


def is_shown() -> bool:
    """Whether progress is shown at all."""
    return mode.get() == "json" or (mode.get() == "auto" and sys.stderr.isatty())


@contextmanager
def progress(
    what: str, *, in_bytes: bool = False, note: Callable[[dict[str, Any]], str] | None = None
) -> Iterator[Show]:
    """Yield a callback that shows the progress of `what`; `note` formats the facts for the bar."""
    if mode.get() == "json":
        yield _as_json(what)
    elif is_shown():
        yield from _as_bar(what, in_bytes, note)
    else:
        yield lambda done, total, what="", **facts: None


def _as_json(about: str) -> Show:
    last = 0.0

    def show(done: int, total: int | None, what: str = "", **facts: Any) -> None:
        nonlocal last
        if time.monotonic() - last >= JSON_INTERVAL or done == total or facts:
            last = time.monotonic()
            line = {"progress": what or about, "done": done, "total": total, **facts}
            say_json(line, indent=None, err=True)

    return show


def _as_bar(about: str, in_bytes: bool, note: Callable[[dict[str, Any]], str] | None) -> Iterator[Show]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    about_it, beside = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (about_it, BarColumn(), *counts, beside, TimeRemainingColumn())
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        task = bar.add_task(visible(about), total=None, note="")

        def show(done: int, total: int | None, what: str = "", **facts: Any) -> None:
            text = visible(note(facts)) if note else ""
            bar.update(task, description=visible(what or about), completed=done, total=total, note=text)

        yield show
