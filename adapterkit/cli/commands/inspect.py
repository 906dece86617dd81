"""`adapterkit inspect ADAPTER`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.adapter.formats import table
from adapterkit.api.options.inspection import InspectOptions
from adapterkit.cli.command import Command
from adapterkit.cli.option_names import in_options
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.cli.progress import progress
from adapterkit.errors import FitError, UsageError
from adapterkit.options import Options, option, plotted

if TYPE_CHECKING:
    from adapterkit.api.inputs import AnyPath
    from adapterkit.inspection.module_rows import ModuleRow
    from adapterkit.inspection.report import BaseReport


@dataclass(frozen=True)
class ViewOptions(Options):
    """What is shown of an adapter"""

    _: KW_ONLY
    modules: bool = option(False, "Show every module; in JSON, its singular values too", group="Output")
    plot: AnyPath | None = plotted("norms and spectra")


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
@options_of(InspectOptions)
@options_of(ViewOptions, "view")
@as_json("Print one JSON object instead of tables")
def inspect_command(given: dict[str, Any], view: dict[str, Any], as_json: bool) -> None:
    """The size of the updates ΔW is shown by layer and target.

    ADAPTER is a directory, a .safetensors or .bin file, or a Hub id; BASE a checkpoint directory or file, or a Hub id.
    For a BASE itself, shows the storage of its weights and the effect of merging on it. Of a repository on the Hub that
    is not in the cache, only headers and configs are read, some kilobytes. Exits with 3 if part of the adapter does not
    exist in the BASE of --against.
    """
    from adapterkit.api.inspect import inspecting
    from adapterkit.cli.views.adapter import show_header, show_rows
    from adapterkit.inspection.report import AdapterReport, BaseReport, ModuleMeasured

    options, shown = InspectOptions(**given), ViewOptions(**view)
    if shown.plot:
        _check_plot(Path(shown.plot), options.header_only)
    with closing(inspecting(options)) as events:
        report = next(events)
        if isinstance(report, BaseReport):
            _show_base(report, view, as_json)
            return
        assert isinstance(report, AdapterReport)
        if shown.plot and report.outlined:
            raise _without_weights()
        if not as_json:
            show_header(report)
        with progress("measuring") as show:
            for event in events:
                if isinstance(event, AdapterReport):
                    report = event
                elif isinstance(event, ModuleMeasured):
                    show(event.done, event.total, event.what)
    if as_json:
        say_result(report.facts(sigma=shown.modules))
    else:
        show_rows(report, modules=shown.modules)
    if shown.plot:
        _draw(report.modules, Path(shown.plot), Path(report.path).resolve().name)
    if report.match and report.match.missing:
        raise SystemExit(FitError.exit_code)


def _show_base(report: BaseReport, view: dict[str, Any], as_json: bool) -> None:
    if wrong := next(iter(view), None):
        raise UsageError(f"{report.path}: is a base model, and `{wrong}` is about adapters")
    if as_json:
        say_result(report.facts())
    else:
        say(*map(in_options, report.lines()))


def _check_plot(plot: Path, header_only: bool) -> None:
    from adapterkit.cli.views.plots import check_plot

    if header_only:
        raise _without_weights()
    check_plot(plot)


def _without_weights() -> UsageError:
    said = "`plot` draws the weights, but only headers are read"
    return UsageError(said, hint="omit `header_only`, or say `full=True`")


def _draw(rows: Sequence[ModuleRow], plot: Path, title: str) -> None:
    from adapterkit.cli.views.plots import draw

    draw(rows, plot, title)
    say(f"drawn to {plot}", err=True)
