"""The adapters of a source: searched as one types, sorted, marked; rows come while they are found."""

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

from adapterkit.hub.listing import SORTS, Found, ordered
from adapterkit.text import short, size, span, visible
from adapterkit.tui.widgets.plain import Static, Table, plain

STATES = {"here": "●", "partial": "◐", "remote": "○"}
# Columns and their widths: to measure each cell would take as long as to read the files. Names are as long as they are.
COLUMNS = {"": 2, "name": None, "type": 6, "r": 5, "α": 6, "targets": 22, "size": 8, "↓": 8}
TYPING = 0.15  # seconds after the last key
LOOKING = 0.25  # seconds that a row is highlighted before it is looked at
BEFORE_END = 5  # rows from the end where more are asked for


class AdapterTable(Vertical):
    """A search line over a table; what is shown are the rows of one source."""

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
        Binding("space", "mark", "mark"),
        Binding("s", "sort", "sort", show=False),
    ]

    @dataclass
    class Looked(Message):
        """A row has been highlighted for a while."""

        row: Found | None

    @dataclass
    class Chosen(Message):
        """A row was chosen: by enter, or by a click."""

        row: Found

    @dataclass
    class NearEnd(Message):
        """The cursor is near the last row: more can be asked for."""

    @dataclass
    class Searched(Message):
        """Other words are searched for."""

        words: str

    @dataclass
    class Sorted(Message):
        """Another order is wanted."""

        sort: str

    def __init__(self) -> None:
        super().__init__(id="adapters")
        self.rows: dict[str, Found] = {}
        self.marked: dict[str, Found] = {}
        self.words, self.sort = "", "name"
        self.filters = True  # whether words are looked for here, and not by the Hub
        self.folder: Path | None = None  # that rows lie below
        self.sorts: tuple[str, ...] = tuple(SORTS)
        self.status = ""
        self._shown: list[Found] = []
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
    def current(self) -> Found | None:
        """The highlighted row."""
        at = self.query_one(Table).cursor_row
        return self._shown[at] if 0 <= at < len(self._shown) else None

    @property
    def chosen(self) -> list[Found]:
        """The marked rows, else the highlighted one."""
        return list(self.marked.values()) or ([self.current] if self.current else [])

    # --- what is there -----------------------------------------------------------------------------------------------

    def show(self, sort: str, sorts: tuple[str, ...], status: str, on_hub: bool, folder: Path | None) -> None:
        """Begin with another source: no rows yet, and what may be there told by `status`."""
        self.rows, self.sort, self.sorts, self.status, self.filters = {}, sort, sorts, status, not on_hub
        self.folder = folder
        self._redraw()

    def add(self, rows: Iterable[Found]) -> None:
        """Take rows that were found, or found anew."""
        came = list(rows)
        new = not any(row.name in self.rows for row in came)
        self.rows |= {row.name: row for row in came}
        fitting = [row for row in came if self._fits(row)]
        if self.filters:
            fitting = ordered(fitting, self.sort)
        if new and (not self.filters or not self._shown or not fitting or self._in_order(self._shown[-1], fitting[0])):
            self._append(fitting)
        else:
            self._redraw()

    def update(self, row: Found) -> None:
        """What was found out about a row."""
        if row.name in self.rows:
            self.rows[row.name] = row
            self._shown = [row if one.name == row.name else one for one in self._shown]
            self._draw(row)

    def say(self, status: str) -> None:
        """Tell what is going on, or wrong, with this source."""
        self.status = status
        self._say()

    def drop(self, names: Iterable[str]) -> None:
        """Take away rows that are no more."""
        for name in names:
            self.rows.pop(name, None)
            self.marked.pop(name, None)
        self._redraw()

    # --- drawing -----------------------------------------------------------------------------------------------------

    def _fits(self, row: Found) -> bool:
        return not self.filters or row.matches(None, self.words)

    def _in_order(self, one: Found, other: Found) -> bool:
        return ordered([other, one], self.sort)[0] is one

    def _redraw(self) -> None:
        """All rows anew, with the cursor where it was."""
        table, current = self.query_one(Table), self.current
        rows = [row for row in self.rows.values() if self._fits(row)]
        self._shown = []
        table.clear()
        self._append(ordered(rows, self.sort) if self.filters else rows)
        if current is not None:
            at = next((at for at, row in enumerate(self._shown) if row.name == current.name), 0)
            table.move_cursor(row=at, animate=False)
        self._say()

    def _append(self, rows: list[Found]) -> None:
        table = self.query_one(Table)
        for row in rows:
            self._shown.append(row)
            table.add_row(*self._cells(row), key=row.name)
        self._say()

    def _draw(self, row: Found) -> None:
        """One row anew."""
        for column, cell in zip(COLUMNS, self._cells(row), strict=True):
            self.query_one(Table).update_cell(row.name, column or "state", cell)

    def _cells(self, row: Found) -> list[Text]:
        state = STATES[row.state] if not row.problem else "✗"
        mark = "*" if row.name in self.marked else " "
        style = "bold" if row.name in self.marked else "red" if row.problem else ""
        counted = "" if row.downloads is None else f"{row.downloads:,}"
        texts = (
            f"{mark}{state}", self._called(row), row.kind or "", span(row.ranks), span(row.alphas),
            visible(short(row.targets)), "" if row.size is None else size(row.size), counted,
        )  # fmt: skip
        return [Text(text, style=style, no_wrap=True, overflow="ellipsis") for text in texts]

    def _called(self, row: Found) -> str:
        """Its path below the folder that is listed, or its Hub id."""
        return visible(row.name.removeprefix(f"{self.folder}/") if self.folder else row.name)

    def _say(self) -> None:
        """Words where rows would be, and how many there are on the border."""
        if not self.is_mounted:
            return
        many = (
            f"{len(self._shown)} of {len(self.rows)}" if len(self._shown) != len(self.rows) else f"{len(self._shown)}"
        )
        marked = f" · {len(self.marked)} marked" if self.marked else ""
        self.border_title = f"{many}{marked}"
        self.border_subtitle = plain(
            f"sort: {self.sort}" + (f" · {self.status}" if self.status and self._shown else "")
        )
        empty = self.query_one("#empty", Static)
        empty.display = not self._shown
        nothing = f"Nothing here matches {self.words!r}." if self.rows else ""
        empty.update(self.status or nothing)

    # --- keys --------------------------------------------------------------------------------------------------------

    def action_search(self) -> None:
        """Type into the search line."""
        self.query_one(Input).focus()

    def action_down(self) -> None:
        """The next row."""
        self.query_one(Table).action_cursor_down()

    def action_up(self) -> None:
        """The row before."""
        self.query_one(Table).action_cursor_up()

    def action_mark(self) -> None:
        """Mark the row, or take the mark off, and go on to the next."""
        row = self.current
        if row is None:
            return
        if self.marked.pop(row.name, None) is None:
            self.marked[row.name] = row
        self._draw(row)
        self._say()
        self.query_one(Table).action_cursor_down()

    def action_sort(self) -> None:
        """Sort by the next column that this source can be sorted by."""
        self.sort = self.sorts[(self.sorts.index(self.sort) + 1) % len(self.sorts)]
        self.post_message(self.Sorted(self.sort))
        self._redraw()

    # --- what happens ------------------------------------------------------------------------------------------------

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
        row = self.rows.get(event.row_key.value or "")  # what was under the cursor then
        if row is not None:
            self.post_message(self.Chosen(row))
