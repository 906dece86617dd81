"""`adapterkit unmerge MERGED -o OUT`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.merges import DeviceOptions, UnmergeOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, dry_run, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.cli.run_plan import Ran
    from adapterkit.merging.run.finish import Merged


@click.command(
    "unmerge",
    cls=Command,
    docs="undo.md",
    examples=[
        "adapterkit unmerge merged -o restored",
        "adapterkit unmerge merged -o again --adapter adapter",
    ],
)
@options_of(UnmergeOptions)
@options_of(DeviceOptions, "how")
@dry_run
@as_json("Print the plan or the result as JSON")
def unmerge_command(given: dict[str, Any], how: dict[str, Any], dry_run: bool, as_json: bool) -> None:
    """Every file of the base is restored bit for bit, from the receipt that `merge` wrote and from the adapters.

    The adapters are found by name and SHA-256. Nothing is written unless every hash matches.
    """
    from adapterkit.api.unmerge import plan_unmerge
    from adapterkit.cli.run_plan import print_plan, run_with_bar
    from adapterkit.merging.run.finish import Merged

    plan = plan_unmerge(**given)
    if dry_run:
        print_plan(plan, how, as_json)
        return
    _show(run_with_bar(plan, "unmerging", Merged, **how), bool(given.get("approximate")), as_json)


def _show(ran: Ran[Merged], approximate: bool, as_json: bool) -> None:
    result = ran.result
    from adapterkit.merging.plan.types import MergePlan

    unchecked = ran.last.unchecked if isinstance(ran.last, MergePlan) else ()
    if as_json:
        facts = {
            "output": str(result.out), "exact": not approximate, "unchecked": list(unchecked),
            "bytes_written": result.bytes_written, "tensors_restored": result.tensors,
            "seconds": round(ran.seconds, 3), "device": result.place, "sha256": result.hashes.outputs,
        }  # fmt: skip
        say_result(facts)
        return
    what = "subtracted from" if approximate else "restored"
    say(f"{what:9} {counted(result.tensors, 'tensor')} in {ran.seconds:.1f} s, {size(result.bytes_written)}")
    if unchecked:
        say("exact     every weight file has the SHA-256 that the base had")
        say(f"unchecked the receipt has no SHA-256 of {', '.join(unchecked)}")
    elif not approximate:
        say("exact     every file has the SHA-256 that the base had")
    say(f"wrote     {result.out}")
