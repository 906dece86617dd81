"""What making an adapter prints: a bar while it goes on, and how near the result is to what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.progress import progress
from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.combining.combine import Combined, ModuleDone, Planned


@contextmanager
def bar_of(what: str, output: str, dry_run: bool, as_json: bool) -> Iterator[Callable[[Planned | ModuleDone], None]]:
    """What shows the modules that are done; of a dry run the plan, which is its end."""
    from adapterkit.combining.combine import Planned

    with progress(what) as show:

        def on_module(event: Planned | ModuleDone) -> None:
            if not isinstance(event, Planned):
                show(event.done, event.total)
            elif dry_run:
                _show_plan(output, event.modules, as_json)
                raise SystemExit(0)

        yield on_module


def _show_plan(output: str, modules: int, as_json: bool) -> None:
    if as_json:
        say_result({"output": output, "modules": modules})
        return
    say(f"plan      {counted(modules, 'module')} to make; all that headers tell is checked, and fits")
    say(f"writes    {output}")
    say("nothing was written (--dry-run)")


def show_result(result: Combined, output: str, what: str, seconds: float, as_json: bool) -> None:
    note(*result.notes)
    if as_json:
        rows = [
            {"name": row.name, "rank": row.rank, "norm": row.energy**0.5, "error": row.error} for row in result.modules
        ]
        facts = {"output": output, "error": result.error, "seconds": round(seconds, 3), "modules": rows}
        say_result(facts)
        return
    ranks = sorted({row.rank for row in result.modules})
    parts = []
    if ranks:
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        parts.append(f"{counted(len(result.modules), 'module')}, {span}")
    if result.adapter.replaced:
        parts.append(counted(len(result.adapter.replaced), "whole tensor"))
    say(f"{what} in {seconds:.1f} s: {', '.join(parts) or 'no modules'}")
    if result.error:
        worst = max(result.modules, key=lambda row: row.error)
        say(
            f"kept      {1 - result.error**2:.2%} of ‖Δ‖², relative error {result.error:.3g} "
            f"(worst: {worst.name}, {worst.error:.3g})"
        )
    say(f"wrote     {output}")
