"""`adapterkit verify MERGED --base BASE --adapter ADAPTER[:WEIGHT]…`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.merges import VerifyOptions
from adapterkit.cli.command import Command
from adapterkit.cli.options import as_json, options_of
from adapterkit.cli.output import say, say_result
from adapterkit.inspection.module_rows import to_json
from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.merging.verdict import Verdict

MISMATCH = 3  # the exit code of adapters that do not fit a base
DESCRIPTIONS = {
    "exact": "bit-identical to a merge by adapterkit",
    "rounded": "within the error of tools that round more than once",
    "scaled": "update present at a different scale",
    "missing": "update missing",
    "quantized": "quantized after the merge",
    "damaged": "a few elements differ",
    "different": "different values",
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
    from adapterkit.api.merge import verify

    found = list(verify(**given))
    fits = all(verdict.fits for verdict in found)
    if as_json:
        say_result({"fits": fits, "tensors": [to_json(verdict) for verdict in found]})
    else:
        _show(found, given.get("sample", 1.0))
        say("OK" if fits else "MISMATCH")
    if not fits:
        raise SystemExit(MISMATCH)


def _show(found: Sequence[Verdict], sample: float) -> None:
    modified = sum(verdict.modified for verdict in found)
    share = "" if sample == 1 else f", {sample:.2%} of the rows"
    say(f"checked   {counted(len(found), 'tensor')} ({modified} modified, {len(found) - modified} unchanged){share}")
    for kind, description in DESCRIPTIONS.items():
        for is_modified, group in ((True, "modified"), (False, "unchanged")):
            some = [verdict for verdict in found if verdict.kind == kind and verdict.modified is is_modified]
            if not some:
                continue
            text = "identical to the base" if kind == "exact" and not is_modified else description
            say(f"{kind:9} {len(some)} {group}: {text}")
            if not some[0].fits:
                for verdict in some[:3]:
                    say(f"          {verdict.name}: {verdict.explanation}")
                if len(some) > 3:
                    say(f"          and {len(some) - 3} more: see --json")
