"""`adapterkit compare ADAPTER ADAPTER…`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.adapters import CompareOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.cli.views.tables import common_prefix, print_table, table
from adapterkit.inspection.module_rows import to_json
from adapterkit.options import Options, option, plotted
from adapterkit.text import number

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyPath
    from adapterkit.combining.compare import Pair, Similarity


FIGURES = ("cosine", "distance", "norm_ratio", "overlap_in", "overlap_out", "sign_conflict", "lost")


@dataclass(frozen=True)
class ViewOptions(Options):
    """How the comparison is shown"""

    _: KW_ONLY
    by: str = option(
        "target", "Group rows by target, layer or module; by module, JSON has φ(i, j) too",
        ("target", "layer", "module"), group="Output",
    )  # fmt: skip
    plot: AnyPath | None = plotted("cosine similarity by layer")


@click.command(
    "compare",
    cls=Command,
    docs="combine.md",
    examples=[
        "adapterkit compare adapter other",
        "adapterkit compare adapter:0.7 other:0.3 --by layer",
    ],
)
@options_of(CompareOptions)
@options_of(ViewOptions, "view")
@as_json("Print one JSON object instead of tables")
def compare_command(given: dict[str, Any], view: dict[str, Any], as_json: bool) -> None:
    """Every pair of adapters is compared module by module, from the factors alone.

    cosine and distance treat the updates as vectors; overlap is the share of the subspaces of inputs (φ of the LoRA
    paper) and outputs that both use; signs is the share of elements with opposite signs; lost is the relative error of
    the sum, truncated to the higher of the two ranks.
    """
    from adapterkit.api.adapters import compare
    from adapterkit.cli.views.plots import check_plot, draw_likeness

    options = ViewOptions(**view)
    by, plot = options.by, options.plot
    if plot:
        check_plot(Path(plot))
    pairs = compare(**given)
    if plot:
        draw_likeness(pairs, Path(plot))
        say(f"drawn to {plot}", err=True)
    if as_json:
        shown = [
            replace(pair, modules=tuple(row if by == "module" else replace(row, phi=()) for row in pair.modules))
            for pair in pairs
        ]
        say_result({"pairs": [to_json(pair) for pair in shown]})
        return
    for index, pair in enumerate(pairs):
        _show(pair, by, first=index == 0)


def _show(pair: Pair, by: str, first: bool) -> None:
    say(*[""] * (not first), pair.lines()[0])
    prefix = common_prefix([str(row.name) for row in pair.modules])
    groups: dict[str, list[Similarity]] = {}
    for row in pair.modules:
        name = {"target": row.target, "layer": "–" if row.layer is None else row.layer, "module": row.name}[by]
        groups.setdefault(str(name), []).append(row)
    rows = [_mean(name.removeprefix(prefix) if by == "module" else name, group) for name, group in groups.items()]
    print_table(table(_columns(by), [*rows, replace(pair.total, name="in all")]))


def _columns(first: str) -> dict[str, Callable[[Similarity], str]]:
    return {
        first: lambda row: str(row.name),
        "cosine": lambda row: f"{row.cosine:+.3f}",
        "‖Δ₁−Δ₂‖\n/ ‖Δ₁‖": lambda row: number(row.distance),
        "‖Δ₂‖\n/ ‖Δ₁‖": lambda row: number(row.norm_ratio),
        "overlap\nof inputs": lambda row: f"{row.overlap_in:.3f}",
        "\nof outputs": lambda row: f"{row.overlap_out:.3f}",
        "signs\nagainst": lambda row: f"{row.sign_conflict:.1%}",
        "sum\nlost": lambda row: f"{row.lost:.1%}",
    }


def _mean(name: str, rows: list[Similarity]) -> Similarity:
    """The mean of each figure over some modules."""
    shares: Any = {name: fmean(getattr(row, name) for row in rows) for name in FIGURES}
    return replace(rows[0], name=name, **shares)
