"""Print an adapter: header lines, warnings, a table by target, bars by layer, a table of modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from adapterkit.adapter.summary import LABEL
from adapterkit.cli.option_names import in_options
from adapterkit.cli.output import say
from adapterkit.cli.views.tables import common_prefix, padded, print_table, print_wrapped, table, width
from adapterkit.inspection.module_rows import ModuleRow, TargetRow, by_target, grid
from adapterkit.text import between, given, number, runs, span, visible

if TYPE_CHECKING:
    from rich.table import Table

    from adapterkit.inspection.report import AdapterReport

BARS = "▁▂▃▄▅▆▇█"
FLAT = 1.005  # a row that varies less than this is drawn flat
BESIDE_BARS = 18  # columns of spaces and the range at the end


def show_header(report: AdapterReport) -> None:
    """Print the facts from the headers, then the problems, without rich."""
    for label, text in report.rows().items():
        print_wrapped(f"{label:{LABEL}}", in_options(text))
    for warning in report.warnings():
        print_wrapped("⚠ ", warning)


def show_rows(report: AdapterReport, *, modules: bool) -> None:
    """Print the table by target and the bars by layer where weights were read, and with `modules` every row."""
    rows, summary, measured = report.modules, report.summary, report.measured
    delta = "ΔW" if summary.scalings else "BA"
    if measured:
        for finding in report.findings:
            print_wrapped("⚠ ", str(finding))
        if rows and not summary.scalings:
            print_wrapped("⚠ ", "the norms are those of B·A: the scaling is unknown")
        if "DoRA" in summary.kind:
            print_wrapped("", "Norms of a DoRA are those of its low-rank part scaling·B·A, before the magnitude.")
        if rows:
            say("")
            print_table(_target_table(by_target(rows), delta))
            _print_bars(rows, delta)
    if modules and rows:
        prefix = common_prefix([row.name for row in rows])
        say("", *[f"modules of {prefix}"] * bool(prefix))
        print_table(_module_table(rows, len(prefix), delta, measured))


# --- tables ----------------------------------------------------------------------------------------------------------


def _target_table(targets: Sequence[TargetRow], delta: str) -> Table:
    columns: dict[str, Callable[[TargetRow], str]] = {
        "target": lambda row: row.target,
        "n": lambda row: str(row.modules),
        "rank": lambda row: span(row.ranks),
        "scaling": lambda row: span(row.scalings) or "?",
        f"‖{delta}‖_F\nmin–max": lambda row: between(row.frobenius_min, row.frobenius_max),
        "\nmean": lambda row: number(row.frobenius_mean),
        f"‖{delta}‖₂\nmax": lambda row: number(row.spectral_max),
        "stable\nrank": lambda row: number(row.stable_rank_mean),
        "99%\nrank": lambda row: number(row.rank_99_mean),
    }
    if any(row.relative_mean is not None for row in targets):
        columns[f"‖{delta}‖_F\n/ ‖W‖_F"] = lambda row: number(row.relative_mean)
    return table(columns, targets)


def _module_table(rows: Sequence[ModuleRow], prefix: int, delta: str, measured: bool) -> Table:
    columns: dict[str, Callable[[ModuleRow], str]] = {
        "module": lambda row: row.name[prefix:],
        "out×in": lambda row: "×".join(map(str, (row.shape_B[0], *row.shape_A[1:]))),
        "rank": lambda row: str(row.rank),
        "scaling": lambda row: given(row.scaling),
    }
    if not measured:
        return table(columns | {"alpha": lambda row: given(row.alpha), "dtype": lambda row: row.dtype}, rows)
    columns |= {
        f"‖{delta}‖_F": lambda row: number(row.frobenius),
        f"‖{delta}‖₂": lambda row: number(row.spectral),
        "stable\nrank": lambda row: number(row.stable_rank),
        "99%\nrank": lambda row: number(row.rank_99),
    }
    if any(row.relative is not None for row in rows):
        columns["/ ‖W‖_F"] = lambda row: number(row.relative)
    return table(columns, rows)


# --- bars ------------------------------------------------------------------------------------------------------------


def _print_bars(rows: Sequence[ModuleRow], delta: str) -> None:
    """A row of bars for each target, one bar for a layer or, where the width asks for it, for a few."""
    cells_of = grid(rows)
    if len(cells_of.layers) < 2:
        return
    from rich.cells import cell_len

    name = min(max(map(cell_len, map(visible, cells_of.targets))), width() // 2)
    each = math.ceil(len(cells_of.layers) / max(1, width() - name - BESIDE_BARS))
    every = f", {each} layers a bar" if each > 1 else ""
    say("", f"‖{delta}‖_F over layers {runs(cells_of.layers)}{every}; ▁ is the row's least, █ its most")
    for target, cells in zip(cells_of.targets, cells_of.cells, strict=True):
        means = [_mean(cells[at : at + each]) for at in range(0, len(cells), each)]
        known = [value for value in means if value is not None and math.isfinite(value)]
        low, high = (min(known), max(known)) if known else (math.nan, math.nan)
        bars = "".join(_bar(value, low, high) for value in means)
        say(f"{padded(visible(target), name)}  {bars}  {between(low, high)}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _bar(value: float | None, low: float, high: float) -> str:
    """One of eight bars between `low` and `high`; a dot without a module, an x for NaN or Inf."""
    if value is None:
        return "·"
    if not math.isfinite(value):
        return "x"
    share = (value - low) / (high - low) if high > FLAT * low else 0.5
    return BARS[min(int(share * len(BARS)), len(BARS) - 1)]
