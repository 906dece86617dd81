"""What `import adapterkit` offers to undo merges.

>>> adapterkit.unmerge("merged", "base-again", adapters=["adapter"])  # every file's SHA-256 as it was
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapter import Adapter
from adapterkit.checkpoint import Checkpoint, open_checkpoint
from adapterkit.errors import FitError, UsageError
from adapterkit.hub import resolve
from adapterkit.inputs import AnyAdapter, AnyAdapters, AnyPath, open_adapters, open_base, weighted
from adapterkit.plan import Given, MergePlan, inputs_of
from adapterkit.receipt import find_receipt, read_receipt
from adapterkit.staging import Destination, staged
from adapterkit.stream import Merged, run
from adapterkit.unmerging import (
    check_fits,
    find_adapters,
    levels,
    opened,
    plan_copy,
    plan_subtraction,
    plan_undo,
    sort_by_level,
)  # fmt: skip

if TYPE_CHECKING:
    import torch


def unmerge(
    merged: AnyPath,
    out: AnyPath,
    *,
    adapters: AnyAdapters = (),
    base: AnyPath | None = None,
    approximate: bool = False,
    every: bool = False,
    threads: int | None = None,
    device: str | torch.device = "auto",
    run_plan: Callable[[MergePlan], Merged] | None = None,
) -> Merged:
    """Undo the last merge of `merged`, or `every` one, bit for bit, and write the base to `out`.

    The receipt says which adapters that needs: they are among `adapters`, or found by name and SHA-256. With the `base`
    none is needed where there is a receipt; where there is none, the base is checked to be in `merged` with just these
    adapters, and copied. `approximate` subtracts the adapters from whatever `merged` is. `run_plan` runs each plan, by
    default on `threads` and `device`. Raises FitError where anything is not what was merged, by its SHA-256.
    """
    run_plan = run_plan or partial(_run, threads=threads, device=device)
    if not every:
        return run_plan(plan_unmerge(merged, out, adapters=adapters, base=base, approximate=approximate))
    checkpoint, target, given = _checked(merged, out, adapters, approximate)
    source = checkpoint.path
    receipts = levels(source)
    if base is not None or approximate or not receipts:
        raise UsageError("every merge is undone by receipts alone, one after the other: there must be some")
    offers = sort_by_level(receipts, [one.adapter for one in given])
    with staged(Destination(target, inputs_of(checkpoint, *given), checkpoint.is_directory, beside=True)) as last:
        between = [last.with_name(f"before-{number}") for number in range(1, len(receipts))]
        for offer, step in zip(offers, [*between, last], strict=True):
            receipt = read_receipt(find_receipt(checkpoint.path) or checkpoint.path)
            found = find_adapters(receipt, offer, source)
            result = run_plan(plan_undo(checkpoint, receipt, found, step))
            checkpoint = open_checkpoint(step)
    return replace(result, out=target)


def plan_unmerge(
    merged: AnyPath, out: AnyPath, *, adapters: AnyAdapters = (), base: AnyPath | None = None, approximate: bool = False
) -> MergePlan:
    """Plan to undo the last merge of `merged`, as `unmerge` does; nothing is written."""
    checkpoint, target, given = _checked(merged, out, adapters, approximate)
    return _plan(checkpoint, target, given, base, approximate)


def _checked(
    merged: AnyPath, out: AnyPath, adapters: AnyAdapters, approximate: bool
) -> tuple[Checkpoint, Path, list[Given]]:
    """What is to be undone, where that goes, and the adapters that are given, opened and checked to lie apart."""
    source, target = resolve(merged), Path(out).expanduser()
    checkpoint = open_base(merged)
    told = find_receipt(source) is not None and not approximate
    given = open_adapters([(_opened(what), weight) for what, weight in weighted(adapters)] if told else adapters)
    named = [Path(what) for what, _ in weighted(adapters) if not isinstance(what, Adapter)]
    Destination(target, (*inputs_of(checkpoint, *given), *named), checkpoint.is_directory).check()
    return checkpoint, target, given


def _plan(merged: Checkpoint, out: Path, given: Sequence[Given], base: AnyPath | None, approximate: bool) -> MergePlan:
    """What undoes the last merge, from headers only but where a base is to be checked."""
    original = None if base is None else open_base(base)
    if original is not None:
        Destination(out, inputs_of(merged, original, *given), original.is_directory).check()
    folder = find_receipt(merged.path)
    receipt = None if folder is None else read_receipt(folder)
    weighted = any(one.weight != 1.0 for one in given)
    if approximate:
        if original is not None:
            raise UsageError("with the base nothing needs to be approximate: give one of them")
        if receipt is not None and not given:
            found = find_adapters(receipt, [], merged.path)
            given = [Given(a, one.weight, one.name) for a, one in zip(found, receipt.adapters, strict=True)]
        if not given:
            raise UsageError(f"{merged.path}: has no receipt that says which adapters to subtract: name them")
        return plan_subtraction(merged, given, out)
    if receipt is not None and weighted:
        raise UsageError("the weights are those of the receipt: name the adapters without")
    if original is not None:
        if receipt is None:
            check_fits(merged, original, given)
        elif given:
            raise UsageError("a receipt and the base are enough: leave the adapters away")
        return plan_copy(original, receipt, out)
    if receipt is None:
        raise FitError(
            f"{merged.path}: has no receipt, without which no merge is undone exactly. --base BASE --adapter A checks "
            "and restores the base, --approximate --adapter A subtracts."
        )
    return plan_undo(merged, receipt, find_adapters(receipt, [one.adapter for one in given], merged.path), out)


def _opened(adapter: AnyAdapter) -> Adapter:
    """An adapter that a receipt tells the scalings of."""
    return adapter if isinstance(adapter, Adapter) else opened(resolve(adapter))


def _run(plan: MergePlan, threads: int | None, device: str | torch.device) -> Merged:
    *_, result = run(plan, threads=threads, device=device)
    assert isinstance(result, Merged)
    return result
