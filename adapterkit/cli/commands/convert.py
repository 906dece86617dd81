"""`adapterkit convert ADAPTER -o OUT --to KIND`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.adapters import ConvertOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of


@click.command(
    "convert",
    cls=Command,
    docs="convert.md",
    examples=[
        "adapterkit convert adapter -o dora --to dora --base base",
        "adapterkit convert dora -o lora --to lora --base base --rank 8",
        "adapterkit convert adapter -o rslora --to rslora",
    ],
)
@options_of(ConvertOptions)
@dry_run
@as_json("Print the plan or the result as JSON, with every module")
def convert_command(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """LoRA to DoRA is exact: the magnitudes are the norms of W + s·B·A.

    DoRA to LoRA is the best approximation at the given rank or energy. LoRA and rsLoRA store the same update with a
    different scaling. --initial subtracts the initial state of a PiSSA or OLoRA adapter.
    """
    from adapterkit.api.adapters import plan_convert
    from adapterkit.cli.run_plan import print_plan, run_with_bar, show_adapter
    from adapterkit.combining.plan import AdapterMade

    plan = plan_convert(**given)
    if dry_run:
        print_plan(plan, {}, as_json)
        return
    ran = run_with_bar(plan, "converting", AdapterMade)
    show_adapter(ran, f"converted to {given['to']}", as_json, given.get("base"))
