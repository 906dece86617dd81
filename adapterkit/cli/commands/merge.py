"""`adapterkit merge BASE ADAPTER… [-o OUT]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api.options.merges import MergeCall, MergeOptions, MergeRunOptions
from adapterkit.cli.command import Command
from adapterkit.cli.next_commands import next_lines, push_command, undo_command
from adapterkit.cli.options import as_json, dry_run, options_of, weighted
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.recipe import recipe_option, with_recipe
from adapterkit.errors import UsageError
from adapterkit.text import counted, size

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention
    from adapterkit.cli.run_plan import Ran
    from adapterkit.merging.plan.types import MergePlan
    from adapterkit.merging.run.finish import Merged


@click.command(
    "merge",
    cls=Command,
    docs="merge.md",
    examples=[
        "adapterkit merge base adapter -o merged",
        "adapterkit merge base adapter other:0.3 -o both --weight adapter:layers.0=0.5",
        "adapterkit merge base adapter --dry-run",
    ],
)
@options_of(MergeOptions, required=False)
@recipe_option
@options_of(MergeRunOptions, "how")
@dry_run
@as_json("Print the plan or the result as JSON")
def merge_command(given: dict[str, Any], how: dict[str, Any], recipe: str | None, dry_run: bool, as_json: bool) -> None:
    """W + Σ weight · scaling · B·A is summed in fp32 and rounded once.

    BASE is a directory, a .safetensors file or a Hub id; without it, the base that ADAPTER names. ADAPTER is a
    directory, a .safetensors or .bin file, or a Hub id; several are summed.
    """
    if "adapters" not in given and "base" in given:  # a single argument is the adapter
        given["adapters"] = [weighted(given.pop("base"))]
    given = with_recipe(given, recipe, MergeOptions)
    report, resume = bool(how.get("report")), bool(how.get("resume"))
    if dry_run and (report or resume):
        raise UsageError("--report and --resume are about a merge, --dry-run makes none", hint="give one of them")
    from adapterkit.api.merge import plan_merge
    from adapterkit.cli.run_plan import print_plan, run_with_bar
    from adapterkit.merging.receipts.receipt import irreversible
    from adapterkit.merging.run.finish import Merged

    plan = plan_merge.of(MergeCall(**given, **how, download=not dry_run))
    if dry_run:
        print_plan(plan, how, as_json)
        return
    ran = run_with_bar(plan, "merging", Merged, **how)
    undo = undo_command(ran.result.out, [path for path, _ in given["adapters"]])
    receipt, lost = how.get("receipt", True), irreversible(plan)
    facts = _result_facts(plan, ran, undo if receipt and not lost else None)
    if receipt and lost:
        note(f"cannot be undone without the base: {lost}")
    _print(facts, _result_lines(facts, ran.result, report, "quantize" in given, undo), as_json)


# --- what is printed -------------------------------------------------------------------------------------------------


def _print(facts: dict[str, Any], lines: list[str], as_json: bool) -> None:
    if as_json:
        say_result(facts)
    else:
        say(*lines)


def _result_facts(plan: MergePlan, ran: Ran[Merged], undo: Sequence[str] | None) -> dict[str, Any]:
    from adapterkit.cli.run_plan import hashes_by_label

    result = ran.result
    total = _total(result)
    return {
        "output": str(result.out),
        "bytes_written": result.bytes_written,
        "tensors": len(plan.weight_map),
        "tensors_changed": result.tensors,
        "seconds": round(ran.seconds, 3),
        "device": result.place,
        "sha256": hashes_by_label(plan, result.hashes),
        "retention": _retention_facts(total) if total else None,
        "retention_by_tensor": {name: _retention_facts(one) for name, one in result.retention.items()},
        "undone_by": " ".join(undo) if undo else None,
        "skipped": list(plan.skipped),
    }


def _result_lines(
    facts: dict[str, Any], result: Merged, report: bool, quantized: bool, undo: Sequence[str]
) -> list[str]:
    lines = []
    if report:
        lines += _report(result)
    if quantized and (total := _total(result)) is not None and total.delta:
        lines.append(f"retained  {total.retained:.1%} of the update, relative error {total.error:.2f}")
    lines.append(
        f"merged    {facts['tensors_changed']} of {counted(facts['tensors'], 'tensor')} in {facts['seconds']:.1f} s, "
        f"{size(facts['bytes_written'])}"
    )
    lines.append(f"wrote     {result.out}")
    if result.out.is_dir():
        lines += next_lines("push", push_command(result.out))
    if facts["undone_by"]:
        lines += next_lines("undo", undo)
    return lines


def _report(result: Merged) -> list[str]:
    """Retention of the update, a line for each layer; --json has every tensor."""
    from adapterkit.adapter.module_names import layer_of
    from adapterkit.algebra.updates import Retention

    parts: dict[int | str, list[Retention]] = {}
    for name, retention in result.retention.items():
        layer = layer_of(name)
        parts.setdefault(name if layer is None else layer, []).append(retention)
    lines = ["share of the update retained, ⟨W'−W, Δ⟩/‖Δ‖², and relative error, ‖W'−W−Δ‖/‖Δ‖"]
    for part in sorted(parts, key=lambda part: (isinstance(part, str), part)):
        retention = sum(parts[part], Retention())
        lines.append(f"  {_measured(retention)}  {part if isinstance(part, str) else f'layer {part}'}")
    if (total := _total(result)) is not None:
        lines.append(f"  {_measured(total)}  total")
    return lines


def _measured(retention: Retention) -> str:
    return f"{retention.retained:7.4f}  {retention.error:7.4f}" if retention.delta else f"{'–':>7}  {'–':>7}"


def _retention_facts(retention: Retention) -> dict[str, float | None]:
    """Retention as JSON facts: null without an update."""
    if not retention.delta:
        return {"kept": None, "error": None}
    return {"kept": retention.retained, "error": retention.error}


def _total(result: Merged) -> Any:
    from adapterkit.algebra.updates import Retention

    return sum(result.retention.values(), Retention()) if result.retention else None
