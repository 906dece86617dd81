"""Tables and numbers for the terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.cli.output import console, say
from adapterkit.text import visible

if TYPE_CHECKING:
    from rich.table import Table


def table(columns: dict[str, Callable[..., str]], rows: Iterable[Any]) -> Table:
    """A table with text left-aligned, numbers right-aligned, and a rule below the header."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for index, header in enumerate(columns):
        table.add_column(header, justify="right" if index else "left", vertical="bottom", overflow="fold")
    for row in rows:
        table.add_row(*(visible(cell(row)) for cell in columns.values()))
    return table


def print_table(table: Table) -> None:
    console().print(table, width=width())


def width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 80


def padded(text: str, wide: int, *, right: bool = False) -> str:
    """`text` padded or truncated to `wide` terminal columns."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) > wide:
        return set_cell_size(text, wide - 1) + "…"
    space = " " * (wide - cell_len(text))
    return space + text if right else text + space


def print_wrapped(label: str, text: str) -> None:
    lines = textwrap.wrap(
        visible(text),
        width(),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
    say(*lines)


def common_prefix(names: Sequence[str]) -> str:
    """The dotted prefix that all names share, with its dot; empty for a single name."""
    if len(names) < 2:
        return ""
    shared = os.path.commonprefix(list(names))
    return shared[: shared.rfind(".") + 1]
