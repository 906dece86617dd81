"""What making an adapter prints: a bar while it goes on, and how near the result is to what was meant."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterkit.cli.progress import progress

if TYPE_CHECKING:
    from adapterkit.combining import Combined, ModuleDone


@contextmanager
def bar_of(what: str) -> Iterator[Callable[[ModuleDone], None]]:
    """What shows the modules that are done."""
    with progress(what) as show:
        yield lambda row: show(row.done, row.total)


def show_result(result: Combined, output: str, what: str, seconds: float, as_json: bool) -> None:
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        rows = [
            {"name": row.name, "rank": row.rank, "norm": row.energy**0.5, "error": row.error} for row in result.modules
        ]
        facts = {"output": output, "error": result.error, "seconds": round(seconds, 3), "modules": rows}
        print(json.dumps(facts | {"notes": list(result.notes)}, indent=2))
        return
    ranks = sorted({row.rank for row in result.modules})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no ranks"
    print(f"{what} in {seconds:.1f} s: {len(result.modules)} modules, {span}")
    if result.error:
        worst = max(result.modules, key=lambda row: row.error)
        print(
            f"kept      {1 - result.error**2:.2%} of ‖Δ‖², relative error {result.error:.3g} "
            f"(worst: {worst.name}, {worst.error:.3g})"
        )
    print(f"wrote     {output}")
