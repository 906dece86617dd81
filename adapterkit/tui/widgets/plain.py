"""Textual's text widgets without markup: untrusted text is shown literally, brackets included."""

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
    """Untrusted text for titles, labels and cells, which interpret a `str` as markup."""
    return Text(visible(text))


class Static(widgets.Static):
    """Lines of text, or a rich renderable."""

    def __init__(self, content: str = "", **about: Any) -> None:
        super().__init__(visible_lines(content), markup=False, **about)

    def update(self, content: Any = "", *, layout: bool = True) -> None:
        """Replace the content."""
        super().update(visible_lines(content) if isinstance(content, str) else content, layout=layout)


class Table(widgets.DataTable[Any]):
    """A table of plain cells."""

    def add_row(self, *cells: Any, height: int | None = 1, key: str | None = None, label: Any = None) -> RowKey:
        """Append a row."""
        return super().add_row(*map(_cell, cells), height=height, key=key, label=_cell(label))

    def update_cell(
        self, row_key: RowKey | str, column_key: ColumnKey | str, value: Any, *, update_width: bool = False
    ) -> None:
        """Replace a cell."""
        super().update_cell(row_key, column_key, _cell(value), update_width=update_width)


class Tree(widgets.Tree[T]):
    """A tree with plain labels."""

    def process_label(self, label: Any) -> Text:
        """The text of a label."""
        return super().process_label(_cell(label))


class Select(widgets.Select[str]):
    """A choice of plain options."""

    def set_options(self, options: Iterable[tuple[RenderableType, str]]) -> None:
        """Replace the options."""
        super().set_options([(_cell(prompt), value) for prompt, value in options])


class ControlFilter(LineFilter):
    """Removes control characters from everything drawn, even if a widget did not; and gives every segment a style.

    Textual's filters, which remove colours, fail on the segments of plots, which have none.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Filter the segments of a line."""
        return [Segment(without_hidden(text), style or Style(), control) for text, style, control in segments]


def _cell(value: Any) -> Any:
    return plain(value) if isinstance(value, str) else value
