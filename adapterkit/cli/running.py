"""A plan at work in the terminal: a bar, and sizes as people read them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing

from adapterkit.plan import MergePlan
from adapterkit.stream import Merged, TensorMerged, run

DEVICE_HELP = "Where to compute: cpu, cuda, cuda:N, or auto, which takes a GPU where the job gains from one."


def run_with_bar(
    plan: MergePlan, what: str, threads: int, device: str, report: bool = False, resume: bool = False
) -> Merged:
    """Execute `plan`, with a bar on stderr where that is a terminal, and say what was done otherwise than asked for."""
    # Closed here, since ctrl-C may come while the bar is drawn.
    with closing(run(plan, threads=threads, report=report, device=device, resume=resume)) as events:
        for event in _drawn(events, what) if sys.stderr.isatty() else events:
            if isinstance(event, Merged):
                for note in event.notes:
                    print(f"note: {note}", file=sys.stderr)
                return event
    raise AssertionError("a merge ends with its result")


def _drawn(events: Iterator[TensorMerged | Merged], what: str) -> Iterator[TensorMerged | Merged]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        for event in events:
            if isinstance(event, TensorMerged):
                bar.update(task, completed=event.done, total=event.total)
            yield event


def files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def weighted(text: str) -> tuple[str, float]:
    """`path:0.7` as (path, 0.7); a path that exists as it is written wins."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0
