"""`adapterkit extract BASE FINETUNED -o OUT`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.adapters import ExtractOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of


@click.command(
    "extract",
    cls=Command,
    docs="convert.md",
    examples=[
        "adapterkit extract base finetuned -o update --rank 16",
        "adapterkit extract base finetuned -o smaller --energy 0.9 --whole",
    ],
)
@options_of(ExtractOptions)
@dry_run
@as_json("Print the plan or the result as JSON, with every module")
def extract_command(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """The update of every linear layer is approximated at a low rank, a few rows at a time.

    Other tensors that differ are named, or stored whole with --whole.
    """
    from adapterkit.api.adapters import plan_extract
    from adapterkit.cli.run_plan import print_plan, run_with_bar, show_adapter
    from adapterkit.combining.plan import AdapterMade

    plan = plan_extract(**given)
    if dry_run:
        print_plan(plan, {}, as_json)
        return
    show_adapter(run_with_bar(plan, "extracting", AdapterMade), "extracted", as_json, given["base"])
