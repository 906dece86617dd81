"""Commands to run after a result, quoted for a shell; they work from the current folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adapterkit.cli.options import weighted
from adapterkit.text import LONGEST, argument, command

REPO = "USER/NAME"  # a placeholder for a repository on the Hub


def undo_command(merged: Path, adapters: Sequence[str]) -> list[str]:
    """The command that undoes a merge, in parts between which a line can break."""
    new = "NEW" if merged.is_dir() else f"NEW{merged.suffix}"
    named = [one if weighted(one) == (one, 1.0) else f"{one}:1" for one in dict.fromkeys(adapters)]
    words = [["adapterkit", "unmerge"], [argument(merged)], ["-o", new]]
    return [command(group) for group in [*words, *(["--adapter", argument(one)] for one in named)]]


def merge_command(base: str, adapter: Path) -> list[str]:
    """The command that merges an adapter into its base."""
    return [command(["adapterkit", "merge", argument(base), argument(adapter), "-o", "NEW"])]


def push_command(folder: Path) -> list[str]:
    """The command that uploads an adapter or a model."""
    return [command(["adapterkit", "push", argument(folder), REPO])]


def next_lines(label: str, parts: Sequence[str], width: int = 10) -> list[str]:
    """Lines that show a command after a label, broken between its parts only if one line would be cut."""
    between = " " if len(" ".join(parts)) < LONGEST else " \\\n  "
    return f"{label:{width}}{between.join(parts)}".split("\n")
