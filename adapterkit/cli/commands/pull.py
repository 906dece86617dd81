"""`adapterkit pull ID…`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.hub import PullOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of
from adapterkit.cli.output import say, say_result

if TYPE_CHECKING:
    from adapterkit.api.run import Event


@click.command(
    "pull",
    cls=Command,
    docs="hub.md",
    examples=[
        "adapterkit pull HuggingFaceTB/SmolLM2-135M-Instruct -o base",
        "adapterkit pull HuggingFaceTB/SmolLM2-135M-Instruct --dry-run",
    ],
)
@options_of(PullOptions)
@dry_run
@as_json("Print the plan or the result as JSON")
def pull_command(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """ID is org/name, org/name@revision or org/name:folder.

    Files in the cache are verified too. Interrupted downloads are resumed.
    """
    from adapterkit.api.hub import plan_pull
    from adapterkit.cli.run_plan import print_plan, run_with_bar
    from adapterkit.hub.events import Fetched, Pulled

    plan = plan_pull(**given)
    if dry_run:
        print_plan(plan, {}, as_json, "downloaded")
        return
    say(*plan.lines(), err=True)
    paths: list[str] = []

    def on_fetched(event: Event) -> None:
        if isinstance(event, Fetched):
            paths.append(str(event.path))

    try:
        run_with_bar(plan, "downloading", Pulled, on_fetched)
    finally:  # the finished ones, if a later one failed
        if paths and not as_json:
            say(*paths)
    if as_json:
        rows = plan.facts()["downloads"]
        say_result({"downloads": [row | {"path": path} for row, path in zip(rows, paths, strict=True)]})
