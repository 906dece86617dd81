"""`adapterkit verify MERGED --base BASE --adapter ADAPTER[:WEIGHT]…`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api import merge
from adapterkit.api.options.merges import VerifyOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import say, say_result
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


@click.command(
    "verify",
    cls=Command,
    docs="verify.md",
    examples=[
        "adapterkit verify merged --base base --adapter adapter",
        "adapterkit verify merged --base base --adapter adapter --sample 0.1",
    ],
)
@options_of(VerifyOptions)
@as_json("Print every tensor's verdict as JSON")
def verify_command(given: dict[str, Any], as_json: bool) -> None:
    """MERGED may be the output of any tool.

    Every tensor is recomputed a few rows at a time and compared. Exits with 0 if all match, else with 3, and describes
    the difference: an update at a different scale, a missing update, damaged elements.
    """
    found = list(merge.verify(**given))
    fits = all(verdict.fits for verdict in found)
    if as_json:
        say_result({"fits": fits, "tensors": [to_json(verdict) for verdict in found]})
    else:
        _show(found, given.get("sample", 1.0))
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
