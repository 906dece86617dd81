"""`adapterkit inspect ADAPTER`: what is in it, by headers alone, and how large its updates are, from the weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterkit.checkpoint import is_base
from adapterkit.errors import FitError, UsageError
from adapterkit.formats import load
from adapterkit.hub import resolve
from adapterkit.summary import ModuleRow, by_target, header_rows, measure, summarize, to_json

if TYPE_CHECKING:
    from adapterkit.adapter import Adapter
    from adapterkit.against import Match

T = TypeVar("T")


@click.command("inspect")
@click.argument("path", metavar="ADAPTER|BASE")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.option("--modules", is_flag=True, help="A row for every module; in JSON, its singular values too.")
@click.option("--against", metavar="BASE", help="Check that it fits BASE, and compare ‖ΔW‖ with ‖W‖.")
@click.option("--header-only", is_flag=True, help="Stop at what the headers say; no weights are read.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw norms and spectra to a .png or .svg.")
@click.option("--alpha", type=float, help="The alpha of an adapter without a config (scaling = alpha / rank).")
@click.option("--scaling", type=float, help="The scaling itself of an adapter without a config.")
def inspect_command(
    path: str, as_json: bool, modules: bool, against: str | None, header_only: bool, plot: str | None,
    alpha: float | None, scaling: float | None,
) -> None:  # fmt: skip
    """Show an adapter's rank, scaling, targets and problems, and how large its updates ΔW are by layer and target.

    ADAPTER is a directory, a .safetensors or .bin file, or a Hub id; BASE a checkpoint directory or file, or a Hub id.
    Of a BASE directory itself, shows how its weights are stored and what merging does with them.
    Ends with 3 where part of the adapter has no place in BASE.
    """
    from adapterkit.cli import adapter_view
    from adapterkit.cli.base_view import show_base

    if is_base(where := resolve(path)):
        asked = {"--against": against, "--plot": plot, "--modules": modules, "--alpha": alpha, "--scaling": scaling}
        if wrong := next((name for name, value in asked.items() if value), None):
            raise UsageError(f"{path}: is a base model, and {wrong} is about adapters")
        show_base(where, path, as_json)
        return
    if plot:
        _check_plot(Path(plot), header_only)
    adapter, strength_known = _open(path, alpha, scaling)
    summary = summarize(adapter, strength_known=strength_known)
    match, norms_of_base = _match(adapter, against) if against else (None, None)
    if not as_json:
        adapter_view.show_header(path, summary, match, has_config=bool(adapter.config))
    rows = header_rows(adapter, strength_known=strength_known)
    if not header_only:
        norms = norms_of_base() if norms_of_base else {}
        measured = measure(adapter, strength_known=strength_known, base_norms=norms)
        rows = list(_with_bar(measured, "measuring", len(rows)))
    if as_json:
        facts = {"path": path, "summary": to_json(summary), "against": to_json(match) if match else None}
        print(json.dumps(facts | _row_facts(rows, header_only, modules), indent=2, allow_nan=False))
    else:
        adapter_view.show_rows(rows, summary, measured=not header_only, modules=modules)
    if plot:
        _draw(rows, Path(plot), Path(path).resolve().name)
    if match and match.missing:
        raise SystemExit(FitError.exit_code)


def _open(path: str, alpha: float | None, scaling: float | None) -> tuple[Adapter, bool]:
    """The adapter, and whether its strength is known: where no config says it, B·A can still be looked at."""
    where = resolve(path)
    try:
        return load(where, alpha=alpha, scaling=scaling), True
    except UsageError:
        if alpha is not None or scaling is not None:
            raise
        return load(where, scaling=1.0), False


def _match(adapter: Adapter, base: str) -> tuple[Match, Callable[[], dict[str, float]]]:
    """How `adapter` fits `base`, by headers, and what reads ‖W‖_F by module when called."""
    from adapterkit.against import base_norms, match
    from adapterkit.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(resolve(base))
    found, places = match(adapter, checkpoint, base)
    norms = base_norms(places, checkpoint)
    return found, lambda: dict(_with_bar(norms, "reading the base", found.found))


def _row_facts(rows: list[ModuleRow], header_only: bool, modules: bool) -> dict[str, Any]:
    """The targets and modules of the JSON; singular values only where every module was asked for."""
    plain = [to_json(row) for row in rows]
    if not modules:
        plain = [{key: value for key, value in row.items() if key != "sigma"} for row in plain]
    return {"targets": [] if header_only else [to_json(row) for row in by_target(rows)], "modules": plain}


def _check_plot(plot: Path, header_only: bool) -> None:
    from adapterkit.plot import check_plot

    if header_only:
        raise UsageError("--plot draws what --header-only does not read: give one of them")
    check_plot(plot)


def _draw(rows: list[ModuleRow], plot: Path, title: str) -> None:
    from adapterkit.plot import draw

    draw(rows, plot, title)
    print(f"drawn to {plot}", file=sys.stderr)


def _with_bar(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """`items`, with a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total, console=Console(stderr=True), transient=True)
