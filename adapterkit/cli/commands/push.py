"""`adapterkit push PATH REPO`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.cli.command import Command
from adapterkit.cli.output import say, say_result
from adapterkit.cli.progress import progress
from adapterkit.text import size, visible

if TYPE_CHECKING:
    from adapterkit.hub.upload.push import Push


@click.command(
    "push",
    cls=Command,
    docs="hub.md",
    examples=[
        "adapterkit push adapter me/adapter --dry-run",
        "adapterkit push adapter me/adapter --private",
    ],
)
@click.argument("path", type=click.Path())
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of changing the main branch.")
@click.option("--base-id", metavar="ORG/NAME", help="The base on the Hub, where the adapter names a local path.")
@click.option("--license", help="What the card says of it, such as apache-2.0.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Check everything, show what would be sent, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def push_command(
    path: str, repo: str, private: bool, pr: bool, base_id: str | None, license: str | None, message: str | None,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """PATH is the folder of an adapter or a model; it is uploaded to REPO in one commit.

    First it is checked: it loads and is finite, its base is on the Hub, no file contains a secret or a local path, and
    the token has write access. Training state and pickle files are never uploaded. The card is completed, and its
    content is preserved. Weights that are already on the Hub are not uploaded again.
    """
    from adapterkit.hub.upload.push import plan_push, push

    plan = plan_push(Path(path), repo, private=private, pull_request=pr, base_id=base_id, license=license)
    if not as_json:
        _show_push(plan)
    if dry_run:
        if as_json:
            say_result(_push_facts(plan))
        else:
            say("nothing was sent (--dry-run)")
        return
    began = time.perf_counter()
    with progress("sending", in_bytes=True) as show:
        done = push(plan, message, show)
    if as_json:
        say_result(_push_facts(plan) | {"url": done.url, "commit": done.commit})
        return
    if done.commit is None:
        say("nothing had changed, and nothing was sent")
    else:
        say(f"pushed    {size(plan.size)} in {time.perf_counter() - began:.1f} s, commit {done.commit[:10]}")
    say(done.url)


def _show_push(plan: Push) -> None:
    """What goes where, and how each file does."""
    state = f"{'private' if plan.private else 'public'}{'' if plan.exists else ', new'}"
    say(f"sends     {plan.parcel.what}")
    say(f"to        {plan.repo} ({state}{', as a pull request' if plan.pull_request else ''})")
    changed = {upload.name for upload in plan.changed}
    lines = [
        (one.name, size(one.size), one.change if one.name in changed else "unchanged") for one in plan.parcel.uploads
    ]
    lines += [(name, "", "removed: weights of before") for name in plan.removed]
    lines += [(name, "", f"left out: {why}") for name, why in plan.parcel.left_out.items()]
    wide = max(len(visible(name)) for name, _, _ in lines)
    for name, bytes_, how in lines:
        say(f"  {visible(name):{wide}}  {bytes_:>8}  {how}".rstrip())


def _push_facts(plan: Push) -> dict[str, Any]:
    changed = {upload.name for upload in plan.changed}
    return {
        "repo": plan.repo, "base": plan.parcel.base, "private": plan.private, "bytes": plan.size,
        "files": [
            {"name": one.name, "bytes": one.size, "sent": one.name in changed, "change": one.change}
            for one in plan.parcel.uploads
        ],
        "removed": list(plan.removed), "left_out": plan.parcel.left_out,
    }  # fmt: skip
