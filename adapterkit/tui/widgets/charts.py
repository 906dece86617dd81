"""Plots of measured modules: update norms by layer, and the singular values of one module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Checkbox
from textual_plot import HiResMode, PlotWidget

from adapterkit.inspection.module_rows import ModuleRow, by_target
from adapterkit.text import between, number, span
from adapterkit.tui.widgets.checkbox import MarkCheckbox
from adapterkit.tui.widgets.plain import Select, Static, Table

GROUPS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",), "o": ("o_proj",)}  # the rest are MLP and others
TICKS = 10  # maximum ticks on the layer axis
COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue")


def group_of(row: ModuleRow) -> str:
    """`q`, `k`, `v`, `o`, or `mlp` for everything outside the attention."""
    return next((group for group, targets in GROUPS.items() if row.target in targets), "mlp")


def norms(rows: Sequence[ModuleRow], groups: set[str]) -> tuple[list[int], list[float]]:
    """The layers, and ‖ΔW‖_F of each, over all modules of `groups` as one matrix."""
    squares: dict[int, float] = {}
    for row in rows:
        if row.layer is not None and group_of(row) in groups and row.frobenius is not None:
            squares[row.layer] = squares.get(row.layer, 0.0) + row.frobenius**2
    layers = sorted(layer for layer, square in squares.items() if math.isfinite(square))
    return layers, [math.sqrt(squares[layer]) for layer in layers]


class Plot(PlotWidget):
    """A static plot; keys and wheel belong to the app."""

    DEFAULT_CSS = "Plot { height: 1fr; min-height: 8; }"
    BINDINGS: ClassVar[list[BindingType]] = []
    can_focus = False

    def __init__(self, **about: Any) -> None:
        super().__init__(allow_pan_and_zoom=False, **about)


class Layers(Vertical):
    """Bars of ‖ΔW‖ by layer over the selected groups, and a table by target."""

    DEFAULT_CSS = """
    Layers > Horizontal { height: 1; }
    Layers Checkbox { border: none; height: 1; padding: 0 1; background: $surface; }
    Layers > DataTable { height: auto; max-height: 40%; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[ModuleRow] = []

    def compose(self) -> ComposeResult:
        with Horizontal():
            for group in (*GROUPS, "mlp"):
                yield MarkCheckbox(group, True, id=f"group-{group}", compact=True)
        yield Plot()
        yield Table(cursor_type="none")

    def on_mount(self) -> None:
        self.query_one(Table).add_columns("target", "n", "rank", "‖ΔW‖", "σ₁", "99% rank")

    def show(self, rows: list[ModuleRow]) -> None:
        """Draw these modules."""
        self._rows = rows
        table = self.query_one(Table)
        table.clear()
        for row in by_target(rows):
            reach = between(row.frobenius_min, row.frobenius_max)
            table.add_row(
                row.target, str(row.modules), span(row.ranks), reach, number(row.spectral_max), number(row.rank_99_mean)
            )
        present = {group_of(row) for row in rows}
        for group in (*GROUPS, "mlp"):
            self.query_one(f"#group-{group}").display = group in present
        self._draw()

    def toggle(self, group: str) -> None:
        """Include or exclude a group of modules."""
        self.query_one(f"#group-{group}", Checkbox).toggle()

    @on(Checkbox.Changed)
    def _draw(self) -> None:
        groups = {group for group in (*GROUPS, "mlp") if self.query_one(f"#group-{group}", Checkbox).value}
        layers, values = norms(self._rows, groups)
        plot = self.query_one(Plot)
        plot.clear()
        if layers:
            plot.bar(layers, values, bar_style=COLOURS[0], hires_mode=HiResMode.QUADRANT)
            plot.set_xticks(layers[:: math.ceil(len(layers) / TICKS)])
            plot.set_xlabel("layer")
            plot.set_ylabel("‖ΔW‖")
            plot.set_ylimits(0, 1.05 * max(values) or 1)


class Spectrum(Vertical):
    """log₁₀ σ of one module, and the ranks that hold 90% and 99% of ‖ΔW‖²."""

    DEFAULT_CSS = """
    Spectrum > Select { height: 3; }
    Spectrum > Static { height: auto; color: $text-muted; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, ModuleRow] = {}

    def compose(self) -> ComposeResult:
        yield Select([], prompt="module", allow_blank=True)
        yield Plot()
        yield Static("")

    def show(self, rows: list[ModuleRow]) -> None:
        """Offer these modules, and draw the largest."""
        self._rows = {row.name: row for row in rows if row.sigma}
        select = self.query_one(Select)
        select.set_options([(name, name) for name in self._rows])
        finite = [row for row in self._rows.values() if row.frobenius is not None and math.isfinite(row.frobenius)]
        if finite:
            select.value = max(finite, key=lambda row: row.frobenius or 0.0).name
        else:
            self._draw(None)

    @on(Select.Changed)
    def _picked(self, event: Select.Changed) -> None:
        event.stop()
        self._draw(self._rows.get(event.value) if isinstance(event.value, str) else None)

    def _draw(self, row: ModuleRow | None) -> None:
        plot, caption = self.query_one(Plot), self.query_one(Static)
        plot.clear()
        sigma = [value for value in row.sigma if value > 0 and math.isfinite(value)] if row else []
        if row is None or not sigma:
            caption.update("No singular values: the update is zero or has NaN." if row else "")
            return
        plot.plot(
            list(range(1, len(sigma) + 1)), [math.log10(value) for value in sigma], COLOURS[0],
            hires_mode=HiResMode.BRAILLE,
        )  # fmt: skip
        for rank, colour, label in ((row.rank_90, COLOURS[1], "90%"), (row.rank_99, COLOURS[2], "99%")):
            if rank is not None:
                plot.add_v_line(rank, colour, label)
        plot.set_xlabel("rank")
        plot.set_ylabel("log₁₀ σ")
        caption.update(
            f"rank {row.rank_90} of {len(row.sigma)} holds 90% of ‖ΔW‖², rank {row.rank_99} 99%; "
            f"σ₁ {number(sigma[0])}, ‖ΔW‖ {number(row.frobenius)}"
        )
