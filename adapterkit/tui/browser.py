"""The browser: sources, adapters and details in three panes, read by threads."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.worker import WorkerState, get_current_worker

from adapterkit.errors import AdapterkitError
from adapterkit.hub.adapter_listing import HUB_SORTS, PAGE, SORTS, AdapterEntry, list_cache, list_folders, list_hub
from adapterkit.tui.details import Details, changes, details_of, row_of
from adapterkit.tui.screens.detail import Detail, DetailScreen
from adapterkit.tui.threads import hand_over
from adapterkit.tui.widgets.adapter_table import AdapterTable
from adapterkit.tui.widgets.sources import Source, Sources

ROWS_AFTER = 0.1  # seconds before the first rows of a folder are drawn; doubles each time, since drawing takes time too
CHANGES_EVERY = 5.0  # seconds between checks of a folder
NOTHING = """\
No adapters here yet. Get started:

  b    choose a base
  tab  go to the sources, and press enter on Hub to list its adapters
  t    train an adapter from a recipe
"""


class Browser(Horizontal):
    """The three panes; adapters are checked against `base`, and the Hub is searched for adapters of it."""

    DEFAULT_CSS = "Browser { height: 1fr; }"

    def __init__(self, folders: Sequence[Path], base: str) -> None:
        super().__init__()
        self.folders, self.base = folders, base
        self.source = Source("folder", folders[0]) if folders else Source("cache")
        self._seen: dict[tuple[str, str], Details] = {}
        self._hub: Iterator[AdapterEntry] = iter(())
        self._hub_lock, self._hub_ended = threading.Lock(), True

    def compose(self) -> ComposeResult:
        yield Sources(self.folders)
        yield AdapterTable()
        yield Detail()

    def on_mount(self) -> None:
        self.table.query_one("DataTable").focus()
        self.find()
        self.set_interval(CHANGES_EVERY, self.look_for_changes)

    @property
    def table(self) -> AdapterTable:
        """The table of the source's adapters."""
        return self.query_one(AdapterTable)

    @property
    def detail(self) -> Detail:
        """The details of the highlighted adapter."""
        return self.query_one("#detail", Detail)

    def set_base(self, base: str) -> None:
        """Use another base."""
        self.base = base
        if self.source.kind == "hub":
            self.find()
        elif self.table.current is not None:
            self._look(self.table.current)

    # --- sources -----------------------------------------------------------------------------------------------------

    @on(Sources.Picked)
    def _picked(self, event: Sources.Picked) -> None:
        self.source = event.source
        self.workers.cancel_group(self, "open")
        self.find()
        self.table.query_one("DataTable").focus()

    def refresh_rows(self) -> None:
        """Read the source again."""
        self._seen.clear()
        self.find()

    def find(self) -> None:
        """Start reading the source."""
        as_hub_id = self.source.kind == "hub"
        sorts = ("trending", "downloads", "likes", "modified") if as_hub_id else tuple(SORTS)
        sort = self.table.sort if self.table.sort in sorts else sorts[0]
        self.detail.wait(None)
        self.table.show(sort, sorts, "querying the Hub …" if as_hub_id else "reading …", as_hub_id, self.source.folder)
        for group in ("find", "look"):
            self.workers.cancel_group(self, group)
        if as_hub_id:
            assert sort in HUB_SORTS
            self._hub = list_hub(self.base if "/" in self.base else None, self.table.words, sort)
            self._hub_ended = False
            self._more(self.source, self._hub)
        else:
            self._read(self.source)

    @work(thread=True, group="find", exit_on_error=False)
    def _read(self, source: Source) -> None:
        """Read a folder or the cache, and show rows as they are found."""
        worker, batch, drawn, pause = get_current_worker(), [], time.monotonic(), ROWS_AFTER
        for row in list_folders([source.folder]) if source.folder else list_cache():
            if worker.is_cancelled:
                return
            batch.append(row)
            if time.monotonic() - drawn > pause:
                hand_over(self.app, self._take, source, batch)
                batch, drawn, pause = [], time.monotonic(), 2 * pause
        hand_over(self.app, self._take, source, batch, "")

    @work(thread=True, group="find", exit_on_error=False)
    def _more(self, source: Source, hub: Iterator[AdapterEntry]) -> None:
        """Read the next page of the Hub's listing."""
        with self._hub_lock:
            try:
                page = list(itertools.islice(hub, PAGE))
            except AdapterkitError as error:
                hand_over(self.app, self._failed, source, str(error))
                return
        hand_over(self.app, self._turned, source, page)

    def _turned(self, source: Source, page: list[AdapterEntry]) -> None:
        self._hub_ended = len(page) < PAGE
        self._take(source, page, "" if page else self.table.status)

    def _take(self, source: Source, rows: list[AdapterEntry], status: str | None = None) -> None:
        if source != self.source:
            return
        if status is not None:
            nothing = NOTHING if source.kind != "hub" else "No matching adapters on the Hub."
            self.table.status = status if rows or self.table.rows else nothing
        self.table.add(rows)

    def _failed(self, source: Source, why: str) -> None:
        if source == self.source:
            self._hub_ended = True
            self.table.say(f"{why}\n\nThe Hub cache is still available." if source.kind == "hub" else why)

    @on(AdapterTable.NearEnd)
    def _near_end(self) -> None:
        if self.source.kind == "hub" and not self._hub_ended and not self._hub_lock.locked():
            self._more(self.source, self._hub)

    @on(AdapterTable.Searched)
    @on(AdapterTable.Sorted)
    def _query_changed(self) -> None:
        if self.source.kind == "hub":
            self.find()

    def look_for_changes(self) -> None:
        """Check whether the folder has changed, unless it is being read."""
        if self.source.folder is not None and not any(
            worker.group in ("find", "changes") and worker.state == WorkerState.RUNNING for worker in self.workers
        ):
            self._changes(self.source, {name: row.modified for name, row in self.table.rows.items()})

    @work(thread=True, group="changes", exit_on_error=False)
    def _changes(self, source: Source, known: dict[str, float | None]) -> None:
        assert source.folder is not None
        new, gone = changes(source.folder, known)
        if new or gone:
            hand_over(self.app, self._changed, source, new, gone)

    def _changed(self, source: Source, new: list[AdapterEntry], gone: list[str]) -> None:
        if source == self.source:
            for name in (*gone, *(row.name for row in new)):
                self._seen.pop((name, self.base), None)
            self.table.drop(gone)
            self.table.add(new)

    # --- details -----------------------------------------------------------------------------------------------------

    @on(AdapterTable.Looked)
    def _looked(self, event: AdapterTable.Looked) -> None:
        self.detail.wait(event.row)
        if event.row is not None:
            self._look(event.row)

    @work(thread=True, exclusive=True, group="look", exit_on_error=False)
    def _look(self, row: AdapterEntry) -> None:
        """Show the highlighted adapter; a later one cancels this."""
        self._find_out(row, self.detail.show)

    @work(thread=True, exclusive=True, group="open", exit_on_error=False)
    def _open(self, row: AdapterEntry) -> None:
        """Show the chosen adapter on a separate screen, whatever row is highlighted by then."""
        self._find_out(row, self._alone)

    def _find_out(self, row: AdapterEntry, show: Callable[[Details], None]) -> None:
        """Read an adapter's details, or take them from memory; runs in a thread."""
        key = (row.name, self.base)
        details = self._seen.get(key) or details_of(row, self.base)
        hand_over(self.app, self._found_out, key, details, show)

    def _found_out(self, key: tuple[str, str], details: Details, show: Callable[[Details], None]) -> None:
        self._seen[key] = details
        if details.summary is not None and self.source.kind == "hub":
            self.table.update(row_of(details))
        show(details)

    def _alone(self, details: Details) -> None:
        if self.screen is self.app.screen:  # otherwise another screen was opened meanwhile
            self.app.push_screen(DetailScreen(details, self.detail.tab))

    @on(AdapterTable.Chosen)
    def _chosen(self, event: AdapterTable.Chosen) -> None:
        if self.detail.display:
            self.detail.query_one("#tabs Tabs").focus()
        else:
            self._open(event.row)
