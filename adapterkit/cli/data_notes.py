"""Notes on the data of a command: skipped and truncated records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.train.data.tokenize import Encoded

SHOWN = 10


def notes_of(data: Encoded) -> list[str]:
    """A line for each of the first skipped records, one for the rest, and one for the truncated records."""
    notes = [f"skipped {bad.where}: {bad.why}" for bad in data.bad[:SHOWN]]
    notes += [f"skipped {counted(len(data.bad) - SHOWN, 'more record')}"] * (len(data.bad) > SHOWN)
    if truncated := data.truncated:
        first = f", the first at {truncated[0]}" if len(truncated) > 1 else f" at {truncated[0]}"
        notes.append(f"truncated {counted(len(truncated), 'record')}{first}")
    return notes
