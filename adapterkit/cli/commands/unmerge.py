"""`adapterkit unmerge MERGED -o OUT`."""

from __future__ import annotations

import time

import click

from adapterkit.api.unmerge import plan_unmerge, unmerge
from adapterkit.cli.command import Command
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.run_plan import DEVICE_HELP, run_with_bar, weighted
from adapterkit.errors import UsageError
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.run.budget import default_threads
from adapterkit.merging.run.scheduler import Merged
from adapterkit.text import counted, size


@click.command("unmerge", cls=Command)
@click.argument("merged")
@click.option("-o", "--output", type=click.Path(), required=True, help="Where to write the base.")
@click.option("--adapter", "adapters", multiple=True, metavar="ADAPTER[:WEIGHT]",
              help="An adapter that was merged, where it is not found by itself.")  # fmt: skip
@click.option("--all", "every", is_flag=True, help="Undo every merge, one after the other, not only the last.")
@click.option("--base", help="Restore from this base, checked to be the one.")
@click.option("--approximate", is_flag=True, help="Subtract the adapters, whatever MERGED is.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@click.option("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: the cores there are, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def unmerge_command(
    merged: str, output: str, adapters: tuple[str, ...], every: bool, base: str | None, approximate: bool,
    dry_run: bool, device: str, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Take the adapters out of MERGED again: every file of the base as it was, bit for bit.

    What that needs stands in the receipt that `merge` writes, and in the adapters, which are found by their names and
    SHA-256. Nothing is written unless every hash fits.
    """

    named = [weighted(text) for text in adapters]
    if dry_run:
        if every:
            raise UsageError("--all makes a plan of what the one before wrote: --dry-run tells of one merge")
        _show_plan(plan_unmerge(merged, output, adapters=named, base=base, approximate=approximate), as_json)
        return

    unchecked: tuple[str, ...] = ()

    def run_plan(plan: MergePlan) -> Merged:
        nonlocal unchecked
        unchecked = plan.unchecked
        note(*plan.notes)
        return run_with_bar(plan, "unmerging", threads or default_threads(), device)

    began = time.perf_counter()
    result = unmerge(
        merged, output, adapters=named, base=base, approximate=approximate, every=every, run_plan=run_plan
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if as_json:
        facts = {
            "output": str(result.out), "exact": not approximate, "unchecked": list(unchecked),
            "bytes_written": result.bytes_written, "tensors_restored": result.tensors,
            "seconds": round(seconds, 3), "device": result.place, "sha256": result.hashes.outputs,
        }  # fmt: skip
        say_result(facts)
        return
    what = "subtracted from" if approximate else "restored"
    say(f"{what:9} {counted(result.tensors, 'tensor')} in {seconds:.1f} s, {size(result.bytes_written)}")
    if unchecked:
        say("exact     every weight file has the SHA-256 that the base had")
        say(f"unchecked the receipt has no SHA-256 of {', '.join(unchecked)}")
    elif not approximate:
        say("exact     every file has the SHA-256 that the base had")
    say(f"wrote     {result.out}")


def _show_plan(plan: MergePlan, as_json: bool) -> None:
    used = [one.label for one in plan.given]
    note(*plan.notes)
    if as_json:
        facts = {"output": str(plan.out), "adapters": used, "tensors": plan.edits, "bytes": plan.bytes_to_write}
        say_result(facts)
        return
    by = f", by {', '.join(used)}" if used else ""
    some = f"{plan.edits} of {counted(len(plan.weight_map), 'tensor')}{by}"
    say(f"restores  {some if plan.edits else f'all of it, from {plan.base.name}'}")
    say(f"writes    {plan.out}: {size(plan.bytes_to_write)}")
    say("nothing was written (--dry-run)")
