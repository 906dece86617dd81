"""Print a plan, or run it with a progress bar; shared by all verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from adapterkit.api.run import Event, Plan, run
from adapterkit.api.unmerge_steps import StepStarted
from adapterkit.cli.next_commands import merge_command, next_lines, push_command
from adapterkit.cli.output import note, say, say_result, warn
from adapterkit.cli.progress import progress
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.hub.events import BytesDone, Pulled, Pushed
from adapterkit.hub.names import public_name
from adapterkit.merging.plan.types import Hashes, MergePlan
from adapterkit.merging.run.budget import default_threads, estimate_memory
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run.run import TensorMerged, check_run
from adapterkit.merging.run_options import RunOptions
from adapterkit.text import counted, size

R = TypeVar("R", Merged, AdapterMade, Pulled, Pushed)


def print_plan(plan: Plan, how: Mapping[str, Any], as_json: bool, done: str = "written") -> None:
    """Print `plan` and the memory to run it, ending with `Dry run: nothing` and `done`."""
    _print_notes(plan)
    facts, lines = plan.facts(), plan.lines()
    if isinstance(plan, MergePlan):
        options = RunOptions(**how)
        threads, device = options.threads or default_threads(), options.device
        check_run(plan, options)
        memory = estimate_memory(plan, threads)
        facts |= {"peak_memory": memory, "threads": threads, "device": device}
        lines.append(f"memory    about {size(memory)} with {counted(threads, 'thread')}, device {device}")
    if as_json:
        say_result(facts)
    else:
        say(*lines, f"Dry run: nothing {done}")


@dataclass(frozen=True)
class Ran(Generic[R]):
    """The result of a plan, its duration, and the plan of its last step."""

    result: R
    seconds: float
    last: Plan


def run_with_bar(
    plan: Plan, what: str, made: type[R], on_event: Callable[[Event], None] = lambda _: None, **how: Any
) -> Ran[R]:
    """Run `plan` to its end with a progress bar, and print its notes and warnings."""
    began, last = time.perf_counter(), plan
    _print_notes(plan)
    bar = progress(what, in_bytes=plan.unit == "B")
    with bar as show, closing(run(plan, **how)) as events:  # ctrl-C may arrive while the bar is drawn
        for event in events:
            on_event(event)
            if isinstance(event, TensorMerged | ModuleDone):
                show(event.done, event.total)
            elif isinstance(event, BytesDone):
                show(event.done, event.total, event.what)
            elif isinstance(event, StepStarted):
                last = event.plan
                _print_notes(last)
            elif isinstance(event, made):
                note(*(line for line in getattr(event, "notes", ()) if line not in plan.notes))
                warn(*getattr(event, "warnings", ()))
                return Ran(event, time.perf_counter() - began, last)
    raise AssertionError("a run ends with its result")


def _print_notes(plan: Plan) -> None:
    """Print the notes of a plan, and its skipped modules."""
    skipped = plan.skipped if isinstance(plan, MergePlan) else ()
    note(*plan.notes, *(f"skipped: {name}" for name in skipped))


def show_adapter(ran: Ran[AdapterMade], what: str, as_json: bool, base: str | None = None) -> None:
    """Print a new adapter, the error of truncation, and the commands to merge it into `base` and to push it."""
    result = ran.result
    if as_json:
        rows = [
            {"name": row.name, "rank": row.rank, "norm": row.energy**0.5, "error": row.error} for row in result.modules
        ]
        say_result(
            {"output": str(result.out), "error": result.error, "seconds": round(ran.seconds, 3), "modules": rows}
        )
        return
    ranks = sorted({row.rank for row in result.modules})
    parts = []
    if ranks:
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        parts.append(f"{counted(len(result.modules), 'module')}, {span}")
    if result.adapter.replaced:
        parts.append(counted(len(result.adapter.replaced), "whole tensor"))
    say(f"{what} in {ran.seconds:.1f} s: {', '.join(parts) or 'no modules'}")
    if result.error:
        worst = max(result.modules, key=lambda row: row.error)
        say(
            f"retained  {1 - result.error**2:.2%} of ‖Δ‖², relative error {result.error:.3g} "
            f"(worst: {worst.name}, {worst.error:.3g})"
        )
    say(f"wrote     {result.out}")
    assert result.out is not None
    base = base or public_name(result.adapter.base_model)
    if base is not None:
        say(*next_lines("merge", merge_command(base, result.out)))
    say(*next_lines("push", push_command(result.out)))


def hashes_by_label(plan: MergePlan, hashes: Hashes) -> dict[str, dict[str, Any]]:
    """The SHA-256 of every file of a run, for `--json`; those of adapters by label."""
    labels = [one.label for one in plan.adapters]
    return asdict(hashes) | {"adapters": dict(zip(labels, hashes.adapters, strict=True))}
