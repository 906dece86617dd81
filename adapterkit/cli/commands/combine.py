"""`adapterkit combine ADAPTER[:WEIGHT]… -o OUT`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.adapters import CombineOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of
from adapterkit.cli.recipe import recipe_option, with_recipe
from adapterkit.combining.methods import METHODS, all_options
from adapterkit.text import counted


class CombineCommand(Command):
    """A command whose help lists the methods."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the methods, and their options."""
        with formatter.section("Methods"):
            formatter.write_dl([(name, method.help) for name, method in METHODS.items()])
        with formatter.section("Options of methods, for --set"):
            formatter.write_dl(
                [(str(one), f"{one.help}: {one.expected} ({', '.join(names)})") for one, names in all_options().items()]
            )
        super().format_epilog(ctx, formatter)


@click.command(
    "combine",
    cls=CombineCommand,
    docs="combine.md",
    examples=[
        "adapterkit combine adapter:0.7 other:0.3 -o sum",
        "adapterkit combine adapter other -o small --method svd --rank 8",
        "adapterkit combine adapter other -o ties --method ties --set density=0.2",
    ],
)
@options_of(CombineOptions, required=False)
@recipe_option
@dry_run
@as_json("Print the plan or the result as JSON, with every module")
def combine_command(given: dict[str, Any], recipe: str | None, dry_run: bool, as_json: bool) -> None:
    """Ranks, scalings and targets may differ. If the result is truncated, its error is printed."""
    from adapterkit.api.adapters import plan_combine
    from adapterkit.cli.run_plan import print_plan, run_with_bar, show_adapter
    from adapterkit.combining.plan import AdapterMade

    given = with_recipe(given, recipe, CombineOptions)
    plan = plan_combine(**given)
    if dry_run:
        print_plan(plan, {}, as_json)
        return
    ran = run_with_bar(plan, "combining", AdapterMade)
    method = given.get("method", CombineOptions.method)
    show_adapter(ran, f"combined  {counted(len(plan.given), 'adapter')} by {method}", as_json)
