"""`adapterkit push PATH REPO`."""

from __future__ import annotations

from typing import Any

import click

from adapterkit.api.options.hub import PushOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.text import size


@click.command(
    "push",
    cls=Command,
    docs="hub.md",
    examples=[
        "adapterkit push adapter me/adapter --dry-run",
        "adapterkit push adapter me/adapter --private",
    ],
)
@options_of(PushOptions)
@dry_run
@as_json("Print the plan or the result as JSON")
def push_command(given: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """PATH is the folder of an adapter or a model; it is uploaded to REPO in one commit.

    First it is checked: it loads and is finite, its base is on the Hub, no file contains a secret or a local path, and
    the token has write access. Training state and pickle files are never uploaded. The card is completed, and its
    content is preserved. Weights that are already on the Hub are not uploaded again.
    """
    from adapterkit.api.hub import plan_push
    from adapterkit.cli.run_plan import print_plan, run_with_bar
    from adapterkit.hub.events import Pushed

    plan = plan_push(**given)
    if dry_run:
        print_plan(plan, {}, as_json, "uploaded")
        return
    if not as_json:
        say(*plan.lines())
    ran = run_with_bar(plan, "uploading", Pushed)
    done = ran.result
    if as_json:
        say_result(plan.facts() | {"url": done.url, "commit": done.commit})
        return
    if done.commit is None:
        say("up to date, nothing uploaded")
    else:
        say(f"pushed    {size(plan.size)} in {ran.seconds:.1f} s, commit {done.commit[:10]}")
    say(done.url)
