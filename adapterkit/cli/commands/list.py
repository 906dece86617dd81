"""`adapterkit list [DIR]…`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.inspection import ListOptions
from adapterkit.cli.command import Command
from adapterkit.cli.failures import failure_of
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.cli.views.tables import padded, width
from adapterkit.text import short, size, span, visible

if TYPE_CHECKING:
    from adapterkit.hub.adapter_listing import AdapterEntry

NAME = "adapter"
CUT, LEAST = ("base", "targets"), 8  # columns truncated on a narrow terminal, and their minimal width
ON_THE_LEFT = (NAME, "kind", "targets", "base")


@click.command(
    "list",
    cls=Command,
    docs="hub.md",
    examples=[
        "adapterkit list",
        "adapterkit list adapters --base SmolLM2-135M-Instruct --sort rank",
        "adapterkit list --hub --search sql --limit 10",
    ],
)
@options_of(ListOptions)
@as_json("Print the result as JSON")
def list_command(given: dict[str, Any], as_json: bool) -> None:
    """Searches the folders DIR and below, by default the current folder, and the Hub cache; with --hub also the Hub.

    Only headers and configs are read.
    """
    from adapterkit.api.inspect import find_adapters

    options = ListOptions(**given)
    rows, failed = find_adapters(options)  # an error of the Hub is raised after local results are shown
    if as_json:
        facts = [asdict(row) | {"path": str(row.path) if row.path else None} for row in rows]
        say_result({"adapters": facts} | (failure_of(failed).facts if failed else {}))
    elif rows:
        _print_rows(_columns(rows), rows)
        for row in rows:
            if row.problem:
                say(f"⚠ {row.name}: {row.problem}")
    elif failed is None:
        say("no adapters found" + ("" if options.hub else "; add --hub to search the Hub"))
    if failed is not None:
        raise failed


def _print_rows(columns: dict[str, Callable[[AdapterEntry], str]], rows: list[AdapterEntry]) -> None:
    """Print a line per adapter, on a terminal with the least important columns truncated.

    Names are never truncated, so that they can be copied; on a terminal, long ones get a line of their own.
    """
    from rich.cells import cell_len

    lines = [{name: name for name in columns}]
    lines += [{name: visible(cell(row)) for name, cell in columns.items()} for row in rows]
    widths = {name: max(cell_len(line[name]) for line in lines) for name in columns}
    if sys.stdout.isatty():
        short = (cell_len(line[NAME]) for line in lines if cell_len(line[NAME]) <= width() // 2)
        widths = _fitted(widths | {NAME: max(short)}, width())
    for line in lines:
        if cell_len(line[NAME]) > widths[NAME]:
            say(line[NAME])
            line[NAME] = ""
        texts = (padded(line[name], wide, right=name not in ON_THE_LEFT) for name, wide in widths.items())
        say("  ".join(texts).rstrip())


def _fitted(widths: dict[str, int], room: int) -> dict[str, int]:
    """Fit column widths, two spaces apart, into `room` by truncating some columns, then omitting them."""
    for leave_out in (False, True):
        for name in CUT:
            over = sum(widths.values()) + 2 * len(widths) - 2 - room
            if over > 0 and name in widths:
                less = widths[name] - min(over, max(0, widths[name] - LEAST))
                widths = {key: less if key == name else wide for key, wide in widths.items()}
                if leave_out:
                    del widths[name]
    return widths


def _columns(rows: list[AdapterEntry]) -> dict[str, Callable[[AdapterEntry], str]]:
    columns: dict[str, Callable[[AdapterEntry], str]] = {
        NAME: lambda row: f"{'●◐○'[('here', 'partial', 'remote').index(row.state)]} {row.name}",
        "kind": lambda row: "" if row.kind in (None, "LoRA") else str(row.kind),
        "rank": lambda row: span(row.ranks),
        "alpha": lambda row: span(row.alphas),
        "targets": lambda row: short(row.targets),
        "size": lambda row: "" if row.size is None else size(row.size),
        "downloads": lambda row: "" if row.downloads is None else f"{row.downloads:,}",
        "base": lambda row: (row.base_model or "").rpartition("/")[2],
    }
    return {name: cell for name, cell in columns.items() if name == NAME or any(cell(row) for row in rows)}
