"""`adapterkit merge BASE ADAPTER… [-o OUT]`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterkit.api import merge
from adapterkit.base.quant import ROUNDINGS, writable_kinds
from adapterkit.base.renames import parse_rename
from adapterkit.cli.command import Command
from adapterkit.cli.output import note, say, say_result
from adapterkit.cli.run_plan import DEVICE_HELP, hashes_by_label, run_with_bar, undo_command, weighted
from adapterkit.errors import UsageError
from adapterkit.merging.plan.planner import DTYPES
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.receipts.receipt import irreversible
from adapterkit.merging.run.budget import check_device, default_threads, estimate_memory
from adapterkit.merging.run.scheduler import Merged
from adapterkit.text import LONGEST, counted, size

if TYPE_CHECKING:
    from adapterkit.algebra.updates import Retention


@click.command("merge", cls=Command)
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.option("-o", "--output", type=click.Path(), help="Where to write. Default: BASE-merged beside the base.")
@click.option("--scale", type=float, default=1.0, help="Multiply every adapter's strength.")
@click.option("--alpha", type=float, help="The alpha of an adapter without a config (scaling = alpha / rank).")
@click.option("--scaling", type=float, help="The scaling itself of an adapter without a config.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Convert the output; by default dtypes stay.")
@click.option(
    "--quantize", type=click.Choice([*writable_kinds(), "same"]), help="Quantize the output; by default it is not."
)
@click.option("--rounding", type=click.Choice(ROUNDINGS), default="nearest", help="How to quantize what is in between.")
@click.option("--seed", type=int, default=0, help="Of stochastic rounding.")
@click.option("--calibration", metavar="TEXT", help="For compensated rounding, by what this file makes the layers see.")
@click.option("--original", metavar="BASE16", help="Merge into BASE16 instead, checked to be what BASE was made from.")
@click.option("--accept-loss", is_flag=True, help="Even where quantizing erases more than half of the update.")
@click.option("--map", "rename", metavar="OLD=NEW", help="Rename parts of the adapter's module names.")
@click.option("--device", default="auto", metavar="DEVICE", help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(1, 256), help="Workers. Default: the cores there are, at most 8.")
@click.option("--dry-run", is_flag=True, help="Print the plan, made from headers only, and stop.")
@click.option(
    "--report", is_flag=True, help="Measure what rounding kept of the update, by layer; with --json, by tensor."
)
@click.option("--allow-partial", is_flag=True, help="Skip what has no place in the base, and say so.")
@click.option("--no-receipt", is_flag=True, help="Do without what `adapterkit unmerge` needs to undo the merge.")
@click.option(
    "--link", is_flag=True, help="Let files that stay as they are share the base's bytes (reflink, hard link)."
)
@click.option("--resume", is_flag=True, help="Take over the shards that an interrupted merge had finished.")
@click.option("--overwrite", is_flag=True, help="Replace an output that adapterkit made before.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan or the result as JSON.")
def merge_command(
    base: str, adapters: tuple[str, ...], output: str | None, scale: float, alpha: float | None,
    scaling: float | None, dtype: str | None, quantize: str | None, rounding: str, seed: int, calibration: str | None,
    original: str | None, accept_loss: bool, rename: str | None, device: str, threads: int | None, dry_run: bool,
    report: bool, allow_partial: bool, no_receipt: bool, link: bool, resume: bool, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Merge one or several adapters into BASE: W + Σ weight · scaling · B·A, summed in fp32 and rounded once.

    BASE is a directory, a .safetensors file or a Hub id. ADAPTER is a directory, a .safetensors or a .bin file;
    several are added up: `a:0.7 b:0.3`.
    """
    if dry_run and (report or resume):
        raise UsageError("--report and --resume are about a merge, --dry-run makes none: give one of them")
    if resume and (no_receipt or calibration is not None):
        raise UsageError("--resume goes by the hashes of a receipt, and by a plan that is the same: leave it away")
    plan = merge.plan_merge(
        base, [weighted(text) for text in adapters], output, scale=scale, alpha=alpha, scaling=scaling, dtype=dtype,
        quantize=quantize, rounding=rounding, seed=seed, calibration=calibration, original=original,
        accept_loss=accept_loss, rename=parse_rename(rename) if rename else None, allow_partial=allow_partial,
        receipt=not no_receipt, link=link, overwrite=overwrite, download=not dry_run,
    )  # fmt: skip
    note(*plan.notes, *(f"skipped: {name}" for name in plan.skipped))
    threads = threads or default_threads()
    check_device(plan, device, threads)
    if dry_run:
        facts = _plan_facts(plan, threads, device)
        _print(facts, _plan_lines(plan, facts), as_json)
        return
    began = time.perf_counter()
    result = run_with_bar(plan, "merging", threads, device, report, resume)
    undo = undo_command(result.out, [weighted(text)[0] for text in adapters])
    facts = _result_facts(plan, result, time.perf_counter() - began, undo)
    if plan.receipt and (lost := irreversible(plan)):
        note(f"cannot be undone without the base, since {lost}")
    _print(facts, _result_lines(facts, result, report, quantize is not None, undo), as_json)


# --- what is printed -------------------------------------------------------------------------------------------------


def _print(facts: dict[str, Any], lines: list[str], as_json: bool) -> None:
    if as_json:
        say_result(facts)
    else:
        say(*lines)


def _plan_facts(plan: MergePlan, threads: int, device: str) -> dict[str, Any]:
    return {
        "base": plan.base.name,
        "adapters": [
            {"name": one.label, "weight": one.weight, "modules": len(one.adapter.modules), "format": one.adapter.format}
            for one in plan.given
        ],
        "output": str(plan.out),
        "files": len(plan.files),
        "tensors": len(plan.weight_map),
        "tensors_changed": plan.edits,
        "dtype": plan.stored_as,
        "quantized_to": list(
            dict.fromkeys(edit.packing.scheme for file in plan.files for edit in file.edits if edit.packing)
        ),
        "bytes_to_write": plan.bytes_to_write,
        "bytes_free": shutil.disk_usage(_existing(plan.out.absolute().parent)).free,
        "peak_memory": estimate_memory(plan, threads),
        "threads": threads,
        "device": device,
        "landed": {label: {name: list(at) for name, at in landed.items()} for label, landed in plan.ledger.items()},
        "skipped": list(plan.skipped),
    }


def _plan_lines(plan: MergePlan, facts: dict[str, Any]) -> list[str]:
    lines = [f"base      {plan.base.name}: {counted(facts['tensors'], 'tensor')} in {counted(facts['files'], 'file')}"]
    for one in plan.given:
        found = len(plan.ledger[one.label])
        total = len(one.adapter.modules) + len(one.adapter.replaced) + len(one.adapter.tokens)
        lines.append(f"adapter   {one.label} × {one.weight:g}: {found} of {total} modules and tensors have their place")
    stored = f"quantized to {'; '.join(facts['quantized_to'])}" if facts["quantized_to"] else f"dtype {facts['dtype']}"
    lines += [
        f"changes   {facts['tensors_changed']} of {counted(facts['tensors'], 'tensor')}, {stored}",
        f"writes    {plan.out}: {size(plan.bytes_to_write)} ({size(facts['bytes_free'])} free)",
        f"memory    about {size(facts['peak_memory'])} with {counted(facts['threads'], 'thread')}, "
        f"device {facts['device']}",
        "nothing was written (--dry-run)",
    ]
    return lines


def _result_facts(plan: MergePlan, result: Merged, seconds: float, undo: Sequence[str]) -> dict[str, Any]:
    total = _total(result)
    return {
        "output": str(result.out),
        "bytes_written": result.bytes_written,
        "tensors": len(plan.weight_map),
        "tensors_changed": result.tensors,
        "seconds": round(seconds, 3),
        "device": result.place,
        "sha256": hashes_by_label(plan, result.hashes),
        "retention": _kept(total) if total else None,
        "retention_by_tensor": {name: _kept(kept) for name, kept in result.retention.items()},
        "undone_by": " ".join(undo) if plan.receipt and not irreversible(plan) else None,
        "skipped": list(plan.skipped),
    }


def _result_lines(
    facts: dict[str, Any], result: Merged, report: bool, quantized: bool, undo: Sequence[str]
) -> list[str]:
    lines = []
    if report:
        lines += _report(result)
    if quantized and (total := _total(result)) is not None and total.delta:
        lines.append(f"kept      {total.kept:.1%} of the update, with an error of {total.error:.2f} times its size")
    lines.append(
        f"merged    {facts['tensors_changed']} of {counted(facts['tensors'], 'tensor')} in {facts['seconds']:.1f} s, "
        f"{size(facts['bytes_written'])}"
    )
    lines.append(f"wrote     {result.out}")
    if facts["undone_by"]:
        between = " " if len(facts["undone_by"]) < LONGEST else " \\\n  "  # a longer line would be cut
        lines += f"undo      {between.join(undo)}".split("\n")
    return lines


def _report(result: Merged) -> list[str]:
    """What rounding kept, a line for each layer; --json has every tensor."""
    from adapterkit.algebra.updates import Retention
    from adapterkit.inspection.summary import layer_of

    parts: dict[int | str, list[Retention]] = {}
    for name, kept in result.retention.items():
        layer = layer_of(name)
        parts.setdefault(name if layer is None else layer, []).append(kept)
    lines = ["kept of the update after rounding: ⟨W'−W, Δ⟩/‖Δ‖², and ‖W'−W−Δ‖/‖Δ‖"]
    for part in sorted(parts, key=lambda part: (isinstance(part, str), part)):
        kept = sum(parts[part], Retention())
        lines.append(f"  {_measured(kept)}  {part if isinstance(part, str) else f'layer {part}'}")
    if (total := _total(result)) is not None:
        lines.append(f"  {_measured(total)}  in total")
    return lines


def _measured(kept: Retention) -> str:
    return f"{kept.kept:7.4f}  {kept.error:7.4f}" if kept.delta else f"{'–':>7}  {'–':>7}"


def _kept(kept: Retention) -> dict[str, float | None]:
    """What rounding kept, for JSON: of no update, nothing can be said."""
    return {"kept": kept.kept, "error": kept.error} if kept.delta else {"kept": None, "error": None}


def _total(result: Merged) -> Any:
    from adapterkit.algebra.updates import Retention

    return sum(result.retention.values(), Retention()) if result.retention else None


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder
