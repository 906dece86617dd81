"""`adapterkit inspect ADAPTER`: what is in it, by headers alone, and how large its updates are, from the weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.adapter.formats import load, table
from adapterkit.base.checkpoint import is_base
from adapterkit.cli.command import Command
from adapterkit.cli.lookup import fetched_of, looked_at
from adapterkit.cli.output import say, say_result
from adapterkit.cli.progress import tracked
from adapterkit.cli.views.base import show_base
from adapterkit.errors import FitError, UnknownStrengthError, UsageError
from adapterkit.files.hub_cache import check_cached
from adapterkit.hub.locate import Location
from adapterkit.inspection.summary import ModuleRow, by_target, header_rows, measure, to_json

if TYPE_CHECKING:
    from adapterkit.adapter.weights import Adapter
    from adapterkit.inspection.match import Match


class InspectCommand(Command):
    """A command whose help lists the formats of adapters."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Adapter formats"):
            formatter.write_dl([(format.NAME, ", ".join(table.names_of_format(format))) for format in table.FORMATS])
        super().format_epilog(ctx, formatter)


@click.command(
    "inspect",
    cls=InspectCommand,
    docs="inspect.md",
    examples=[
        "adapterkit inspect adapter",
        "adapterkit inspect adapter --against base",
        "adapterkit inspect base",
    ],
)
@click.argument("path", metavar="ADAPTER|BASE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--modules", is_flag=True, help="A row for every module; in JSON, its singular values too.")
@click.option("--against", metavar="BASE", help="Check that it fits BASE, and compare ‖ΔW‖ with ‖W‖.")
@click.option("--header-only", is_flag=True, help="Stop at what the headers say; no weights are read.")
@click.option("--full", is_flag=True, help="Download what is on the Hub, rather than read its headers only.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw norms and spectra to a .png or .svg.")
@click.option("--alpha", type=float, help="The alpha of an adapter without a config (scaling = alpha / rank).")
@click.option("--scaling", type=float, help="The scaling itself of an adapter without a config.")
def inspect_command(
    path: str, as_json: bool, modules: bool, against: str | None, header_only: bool, full: bool, plot: str | None,
    alpha: float | None, scaling: float | None,
) -> None:  # fmt: skip
    """The size of the updates ΔW is shown by layer and target.

    ADAPTER is a directory, a .safetensors or .bin file, or a Hub id; BASE a checkpoint directory or file, or a Hub id.
    For a BASE itself, shows the storage of its weights and the effect of merging on it. Of a repository on the Hub that
    is not in the cache, only headers and configs are read, some kilobytes. Exits with 3 if part of the adapter does not
    exist in the BASE of --against.
    """
    if header_only and full:
        raise UsageError("--full downloads what --header-only does not read", hint="give one of them")
    with looked_at(path, full) as there, looked_at(against, full) if against else nullcontext() as base:
        if is_base(there.path):
            asked = {"--against": against, "--plot": plot, "--modules": modules, "--alpha": alpha, "--scaling": scaling}
            if wrong := next((name for name, value in asked.items() if value), None):
                raise UsageError(f"{path}: is a base model, and {wrong} is about adapters")
            show_base(there, path, as_json)
            return
        if plot:
            _check_plot(Path(plot), header_only or there.headers_only)
        adapter, unknown = _open(there.path, alpha, scaling)
        match, norms_of_base = _match(adapter, base.path, against) if base and against else (None, None)
        norms_of_base = None if base and base.headers_only else norms_of_base
        _show(path, there, adapter, unknown, match, norms_of_base, as_json, modules, header_only, plot)
    if match and match.missing:
        raise SystemExit(FitError.exit_code)


def _show(
    path: str, there: Location, adapter: Adapter, unknown: str | None, match: Match | None,
    norms_of_base: Callable[[], dict[str, float]] | None, as_json: bool, modules: bool, header_only: bool,
    plot: str | None,
) -> None:  # fmt: skip
    from adapterkit.cli.views import adapter as adapter_view

    header_only, strength_known = header_only or there.headers_only, unknown is None
    if not header_only:
        check_cached(adapter.files)
    summary = adapter.summary()
    if not strength_known:
        summary = replace(summary, alphas=(), scalings=())
    if not as_json:
        adapter_view.show_header(path, summary, match, unknown=unknown, fetched=fetched_of(there))
    rows = header_rows(adapter, strength_known=strength_known)
    if not header_only:
        norms = norms_of_base() if norms_of_base else {}
        measured = measure(adapter, strength_known=strength_known, base_norms=norms)
        rows = list(tracked(measured, "measuring", len(rows)))
    if as_json:
        facts = {"path": path, "summary": to_json(summary), "against": to_json(match) if match else None}
        facts |= {"fetched": there.fetched}
        say_result(facts | _row_facts(rows, header_only, modules))
    else:
        adapter_view.show_rows(rows, summary, measured=not header_only, modules=modules)
    if plot:
        _draw(rows, Path(plot), Path(path).resolve().name)


def _open(where: Path, alpha: float | None, scaling: float | None) -> tuple[Adapter, str | None]:
    """The adapter, and why its strength is unknown, if it is: B·A can be shown without."""
    try:
        return load(where, alpha=alpha, scaling=scaling), None
    except UnknownStrengthError as error:
        return load(where, scaling=1.0), error.reason


def _match(adapter: Adapter, base: Path, name: str) -> tuple[Match, Callable[[], dict[str, float]]]:
    """How `adapter` fits `base`, called `name`, by headers; and what reads ‖W‖_F by module when called."""
    from adapterkit.base.checkpoint import open_checkpoint
    from adapterkit.inspection.match import base_norms, match

    checkpoint = open_checkpoint(base)
    found, places = match(adapter, checkpoint, name)

    def norms() -> dict[str, float]:
        check_cached(shard.file for shard in checkpoint.shards)
        return dict(tracked(base_norms(places, checkpoint), "reading the base", found.found))

    return found, norms


def _row_facts(rows: list[ModuleRow], header_only: bool, modules: bool) -> dict[str, Any]:
    """The targets and modules of the JSON; singular values only where every module was asked for."""
    plain = [to_json(row) for row in rows]
    if not modules:
        plain = [{key: value for key, value in row.items() if key != "sigma"} for row in plain]
    return {"targets": [] if header_only else [to_json(row) for row in by_target(rows)], "modules": plain}


def _check_plot(plot: Path, header_only: bool) -> None:
    from adapterkit.cli.views.figures import check_plot

    if header_only:
        raise UsageError(
            "--plot draws the weights, but only headers are read", hint="omit --header-only, or say --full"
        )
    check_plot(plot)


def _draw(rows: list[ModuleRow], plot: Path, title: str) -> None:
    from adapterkit.cli.views.figures import draw

    draw(rows, plot, title)
    say(f"drawn to {plot}", err=True)
