"""Textual's widgets that show text, without its markup: what strangers wrote is text, whatever brackets it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from rich.console import RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import widgets
from textual.color import Color
from textual.filter import LineFilter
from textual.widgets.data_table import ColumnKey, RowKey

from adapterkit.text import visible, visible_lines, without_hidden

T = TypeVar("T")


def plain(text: str) -> Text:
    """A stranger's text, for titles, labels and cells, which take a `str` for markup."""
    return Text(visible(text))


class Static(widgets.Static):
    """Lines of text, or something drawn."""

    def __init__(self, content: str = "", **about: Any) -> None:
        super().__init__(visible_lines(content), markup=False, **about)

    def update(self, content: Any = "", *, layout: bool = True) -> None:
        """Show something else."""
        super().update(visible_lines(content) if isinstance(content, str) else content, layout=layout)


class Table(widgets.DataTable[Any]):
    """Rows of cells."""

    def add_row(self, *cells: Any, height: int | None = 1, key: str | None = None, label: Any = None) -> RowKey:
        """Add a row at the end."""
        return super().add_row(*map(_cell, cells), height=height, key=key, label=_cell(label))

    def update_cell(
        self, row_key: RowKey | str, column_key: ColumnKey | str, value: Any, *, update_width: bool = False
    ) -> None:
        """Change a cell."""
        super().update_cell(row_key, column_key, _cell(value), update_width=update_width)


class Tree(widgets.Tree[T]):
    """Labels below one another."""

    def process_label(self, label: Any) -> Text:
        """A label as it is drawn."""
        return super().process_label(_cell(label))


class Select(widgets.Select[str]):
    """One of several."""

    def set_options(self, options: Iterable[tuple[RenderableType, str]]) -> None:
        """Offer others."""
        super().set_options([(_cell(prompt), value) for prompt, value in options])


class Steerless(LineFilter):
    """What is drawn, without anything that steers a terminal, whichever widget forgot it; and all of it with a style.

    Textual's own filters, which take colours out, trip over what plots leave without one.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Change the segments of a line."""
        return [Segment(without_hidden(text), style or Style(), control) for text, style, control in segments]


def _cell(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value
