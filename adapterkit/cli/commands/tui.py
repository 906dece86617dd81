"""`adapterkit tui [DIR…]`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from adapterkit.cli.command import Command
from adapterkit.errors import UsageError
from adapterkit.packages import needed


@click.command(
    "tui",
    cls=Command,
    docs="app.md",
    examples=[
        "adapterkit tui",
        "adapterkit tui adapters --base base",
    ],
)
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path(path_type=Path))
@click.option("--base", default="", metavar="BASE", help="The base that adapters are held against.")
def tui_command(folders: tuple[Path, ...], base: str) -> None:
    """Adapters are found in the folders DIR and below, by default the current folder, in the Hub cache and on the Hub.

    Press ? for the keys.
    """
    needed("textual", "the app"), needed("textual_plot", "the app")
    if not sys.stdout.isatty() or not sys.stdin.isatty():
        raise UsageError("the app needs a terminal; `adapterkit list` prints what there is")
    from adapterkit.tui.app import AdapterkitApp

    AdapterkitApp(folders or (Path(),), base).run()
