"""What is to be said of the data that a command reads: which records were left out, and which were cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.train.data.tokenize import Encoded

SHOWN = 10


def notes_of(data: Encoded) -> list[str]:
    """A line for each of the first records that were left out, one for the others, one for those that were cut."""
    notes = [f"left out {bad.where}: {bad.why}" for bad in data.bad[:SHOWN]]
    notes += [f"left out {len(data.bad) - SHOWN:,} more"] * (len(data.bad) > SHOWN)
    if cut := data.truncated:
        first = f", the first of them {cut[0]}" if len(cut) > 1 else f": {cut[0]}"
        notes.append(f"{counted(len(cut), 'record')} {'were' if len(cut) > 1 else 'was'} cut{first}")
    return notes
