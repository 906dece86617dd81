"""What is there and what it is like: sources, their adapters, one in detail; all of it found out in threads."""

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
from adapterkit.hub.listing import HUB_SORTS, PAGE, SORTS, Found, in_cache, in_folders, on_the_hub
from adapterkit.tui.details import Details, changes, details_of, row_of
from adapterkit.tui.screens.detail import Detail, DetailScreen
from adapterkit.tui.threads import hand_over
from adapterkit.tui.widgets.adapter_table import AdapterTable
from adapterkit.tui.widgets.sources import Source, Sources

ROWS_AFTER = 0.1  # seconds to the first rows of a folder; for the next it is twice that: drawing takes time, too
CHANGES_EVERY = 5.0  # seconds between looks at a folder
NOTHING = """\
Nothing here yet. Three things to do first:

  b   choose the base that you work with
  tab to the sources, enter on Hub: what there is for it
  t   train one of your own from a recipe
"""


class Browser(Horizontal):
    """The three panes; `base` is what adapters are held against, and searched for on the Hub."""

    DEFAULT_CSS = "Browser { height: 1fr; }"

    def __init__(self, folders: Sequence[Path], base: str) -> None:
        super().__init__()
        self.folders, self.base = folders, base
        self.source = Source("folder", folders[0]) if folders else Source("cache")
        self._seen: dict[tuple[str, str], Details] = {}
        self._hub: Iterator[Found] = iter(())
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
        """The adapters of the source."""
        return self.query_one(AdapterTable)

    @property
    def detail(self) -> Detail:
        """What is shown of one of them."""
        return self.query_one("#detail", Detail)

    def hold_against(self, base: str) -> None:
        """Another base is worked with."""
        self.base = base
        if self.source.kind == "hub":
            self.find()
        elif self.table.current is not None:
            self._look(self.table.current)

    # --- finding -----------------------------------------------------------------------------------------------------

    @on(Sources.Picked)
    def _picked(self, event: Sources.Picked) -> None:
        self.source = event.source
        self.workers.cancel_group(self, "open")
        self.find()
        self.table.query_one("DataTable").focus()

    def refresh_rows(self) -> None:
        """Read the source anew."""
        self._seen.clear()
        self.find()

    def find(self) -> None:
        """Begin to read the source."""
        on_hub = self.source.kind == "hub"
        sorts = ("trending", "downloads", "likes", "modified") if on_hub else tuple(SORTS)
        sort = self.table.sort if self.table.sort in sorts else sorts[0]
        self.detail.wait(None)
        self.table.show(sort, sorts, "asking the Hub …" if on_hub else "reading …", on_hub, self.source.folder)
        for group in ("find", "look"):
            self.workers.cancel_group(self, group)
        if on_hub:
            assert sort in HUB_SORTS
            self._hub = on_the_hub(self.base if "/" in self.base else None, self.table.words, sort)
            self._hub_ended = False
            self._more(self.source, self._hub)
        else:
            self._read(self.source)

    @work(thread=True, group="find", exit_on_error=False)
    def _read(self, source: Source) -> None:
        """Read a folder or the cache, and show rows as they come."""
        worker, batch, drawn, pause = get_current_worker(), [], time.monotonic(), ROWS_AFTER
        for row in in_folders([source.folder]) if source.folder else in_cache():
            if worker.is_cancelled:
                return
            batch.append(row)
            if time.monotonic() - drawn > pause:
                hand_over(self.app, self._take, source, batch)
                batch, drawn, pause = [], time.monotonic(), 2 * pause
        hand_over(self.app, self._take, source, batch, "")

    @work(thread=True, group="find", exit_on_error=False)
    def _more(self, source: Source, hub: Iterator[Found]) -> None:
        """The next page of the Hub."""
        with self._hub_lock:
            try:
                page = list(itertools.islice(hub, PAGE))
            except AdapterkitError as error:
                hand_over(self.app, self._failed, source, str(error))
                return
        hand_over(self.app, self._turned, source, page)

    def _turned(self, source: Source, page: list[Found]) -> None:
        self._hub_ended = len(page) < PAGE
        self._take(source, page, "" if page else self.table.status)

    def _take(self, source: Source, rows: list[Found], status: str | None = None) -> None:
        if source != self.source:
            return
        if status is not None:
            nothing = NOTHING if source.kind != "hub" else "The Hub has no adapter like that."
            self.table.status = status if rows or self.table.rows else nothing
        self.table.add(rows)

    def _failed(self, source: Source, why: str) -> None:
        if source == self.source:
            self._hub_ended = True
            self.table.say(f"{why}\n\nThe Hub cache can be used still." if source.kind == "hub" else why)

    @on(AdapterTable.NearEnd)
    def _near_end(self) -> None:
        if self.source.kind == "hub" and not self._hub_ended and not self._hub_lock.locked():
            self._more(self.source, self._hub)

    @on(AdapterTable.Searched)
    @on(AdapterTable.Sorted)
    def _asked_otherwise(self) -> None:
        if self.source.kind == "hub":
            self.find()

    def look_for_changes(self) -> None:
        """Once in a while, whether the folder is as it was."""
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

    def _changed(self, source: Source, new: list[Found], gone: list[str]) -> None:
        if source == self.source:
            for name in (*gone, *(row.name for row in new)):
                self._seen.pop((name, self.base), None)
            self.table.drop(gone)
            self.table.add(new)

    # --- looking -----------------------------------------------------------------------------------------------------

    @on(AdapterTable.Looked)
    def _looked(self, event: AdapterTable.Looked) -> None:
        self.detail.wait(event.row)
        if event.row is not None:
            self._look(event.row)

    @work(thread=True, exclusive=True, group="look", exit_on_error=False)
    def _look(self, row: Found) -> None:
        """Show the adapter that is highlighted; the next one that is takes its place."""
        self._find_out(row, self.detail.show)

    @work(thread=True, exclusive=True, group="open", exit_on_error=False)
    def _open(self, row: Found) -> None:
        """Show the adapter that was chosen on a screen of its own, whatever is highlighted by then."""
        self._find_out(row, self._alone)

    def _find_out(self, row: Found, show: Callable[[Details], None]) -> None:
        """Find out about an adapter, or remember it; in a thread."""
        key = (row.name, self.base)
        details = self._seen.get(key) or details_of(row, self.base)
        hand_over(self.app, self._found_out, key, details, show)

    def _found_out(self, key: tuple[str, str], details: Details, show: Callable[[Details], None]) -> None:
        self._seen[key] = details
        if details.summary is not None and self.source.kind == "hub":
            self.table.update(row_of(details))
        show(details)

    def _alone(self, details: Details) -> None:
        if self.screen is self.app.screen:  # else one has gone on to something else
            self.app.push_screen(DetailScreen(details, self.detail.tab))

    @on(AdapterTable.Chosen)
    def _chosen(self, event: AdapterTable.Chosen) -> None:
        if self.detail.display:
            self.detail.query_one("#tabs Tabs").focus()
        else:
            self._open(event.row)
