"""The table of a source's adapters: incremental search, sorting, selection; rows appear as they are found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Input

from adapterkit.hub.adapter_listing import SORTS, AdapterEntry, sorted_entries
from adapterkit.text import short, size, span, visible
from adapterkit.tui.widgets.plain import Static, Table, plain

STATES = {"here": "●", "partial": "◐", "remote": "○"}
# Columns and their widths: measuring each cell would take as long as reading the files. The name column fits its cells.
COLUMNS = {"": 2, "name": None, "type": 6, "r": 5, "α": 6, "targets": 22, "size": 8, "↓": 8}
TYPING = 0.15  # seconds after the last key
LOOKING = 0.25  # seconds that a row is highlighted before its details are read
BEFORE_END = 5  # rows before the end at which more are requested


class AdapterTable(Vertical):
    """A search line above a table of the rows of one source."""

    DEFAULT_CSS = """
    AdapterTable { width: 1fr; border: round $foreground 30%; }
    AdapterTable:focus-within { border: round $accent; }
    AdapterTable > Input { height: 1; border: none; padding: 0 1; background: $surface; }
    AdapterTable > DataTable { height: 1fr; }
    AdapterTable > Static { height: auto; padding: 1 2; color: $text-muted; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "search", "search"),
        Binding("j", "down", show=False),
        Binding("k", "up", show=False),
        Binding("space", "mark", "select"),
        Binding("s", "sort", "sort", show=False),
    ]

    @dataclass
    class Looked(Message):
        """A row has been highlighted for a while."""

        row: AdapterEntry | None

    @dataclass
    class Chosen(Message):
        """A row was chosen with enter or a click."""

        row: AdapterEntry

    @dataclass
    class NearEnd(Message):
        """The cursor is near the last row; more rows can be requested."""

    @dataclass
    class Searched(Message):
        """The search words changed."""

        words: str

    @dataclass
    class Sorted(Message):
        """The sort order changed."""

        sort: str

    def __init__(self) -> None:
        super().__init__(id="adapters")
        self.rows: dict[str, AdapterEntry] = {}
        self.marked: dict[str, AdapterEntry] = {}
        self.words, self.sort = "", "name"
        self.filters = True  # filter rows here; the Hub filters its own
        self.folder: Path | None = None  # the folder listed
        self.sorts: tuple[str, ...] = tuple(SORTS)
        self.status = ""
        self._shown: list[AdapterEntry] = []
        self._typing: Timer | None = None
        self._looking: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Input(placeholder="/ search", id="search", compact=True)
        yield Static("", id="empty")
        yield Table(cursor_type="row", zebra_stripes=True)

    def on_mount(self) -> None:
        table = self.query_one(Table)
        for name, width in COLUMNS.items():
            table.add_column(name, width=width, key=name or "state")
        self._say()

    @property
    def current(self) -> AdapterEntry | None:
        """The highlighted row."""
        at = self.query_one(Table).cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @property
    def chosen(self) -> list[AdapterEntry]:
        """The selected rows, else the highlighted one."""
        return list(self.marked.values()) or ([self.current] if self.current else [])

    # --- rows --------------------------------------------------------------------------------------------------------

    def show(self, sort: str, sorts: tuple[str, ...], status: str, as_hub_id: bool, folder: Path | None) -> None:
        """Start with another source, without rows; shows `status` instead."""
        self.rows, self.sort, self.sorts, self.status, self.filters = {}, sort, sorts, status, not as_hub_id
        self.folder = folder
        self._redraw()

    def add(self, rows: Iterable[AdapterEntry]) -> None:
        """Add or replace rows."""
        added = list(rows)
        new = not any(row.name in self.rows for row in added)
        self.rows |= {row.name: row for row in added}
        matching = [row for row in added if self._matches(row)]
        if self.filters:
            matching = sorted_entries(matching, self.sort)
        at_end = not self._shown or not matching or self._in_order(self._shown[-1], matching[0])
        if new and (not self.filters or at_end):
            self._append(matching)
        else:
            self._redraw()

    def update(self, row: AdapterEntry) -> None:
        """Update a row with its details."""
        if row.name in self.rows:
            self.rows[row.name] = row
            self._shown = [row if shown.name == row.name else shown for shown in self._shown]
            self._draw(row)

    def say(self, status: str) -> None:
        """Show the status of this source, or an error."""
        self.status = status
        self._say()

    def drop(self, names: Iterable[str]) -> None:
        """Remove rows."""
        for name in names:
            self.rows.pop(name, None)
            self.marked.pop(name, None)
        self._redraw()

    # --- drawing -----------------------------------------------------------------------------------------------------

    def _matches(self, row: AdapterEntry) -> bool:
        return not self.filters or row.matches(None, self.words)

    def _in_order(self, first: AdapterEntry, second: AdapterEntry) -> bool:
        return sorted_entries([second, first], self.sort)[0] is first

    def _redraw(self) -> None:
        """Redraw all rows, with the cursor on the same row."""
        table, current = self.query_one(Table), self.current
        rows = [row for row in self.rows.values() if self._matches(row)]
        self._shown = []
        table.clear()
        self._append(sorted_entries(rows, self.sort) if self.filters else rows)
        if current is not None:
            at = next((at for at, row in enumerate(self._shown) if row.name == current.name), 0)
            table.move_cursor(row=at, animate=False)
        self._say()

    def _append(self, rows: list[AdapterEntry]) -> None:
        table = self.query_one(Table)
        for row in rows:
            self._shown.append(row)
            table.add_row(*self._cells(row), key=row.name)
        self._say()

    def _draw(self, row: AdapterEntry) -> None:
        """Redraw a row."""
        for column, cell in zip(COLUMNS, self._cells(row), strict=True):
            self.query_one(Table).update_cell(row.name, column or "state", cell)

    def _cells(self, row: AdapterEntry) -> list[Text]:
        state = STATES[row.state] if not row.problem else "✗"
        mark = "*" if row.name in self.marked else " "
        style = "bold" if row.name in self.marked else "red" if row.problem else ""
        counted = "" if row.downloads is None else f"{row.downloads:,}"
        texts = (
            f"{mark}{state}", self._called(row), row.kind or "", span(row.ranks), span(row.alphas),
            visible(short(row.targets)), "" if row.size is None else size(row.size), counted,
        )  # fmt: skip
        return [Text(text, style=style, no_wrap=True, overflow="ellipsis") for text in texts]

    def _called(self, row: AdapterEntry) -> str:
        """The path below the listed folder, or the Hub id."""
        return visible(row.name.removeprefix(f"{self.folder}/") if self.folder else row.name)

    def _say(self) -> None:
        """Show the number of rows on the border, and a message if there are none."""
        if not self.is_mounted:
            return
        many = (
            f"{len(self._shown)} of {len(self.rows)}" if len(self._shown) != len(self.rows) else f"{len(self._shown)}"
        )
        marked = f" · {len(self.marked)} selected" if self.marked else ""
        self.border_title = f"{many}{marked}"
        self.border_subtitle = plain(
            f"sort: {self.sort}" + (f" · {self.status}" if self.status and self._shown else "")
        )
        empty = self.query_one("#empty", Static)
        empty.display = not self._shown
        nothing = f"No adapter matches {self.words!r}." if self.rows else ""
        empty.update(self.status or nothing)

    # --- keys --------------------------------------------------------------------------------------------------------

    def action_search(self) -> None:
        """Focus the search line."""
        self.query_one(Input).focus()

    def action_down(self) -> None:
        """Move to the next row."""
        self.query_one(Table).action_cursor_down()

    def action_up(self) -> None:
        """Move to the previous row."""
        self.query_one(Table).action_cursor_up()

    def action_mark(self) -> None:
        """Select or deselect the row, and move to the next."""
        row = self.current
        if row is None:
            return
        if self.marked.pop(row.name, None) is None:
            self.marked[row.name] = row
        self._draw(row)
        self._say()
        self.query_one(Table).action_cursor_down()

    def action_sort(self) -> None:
        """Sort by the next column that this source supports."""
        self.sort = self.sorts[(self.sorts.index(self.sort) + 1) % len(self.sorts)]
        self.post_message(self.Sorted(self.sort))
        self._redraw()

    # --- events ------------------------------------------------------------------------------------------------------

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if self._typing:
            self._typing.stop()
        self._typing = self.set_timer(TYPING, self._search)

    def _search(self) -> None:
        words = self.query_one(Input).value
        if words != self.words:
            self.words = words
            self._redraw()
            self.post_message(self.Searched(words))

    @on(Input.Submitted)
    def _entered(self, event: Input.Submitted) -> None:
        event.stop()
        if self._typing:
            self._typing.stop()
        self._search()
        self.query_one(Table).focus()

    @on(Table.RowHighlighted)
    def _highlighted(self, event: Table.RowHighlighted) -> None:
        event.stop()
        if self._looking:
            self._looking.stop()
        self._looking = self.set_timer(LOOKING, lambda: self.post_message(self.Looked(self.current)))
        if len(self._shown) - event.cursor_row <= BEFORE_END:
            self.post_message(self.NearEnd())

    @on(Table.RowSelected)
    def _selected(self, event: Table.RowSelected) -> None:
        event.stop()
        row = self.rows.get(event.row_key.value or "")  # the row under the cursor at that time
        if row is not None:
            self.post_message(self.Chosen(row))
