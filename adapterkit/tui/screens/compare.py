"""Compare two adapters: similarity by layer, norms, and differences of their configs."""

from __future__ import annotations

from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Footer
from textual.worker import get_current_worker
from textual_plot import HiResMode

from adapterkit.errors import AdapterkitError
from adapterkit.hub.adapter_listing import AdapterEntry
from adapterkit.text import counted, number, visible
from adapterkit.tui.threads import hand_over
from adapterkit.tui.widgets.charts import COLOURS, Plot
from adapterkit.tui.widgets.plain import Static, Table

if TYPE_CHECKING:
    from adapterkit.combining.compare import Pair, Similarity


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The keys whose values differ between two configs, with both values."""
    missing = object()
    keys = [key for key in {**one, **other} if one.get(key, missing) != other.get(key, missing)]
    return [(key, *(str(config.get(key, "–")) for config in (one, other))) for key in sorted(keys)]  # type: ignore[misc]


class CompareScreen(Screen[None]):
    """The comparison of two adapters, measured in a thread."""

    DEFAULT_CSS = """
    CompareScreen > #what { height: auto; padding: 0 1; }
    CompareScreen > Horizontal { height: 1fr; }
    CompareScreen Vertical { border: round $foreground 30%; width: 1fr; }
    CompareScreen DataTable { height: 1fr; }
    CompareScreen #configs { max-height: 40%; height: auto; }
    CompareScreen.-narrow Horizontal { layout: vertical; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,c", "dismiss", "back")]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012 (Textual's type)

    def __init__(self, one: AdapterEntry, other: AdapterEntry) -> None:
        super().__init__()
        self._both = (one, other)
        self._names = f"A  {visible(one.name)}\nB  {visible(other.name)}"

    def compose(self) -> ComposeResult:
        yield Static("", id="what")
        with Horizontal():
            with Vertical() as left:
                left.border_title = "by layer"
                yield Table(cursor_type="row", id="layers")
            with Vertical() as right:
                right.border_title = "‖ΔW‖ of both"
                yield Plot()
                yield Table(cursor_type="none", id="configs")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#what", Static).update(f"{self._names}\nmeasuring …")
        self.query_one(Horizontal).display = False
        self.query_one("#layers", Table).add_columns("layer", "cosine", "‖B‖/‖A‖", "overlap in", "out", "lost")
        self.query_one("#configs", Table).add_columns("config", "A", "B")
        self._measure()

    @work(thread=True, exclusive=True, exit_on_error=False)
    def _measure(self) -> None:
        worker = get_current_worker()
        try:
            from adapterkit.adapter.formats import load
            from adapterkit.adapter.formats.table import read_config
            from adapterkit.api.adapters import compare
            from adapterkit.inspection.cache import measured

            paths = [row.path for row in self._both if row.path is not None]
            if len(paths) < 2:
                raise AdapterkitError("One of the adapters is on the Hub only; download it (d) to compare.")
            [pair] = compare(list(paths))
            rows = [measured(load(path), lambda: worker.is_cancelled) for path in paths]
            found: Any = (pair, rows, differences(*map(read_config, paths)))
        except (AdapterkitError, OSError) as error:
            found = str(error)
        hand_over(self.app, self._show, found)

    def _show(self, found: Any) -> None:
        if not self.is_mounted:
            return
        if isinstance(found, str):
            self.query_one("#what", Static).update(f"{self._names}\n{found}")
            return
        pair, rows, configs = found
        self.query_one(Horizontal).display = True
        self.query_one("#what", Static).update(f"{self._names}\n{_in_words(pair)}")
        table = self.query_one("#layers", Table)
        for layer, group in groupby(sorted(pair.modules, key=_layer), _layer):
            table.add_row(*_cells("–" if layer < 0 else str(layer), list(group)))
        table.add_row(*_cells("all", [pair.total]))
        self.query_one("#configs", Table).add_rows(configs)
        plot = self.query_one(Plot)
        for measured, colour, label in zip(rows, COLOURS, "AB", strict=False):
            from adapterkit.tui.widgets.charts import GROUPS, norms

            layers, values = norms(measured, {*GROUPS, "mlp"})
            if layers:
                plot.plot(layers, values, colour, hires_mode=HiResMode.BRAILLE, label=label)
        plot.show_legend()
        table.focus()


def _layer(row: Similarity) -> int:
    return -1 if row.layer is None else row.layer


def _cells(name: str, rows: list[Similarity]) -> list[str]:
    def mean(field: str) -> float:
        return fmean(getattr(row, field) for row in rows)

    return [
        name, f"{mean('cosine'):+.3f}", number(mean("norm_ratio")), f"{mean('overlap_in'):.3f}",
        f"{mean('overlap_out'):.3f}", f"{mean('lost'):.1%}",
    ]  # fmt: skip


def _in_words(pair: Pair) -> str:
    total = pair.total
    alone = f", {pair.alone[0]} only in A, {pair.alone[1]} only in B" if any(pair.alone) else ""
    both = f"{counted(len(pair.modules), 'module')} in both{alone}"
    return f"{both}; cosine {total.cosine:+.3f}, a sum loses {total.lost:.1%}"
