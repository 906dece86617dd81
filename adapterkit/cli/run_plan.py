"""A plan at work in the terminal: a bar, and sizes as people read them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapterkit.cli.output import note, warn
from adapterkit.cli.progress import progress
from adapterkit.merging.plan.types import Hashes, MergePlan
from adapterkit.merging.run.scheduler import Merged, TensorMerged, run
from adapterkit.text import argument, command

DEVICE_HELP = "Where to compute: cpu, cuda, cuda:N, or auto, which takes a GPU where the job gains from one."


def run_with_bar(
    plan: MergePlan, what: str, threads: int, device: str, report: bool = False, resume: bool = False
) -> Merged:
    """Execute `plan`, show how far it is, and say what was done otherwise than asked for."""
    # Closed here, since ctrl-C may come while the bar is drawn.
    with (
        progress(what) as show,
        closing(run(plan, threads=threads, report=report, device=device, resume=resume)) as events,
    ):
        for event in events:
            if isinstance(event, TensorMerged):
                show(event.done, event.total)
            else:
                note(*event.notes)
                warn(*event.warnings)
                return event
    raise AssertionError("a merge ends with its result")


def hashes_by_label(plan: MergePlan, hashes: Hashes) -> dict[str, dict[str, Any]]:
    """The SHA-256 of every file of a run, for `--json`; those of adapters by label."""
    labels = [one.label for one in plan.given]
    return asdict(hashes) | {"adapters": dict(zip(labels, hashes.adapters, strict=True))}


def undo_command(merged: Path, adapters: Sequence[str]) -> list[str]:
    """The command that undoes a merge, from where one stands: its parts, quoted for a shell."""
    new = "NEW" if merged.is_dir() else f"NEW{merged.suffix}"
    named = [one if weighted(one) == (one, 1.0) else f"{one}:1" for one in dict.fromkeys(adapters)]
    words = [["adapterkit", "unmerge"], [argument(merged)], ["-o", new]]
    return [command(group) for group in [*words, *(["--adapter", argument(one)] for one in named)]]


def weighted(text: str) -> tuple[str, float]:
    """`path:0.7` as (path, 0.7); a path that exists as it is written wins."""
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0
