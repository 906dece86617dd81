"""`adapterkit resize ADAPTER -o OUT`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.adapters import ResizeOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of


@click.command(
    "resize",
    cls=Command,
    docs="combine.md",
    examples=[
        "adapterkit resize adapter -o small --rank 4",
        "adapterkit resize adapter -o smaller --energy 0.9",
    ],
)
@options_of(ResizeOptions)
@dry_run
@as_json("Print the plan or the result as JSON, with every module")
def resize_command(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """A lower rank gives the best approximation; a higher rank is exact."""
    from adapterkit.api.adapters import plan_resize
    from adapterkit.cli.run_plan import print_plan, run_with_bar, show_adapter
    from adapterkit.combining.plan import AdapterMade

    plan = plan_resize(**given)
    if dry_run:
        print_plan(plan, {}, as_json)
        return
    show_adapter(run_with_bar(plan, "resizing", AdapterMade), "resized   1 adapter", as_json)
