"""The Python calls that undo merges.

>>> adapterkit.unmerge("merged", "base-again", adapters=["adapter"])  # restores every file's SHA-256
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path

from adapterkit.adapter.formats import load
from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.api.inputs import AnyAdapter, open_adapters, open_base, oriented, weighted
from adapterkit.api.options.merges import UnmergeCall, UnmergeOptions
from adapterkit.api.run import in_one_call
from adapterkit.api.unmerge_steps import UnmergePlan
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.errors import AdapterkitError, FitError, UsageError
from adapterkit.files.opening import sha256_of
from adapterkit.files.staging import BEFORE, RECEIPT, Destination
from adapterkit.files.stamps import Stamp, stamps_of
from adapterkit.hub import is_hub_id, resolve
from adapterkit.merging.plan.types import MergePlan, inputs_of
from adapterkit.merging.receipts.receipt import Receipt, find_receipt, read_receipt
from adapterkit.merging.run.finish import Merged
from adapterkit.merging.run_options import RunOptions
from adapterkit.merging.unmerge import check_fits, plan_copy, plan_subtraction, plan_undo
from adapterkit.options import takes
from adapterkit.text import argument, command


@takes(UnmergeOptions)
def plan_unmerge(o: UnmergeOptions) -> MergePlan | UnmergePlan:
    """Plan to undo the last merge of `merged`, or `every` one, exactly; nothing is written.

    The receipt names the adapters, which are among `adapters`, or found by name and SHA-256. Without a receipt, `base`
    is checked to be in `merged` with just these adapters, and copied.

    Returns:
        The plan: `print` shows it, `run` runs it.

    Raises:
        UsageError: Arguments contradict each other.
        MissingFileError: `merged`, `base` or an adapter does not exist.
        FitError: There is no receipt, or a file is not what was merged, by its SHA-256.
        OutputExistsError: `out` exists.
    """
    checkpoint, target, given = _checked(o)
    if not o.every:
        return _plan(checkpoint, target, given, o)
    receipts = levels(checkpoint.path)
    if o.base is not None or o.approximate or not receipts:
        raise UsageError("`every=True` needs receipts, and takes neither `base` nor `approximate`")
    _check_unweighted(given)
    offers = sort_by_level(receipts, [entry.adapter for entry in given])
    found = [
        tuple(find_adapters(receipt, offer, checkpoint.path)) for receipt, offer in zip(receipts, offers, strict=True)
    ]
    first = plan_undo(checkpoint, receipts[0], found[0], target)
    return UnmergePlan(replace(first, also_read=inputs_of(*given)), tuple(receipts), tuple(found))


@takes(UnmergeCall)
def unmerge(o: UnmergeCall) -> Merged:
    """Undo merges in one call: `plan_unmerge`, then `run` to its end.

    Returns:
        The restored base and its hashes.

    Raises:
        AdapterkitError: See `plan_unmerge` and `run`; nothing is left behind.
    """
    return in_one_call(plan_unmerge.of, o, Merged, RunOptions(o.threads, str(o.device)))


def _checked(o: UnmergeOptions) -> tuple[Checkpoint, Path, list[WeightedAdapter]]:
    """The merged model, the output and the given adapters, opened and checked to be disjoint."""
    checkpoint = open_base(o.merged, hint="the merged model comes first; its adapters are named by `adapters`")
    target = Path(o.out).expanduser()
    told = find_receipt(checkpoint.path) is not None and not o.approximate
    if told and o.orientation is not None:
        raise UsageError("the receipt defines the orientation", hint="omit `orientation`")
    adapters = weighted(o.adapters)
    opened = [(_opened(what), weight) for what, weight in adapters] if told else adapters
    given = open_adapters(opened, weights=o.weights, orientation=o.orientation)
    named = [Path(what) for what, _ in adapters if not isinstance(what, Adapter)]
    Destination(target, (*inputs_of(checkpoint, *given), *named), checkpoint.is_directory).check()
    return checkpoint, target, given


def _plan(merged: Checkpoint, out: Path, given: Sequence[WeightedAdapter], o: UnmergeOptions) -> MergePlan:
    """Plan to undo the last merge, from headers only unless a base must be checked."""
    original = None if o.base is None else open_base(o.base)
    if original is not None:
        Destination(out, inputs_of(merged, original, *given), original.is_directory).check()
    folder = find_receipt(merged.path)
    receipt = None if folder is None else read_receipt(folder)
    if o.approximate:
        if original is not None:
            raise UsageError("`base` and `approximate` exclude each other: with the base, undoing is exact")
        if receipt is not None and receipt.as_trained is not None:
            raise FitError(
                f"{merged.path}: merged onto a base quantized to {receipt.as_trained}, which subtraction cannot undo",
                hint="omit `approximate`, or restore from `base`",
            )
        if receipt is not None and not given:
            found = find_adapters(receipt, [], merged.path)
            named = [one.weighting(adapter) for adapter, one in zip(found, receipt.adapters, strict=True)]
            given = oriented(named, o.orientation)
        if not given:
            raise UsageError(f"{merged.path}: no receipt names the adapters to subtract", hint="give `adapters`")
        return plan_subtraction(merged, given, out)
    if receipt is not None:
        _check_unweighted(given)
    if original is not None:
        if receipt is None:
            check_fits(merged, original, given)
        elif given:
            raise UsageError("the receipt and the base are sufficient", hint="omit `adapters`")
        return plan_copy(original, receipt, out)
    if receipt is None:
        raise FitError(
            f"{merged.path}: no receipt, so the merge cannot be undone exactly",
            hint="`base` with `adapters` checks and restores the base; `approximate=True` with `adapters` subtracts",
        )
    return plan_undo(merged, receipt, find_adapters(receipt, [one.adapter for one in given], merged.path), out)


def _check_unweighted(given: Sequence[WeightedAdapter]) -> None:
    """Raise UsageError for adapters with weights, which are in the receipt."""
    if any(one.weight != 1.0 or one.module_weights for one in given):
        raise UsageError("the receipt defines the weights", hint="give the adapters without weights")


def _opened(adapter: AnyAdapter) -> Adapter:
    """An adapter whose scalings are in a receipt."""
    return adapter if isinstance(adapter, Adapter) else opened(resolve(adapter))


def levels(merged: Path) -> list[Receipt]:
    """The receipts of all merges, the last merge first."""
    found, folder = [], find_receipt(merged)
    while folder is not None:
        found.append(read_receipt(folder))
        folder = folder / BEFORE if (folder / BEFORE / RECEIPT).is_file() else None
    return found


def sort_by_level(receipts: Sequence[Receipt], offered: Sequence[Adapter]) -> list[list[Adapter]]:
    """Which of the adapters each of the receipts names. Raises FitError where one is named by none."""
    found: list[list[Adapter]] = [[] for _ in receipts]
    for adapter in offered:
        hashes = hashes_of(adapter)
        named = [any(set(one.files.values()) == hashes for one in receipt.adapters) for receipt in receipts]
        if not any(named):
            names = ", ".join(one.name for receipt in receipts for one in receipt.adapters)
            raise FitError(
                f"{adapter.files[0].parent}: not the merged adapter, by its SHA-256; the receipt names {names}",
                hint="`approximate=True` subtracts it anyway",
            )
        for level, here in zip(found, named, strict=True):
            level += [adapter] if here else []
    return found


def find_adapters(receipt: Receipt, offered: Sequence[Adapter], near: Path) -> list[Adapter]:
    """The adapters of the receipt, in its order: of those `offered`, else by name beside `near`, here, or on the Hub.

    Raises FitError where one is none of these, where one that is offered was not merged, or only some are offered.
    """
    sort_by_level([receipt], offered)
    _refuse_some(receipt, [hashes_of(adapter) for adapter in offered])
    found = []
    for one in receipt.adapters:
        hashes = set(one.files.values())
        candidates = chain(offered, _by_name(one.name, near))
        here = next((adapter for adapter in candidates if hashes_of(adapter) == hashes), None)
        if here is None:
            digests = ", ".join(f"{name} {digest[:12]}…" for name, digest in one.files.items())
            raise FitError(
                f"{one.name}: adapter not found next to {near.name} or in the current directory ({digests})",
                hint="give it in `adapters`",
            )
        found.append(here)
    return found


def _refuse_some(receipt: Receipt, offered: Sequence[set[str]]) -> None:
    """Raise FitError if only some of the adapters are given: they cannot be removed exactly one by one."""
    named = [one for one in receipt.adapters if set(one.files.values()) in offered]
    others = [one for one in receipt.adapters if one not in named]
    if named and others:
        which = {number for number, one in enumerate(receipt.adapters) if one in named}
        parts = [{part.adapter for part in parts} for shard in receipt.shards for _, parts in shard.tensors]
        shared, touched = (
            sum(bool(here & which and here - which) for here in parts),
            sum(bool(p & which) for p in parts),
        )
        names, rest = (" and ".join(one.name for one in some) for some in (named, others))
        by_module = [
            f"--weight={one.name}:{pattern}={weight}" for one in others for pattern, weight in one.module_weights
        ]
        rest_again = (argument(f"{one.name}:{one.weight}") for one in others)
        again = command(["adapterkit", "merge", "OUT", *rest_again, *by_module])
        raise FitError(
            f"{names}: merged together with {rest}; {shared} of {touched} tensors were rounded after adding both, so "
            "that only removing all is exact",
            hint=f"give all or none in `adapters`, then merge the rest again: {again}",
        )


def opened(path: Path) -> Adapter:
    """Load an adapter whose scalings are in a receipt, so that it needs no config."""
    try:
        return load(path)
    except UsageError:
        return load(path, scaling=1.0)


def hashes_of(adapter: Adapter) -> set[str]:
    """The SHA-256 of an adapter's files."""
    return {_sha256(file, stamp) for file, stamp in stamps_of(adapter.files).items()}


@cache
def _sha256(file: Path, _: Stamp) -> str:
    """The SHA-256 of a file, cached until its stamp changes."""
    return sha256_of(file)


def _by_name(name: str, near: Path) -> Iterator[Adapter]:
    """Yield candidates for the adapter of that label, with and without its number."""
    names = dict.fromkeys((name, re.sub(r" #\d+$", "", name)))
    plain = [last for one in names if (last := one.rpartition("/")[2]) not in ("", ".", "..")]
    places = [folder / one for one in plain for folder in (near.absolute().parent, Path.cwd())]
    for place in dict.fromkeys(places):
        if os.path.exists(place):  # Path.exists raises for names that are too long
            try:
                yield opened(place)
            except AdapterkitError:
                continue
    for one in filter(is_hub_id, names):
        yield opened(resolve(one))
