"""`adapterkit verify MERGED --base BASE --adapter ADAPTER[:WEIGHT]…`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from adapterkit.api import merge
from adapterkit.base.renames import parse_rename
from adapterkit.cli.command import Command
from adapterkit.cli.output import say, say_result
from adapterkit.cli.run_plan import weighted
from adapterkit.inspection.summary import to_json
from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.merging.verify import Verdict

# Ends with this where the checkpoint is not what it should be, as adapters that do not fit a base do.
DOES_NOT_FIT = 3
SAYS = {
    "exact": "every bit is as adapterkit merges it, rounded once",
    "rounded": "within the rounding of tools that round more often",
    "scaled": "the update is there with another strength",
    "missing": "the update is not there",
    "quantized": "quantized after merging",
    "damaged": "a few elements are off",
    "different": "something else",
}


@click.command("verify", cls=Command)
@click.argument("merged")
@click.option("--base", required=True, help="The base that it should be made of.")
@click.option("--adapter", "adapters", multiple=True, required=True, metavar="ADAPTER[:WEIGHT]",
              help="An adapter that should be in it; can be given several times.")  # fmt: skip
@click.option("--scale", type=float, default=1.0, help="Multiply every adapter's strength.")
@click.option("--sample", type=float, default=1.0, help="Look at this share of the rows only.")
@click.option("--map", "rename", metavar="OLD=NEW", help="Rename parts of the adapter's module names.")
@click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: the cores there are, at most 8.")
@click.option("--json", "as_json", is_flag=True, help="Print every tensor's verdict as JSON.")
def verify_command(
    merged: str, base: str, adapters: tuple[str, ...], scale: float, sample: float, rename: str | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Check that MERGED is just BASE with just these adapters in it, whichever tool merged them.

    Every tensor is replayed a few rows at a time and compared. Ends with 0 where all fit, else with 3, saying what is
    there instead: another strength and how much, an update that is missing, elements that are off.
    """
    found = list(
        merge.verify(
            merged, base, [weighted(text) for text in adapters], scale=scale, sample=sample,
            rename=parse_rename(rename) if rename else None, threads=threads,
        )
    )  # fmt: skip
    fits = all(verdict.fits for verdict in found)
    if as_json:
        say_result({"fits": fits, "tensors": [to_json(verdict) for verdict in found]})
    else:
        _show(found, sample)
        say("fits" if fits else "does not fit")
    if not fits:
        raise SystemExit(DOES_NOT_FIT)


def _show(found: Sequence[Verdict], sample: float) -> None:
    touched = sum(verdict.touched for verdict in found)
    share = "" if sample == 1 else f", {sample:.2%} of the rows"
    parts = f"{touched} that the adapters touch, {counted(len(found) - touched, 'other')}"
    say(f"verified  {counted(len(found), 'tensor')}{share}: {parts}")
    for kind, says in SAYS.items():
        for which, whose in ((True, "touched"), (False, "others")):
            some = [verdict for verdict in found if verdict.kind == kind and verdict.touched is which]
            if not some:
                continue
            say(f"{kind:9} {len(some)} {whose}: {says if which or kind != 'exact' else 'as in the base'}")
            if not some[0].fits:
                for verdict in some[:3]:
                    say(f"          {verdict.name}: {verdict.explanation}")
                if len(some) > 3:
                    say(f"          and {len(some) - 3} more: see --json")
