"""The details of an adapter: overview, layers, spectrum, config, card."""

from __future__ import annotations

from typing import ClassVar

from rich.console import Group
from rich.highlighter import JSONHighlighter
from rich.table import Table
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import Footer, Markdown, TabbedContent, TabPane
from textual.worker import get_current_worker

from adapterkit.adapter.formats.table import config_names
from adapterkit.hub.adapter_listing import AdapterEntry
from adapterkit.inspection.audit import audit
from adapterkit.inspection.module_rows import ModuleRow
from adapterkit.text import visible, visible_lines
from adapterkit.tui.details import Details, config_text, rows_of
from adapterkit.tui.threads import hand_over
from adapterkit.tui.widgets.charts import Layers, Spectrum
from adapterkit.tui.widgets.plain import Static, plain

TABS = ("overview", "layers", "spectrum", "config", "card")


class Detail(Vertical):
    """The tabs; weights are read only for the tabs that need them."""

    DEFAULT_CSS = """
    Detail { width: 42%; border: round $foreground 30%; }
    Detail:focus-within { border: round $accent; }
    Detail TabPane { padding: 0 1; }
    Detail .wait { padding: 1; color: $text-muted; height: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, f"toggle_group('{group}')", group, show=False)
        for key, group in (("Q", "q"), ("K", "k"), ("V", "v"), ("O", "o"), ("L", "mlp"))
    ]

    def __init__(self, id: str = "detail") -> None:
        super().__init__(id=id)
        self.details: Details | None = None
        self._measured: str | None = None  # the adapter drawn or being measured
        self._findings: list[str] = []  # of the measured adapter

    def compose(self) -> ComposeResult:
        with TabbedContent(id="tabs"):
            with TabPane("1 overview", id="overview"), VerticalScroll():
                yield Static("", id="facts")
            with TabPane("2 layers", id="layers"):
                yield Static("", classes="wait")
                yield Layers()
            with TabPane("3 spectrum", id="spectrum"):
                yield Static("", classes="wait")
                yield Spectrum()
            with TabPane("4 config", id="config"), VerticalScroll():
                yield Static("", id="config-text")
            with TabPane("5 card", id="card"), VerticalScroll():
                yield Markdown("", id="card-text", open_links=False)

    def on_mount(self) -> None:
        self._wait("")

    def wait(self, row: AdapterEntry | None) -> None:
        """Show the name of `row` until its details arrive."""
        self.border_title = plain(row.name if row else "")
        if row is None:
            self.details = None
            self.query_one("#facts", Static).update("")

    def show(self, details: Details) -> None:
        """Show the details of an adapter."""
        is_new = self.details is None or self.details.row.name != details.row.name
        self.details = details
        self.border_title = plain(details.row.name)
        if is_new:
            self._measured, self._findings = None, []
        self._show_facts(details)
        config = Text(config_text(details.config) or f"There is no {' or '.join(config_names())}.", no_wrap=True)
        JSONHighlighter().highlight(config)
        self.query_one("#config-text", Static).update(config)
        self.query_one("#card-text", Markdown).update(visible_lines(details.card) or "*No model card.*")
        self._measure_if_shown()

    def _show_facts(self, details: Details) -> None:
        """Draw the overview; what stands out in the weights is known once they are measured."""
        facts = Table.grid(padding=(0, 2, 0, 0))
        for name, value in details.facts.items():
            facts.add_row(Text(name, "bold"), Text(visible(value), overflow="fold"))
        style = "red" if details.problem else "yellow"
        warnings = [Text(f"\n⚠ {visible(line)}", style) for line in (*details.warnings, *self._findings)]
        self.query_one("#facts", Static).update(Group(facts, *warnings))

    def action_toggle_group(self, group: str) -> None:
        """Include or exclude a group of modules on the layers tab."""
        if self.tab == "layers":
            self.query_one(Layers).toggle(group)

    @property
    def tab(self) -> str:
        """The current tab."""
        return self.query_one("#tabs", TabbedContent).active

    def turn_to(self, name: str) -> None:
        """Switch to a tab."""
        self.query_one("#tabs", TabbedContent).active = name

    def on_tabbed_content_tab_activated(self) -> None:
        """Measure the weights when a tab that needs them is opened."""
        self._measure_if_shown()

    def _measure_if_shown(self) -> None:
        if self.details is None or self.tab not in ("layers", "spectrum"):
            return
        if self._measured != self.details.row.name:
            self._measured = self.details.row.name
            self._wait("measuring …")
            self._measure(self.details.row)

    @work(thread=True, exclusive=True, group="measure", exit_on_error=False)
    def _measure(self, row: AdapterEntry) -> None:
        worker = get_current_worker()
        hand_over(self.app, self._drawn, row, rows_of(row, lambda: worker.is_cancelled))

    def _drawn(self, row: AdapterEntry, found: list[ModuleRow] | str) -> None:
        if self.details is None or self.details.row.name != row.name:
            return
        if isinstance(found, str) or not found:
            self._wait(found if isinstance(found, str) else "The adapter has no modules.")
            return
        self._wait("")
        self._findings = [str(finding) for finding in audit(found)]
        self._show_facts(self.details)
        self.query_one(Layers).show(found)
        self.query_one(Spectrum).show(found)

    def _wait(self, text: str) -> None:
        """Show `text` instead of the plots, or the plots if it is empty."""
        for widget in self.query(".wait").results(Static):
            widget.update(text)
            widget.display = bool(text)
        shown = not text and self._measured is not None
        self.query_one(Layers).display = shown
        self.query_one(Spectrum).display = shown


class DetailScreen(Screen[None]):
    """The details on a separate screen, for narrow terminals."""

    DEFAULT_CSS = "DetailScreen Detail { width: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,backspace", "dismiss", "back")]

    def __init__(self, details: Details, tab: str) -> None:
        super().__init__()
        self._details, self._tab = details, tab

    def compose(self) -> ComposeResult:
        yield Detail(id="detail-alone")
        yield Footer()

    def on_mount(self) -> None:
        detail = self.query_one(Detail)
        detail.turn_to(self._tab)
        detail.show(self._details)
        detail.query_one("#tabs Tabs").focus()
