"""Undoing a merge by its receipt: the adapters it names found by hash, a plan made, and the base's hashes checked.

The plan is a merge's the other way round: from the merged file to the base's, whose header the receipt has. Tensors
that were not changed are copied, the others restored row by row as they were recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapterkit.adapter.weights import Adapter, WeightedAdapter
from adapterkit.base.checkpoint import CONFIG, Checkpoint
from adapterkit.base.quant import QuantizedWeight, weights
from adapterkit.errors import FitError, FormatError, UsageError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.safetensors import Header, TensorInfo, Weight, read_header
from adapterkit.files.staging import BEFORE, RECEIPT
from adapterkit.merging.companions import copy_others, keep_replaced, kept_before, others, replaced_in, restore_replaced
from adapterkit.merging.plan.edits import ModuleUpdate, Recorded, RestoreEdit
from adapterkit.merging.plan.layout import Entry, lay_out
from adapterkit.merging.plan.planner import make_plan
from adapterkit.merging.plan.types import BytesFromSidecar, Copy, FilePlan, Hashes, MergePlan
from adapterkit.merging.receipts.receipt import HOLDS, Companions, ModuleShare, Receipt, Shard
from adapterkit.merging.receipts.sidecar import base_header, kept, recorded
from adapterkit.merging.run.budget import default_threads

APPROXIMATE = (
    "approximate: the adapters were subtracted. A weight can differ from the base's by a unit in the last place of "
    "what it was merged to (bf16 0.8% of that, fp16 0.1%), the more of them the larger the update was"
)

# --- the plan --------------------------------------------------------------------------------------------------------


def plan_undo(merged: Checkpoint, receipt: Receipt, adapters: Sequence[Adapter], out: Path) -> MergePlan:
    """Plan the base that `merged` was made of. Raises FitError and FormatError where receipt and files disagree."""
    if receipt.irreversible is not None:
        raise FitError(f"{merged.path}: cannot be undone, since {receipt.irreversible}", hint="`base` restores it")
    merged = _with_shards(merged, receipt)
    given = tuple(
        WeightedAdapter(adapter, one.weight, one.name) for adapter, one in zip(adapters, receipt.adapters, strict=True)
    )
    parts = [_open_shard(shard, header, receipt) for shard, header in zip(receipt.shards, merged.shards, strict=True)]
    found = {name: info for part in parts for name, info in part.tensors.items()}
    config = receipt.folder / BEFORE / CONFIG
    as_before = weights(found, read_json(config) if config.is_file() else {})
    quantized = {name: weight for name, weight in as_before.items() if isinstance(weight, QuantizedWeight)}
    files = [_file(part, quantized, given) for part in parts]
    weight_map = {name: file.name for file in files for name in file.tensors}
    beside = not merged.is_directory and (receipt.folder / BEFORE / RECEIPT).is_file()
    with_companions = merged.is_directory or beside
    unchecked = (*others(merged), *kept_before(receipt.folder / BEFORE)) if with_companions else ()
    return MergePlan(
        merged, out, given, tuple(files), {}, weight_map, {}, notes=tuple(_not_restored(receipt.companions, merged)),
        restores=True, restores_receipt=beside,
        unchecked=() if receipt.companions else unchecked, write_companions=partial(finish_unmerge, receipt),
    )  # fmt: skip


def _not_restored(told: Companions | None, source: Checkpoint) -> Iterator[str]:
    """What of the base is not restored, and what of `source` is not copied."""
    left_out = {str(file) for file in source.other_files()[1]}
    if told is not None:
        yield from (
            f"{name}: not restored, since the merge left it out" for name in told.left_out if name not in left_out
        )
        extra = (name for name in others(source) if name not in told.copied)
        yield from (f"{name}: not copied: the receipt does not name it" for name in extra)
    yield from source.notes()


def plan_copy(base: Checkpoint, receipt: Receipt | None, out: Path) -> MergePlan:
    """Plan a copy of the base that a merge was made of, checked to be the one in the receipt, if there is one."""
    files = tuple(
        lay_out(header, [Entry(info.name, info, info.dtype, info.shape) for info in header.tensors.values()])
        for header in base.shards
    )
    notes = tuple(_not_restored(receipt.companions if receipt else None, base))
    unchecked = (*others(base), *replaced_in(base)) if receipt and not receipt.companions else ()
    return MergePlan(
        base, out, (), files, base.config, {}, {}, notes=notes, restores=True, unchecked=unchecked,
        write_companions=partial(finish_copy, receipt),
    )  # fmt: skip


def plan_subtraction(merged: Checkpoint, given: Sequence[WeightedAdapter], out: Path) -> MergePlan:
    """Plan to subtract adapters from whatever `merged` is. Raises FitError for what can only be undone by a receipt."""
    for one in given:
        dora = any(weights.magnitude is not None for weights in one.adapter.modules.values())
        if dora or one.adapter.replaced or one.adapter.tokens:
            what = "rescales the base's rows (DoRA)" if dora else "has replaced tensors of the base"
            raise FitError(f"{one.label}: {what}, which no subtraction undoes: only a receipt or the `base` does")
    plan = make_plan(merged, [replace(one, weight=-one.weight) for one in given], out)
    return replace(plan, undoable=False, notes=(*plan.notes, APPROXIMATE))


def _with_shards(merged: Checkpoint, receipt: Receipt) -> Checkpoint:
    """With a header for each shard of the receipt: the index leaves out files that hold no tensor any more."""
    known, told = {header.file.name: header for header in merged.shards}, [shard.name for shard in receipt.shards]
    if not merged.is_directory:
        known, told = dict(zip(told, merged.shards, strict=False)), told[:1]
    named = not merged.is_directory or all(name.endswith(".safetensors") for name in told)
    if len(told) != len(receipt.shards) or not known.keys() <= set(told) or not named:
        raise FitError(f"{merged.path}: has {', '.join(known)}; its receipt tells of {', '.join(told)}")
    return replace(merged, shards=tuple(known.get(name) or read_header(merged.path / name) for name in told))


@dataclass(frozen=True)
class _Shard:
    """One file of a merge that is undone: its receipt, the header it had, the one it has, and its sidecar's.

    `tensors` are those of the base; what the merged file has not lies in the sidecar.
    """

    told: Shard
    raw: bytes
    before: Header
    after: Header
    sidecar: Header
    tensors: dict[str, TensorInfo]


def _open_shard(told: Shard, after: Header, receipt: Receipt) -> _Shard:
    sidecar = read_header(receipt.sidecar(told))
    raw, before = base_header(sidecar, after.file, told.size)
    tensors = {}
    for number, info in enumerate(before.tensors.values()):
        there = sidecar.tensors.get(kept(number))
        if there is not None and (there.dtype, there.shape) != (info.dtype, info.shape):
            raise FormatError(f"{sidecar.file}: {there.name} is {there.dtype} {there.shape}, not {info.name}")
        tensors[info.name] = info if there is None else replace(there, name=info.name)
    return _Shard(told, raw, before, after, sidecar, tensors)


def _file(shard: _Shard, quantized: Mapping[str, QuantizedWeight], given: Sequence[WeightedAdapter]) -> FilePlan:
    """One file of the base, from the merged one."""
    told, after, before = shard.told, shard.after, shard.before
    changed = {name: (number, parts) for number, (name, parts) in enumerate(told.tensors)}
    blocks = recorded(shard.sidecar)
    copies, edits, others = [], [], []
    for info in sorted(before.tensors.values(), key=lambda info: (info.start, info.stop)):
        there, now = shard.tensors[info.name], after.tensors.get(info.name)
        if not info.nbytes:
            continue
        if there.file == shard.sidecar.file:
            others.append(BytesFromSidecar(there, info.start))
            continue
        weight: Weight = quantized.get(info.name, info)
        if info.name in changed:
            fits = now is not None and weight.dtype in HOLDS.get(now.dtype, ())
        else:
            fits = now is not None and now.dtype == info.dtype and weight is info
        if now is None or now.shape != weight.shape or not fits:
            raise FitError(f"{after.file}: {info.name} is not what the receipt tells of")
        if info.name not in changed:
            copies.append(Copy(now.start, now.stop, info.start))
            continue
        number, parts = changed[info.name]
        edit = RestoreEdit(
            info.name, now, weight.dtype, weight.shape, info.start, info.stop, _deltas(info, parts, given),
            quantized=quantized.get(info.name),
        )  # fmt: skip
        edits.append(replace(edit, recorded=_recorded(edit, blocks.get(number, []), shard.sidecar)))
    return FilePlan(
        told.name, after.file, shard.raw, before.size, tuple(before.tensors), tuple(copies), tuple(edits), tuple(others)
    )


def _deltas(
    info: TensorInfo, parts: Sequence[ModuleShare], given: Sequence[WeightedAdapter]
) -> tuple[ModuleUpdate, ...]:
    deltas = []
    for part in parts:
        one = given[part.adapter]
        weights = one.adapter.modules.get(part.module)
        if weights is None:
            raise FitError(f"{info.name}: the receipt tells of {part.module}, which {one.label} does not have")
        weights = replace(weights, scaling=part.scaling)
        deltas.append(
            ModuleUpdate(part.adapter, part.module, weights, part.weight, replace(part.target, tensor=info.name))
        )
    return tuple(deltas)


def _recorded(edit: RestoreEdit, blocks: Sequence[Recorded], sidecar: Header) -> tuple[Recorded, ...]:
    """The blocks of a tensor, checked to be all of its rows, and its updates to fit them."""
    rows, columns = edit.matrix
    renormalizing = [delta for delta in edit.deltas if delta.weights.magnitude is not None]
    by_column = any(delta.target.transposed for delta in renormalizing)
    for delta in edit.deltas:
        target, weights = delta.target, delta.weights
        start, stop = target.rows or (0, rows)
        first, last = target.delta_rows or (0, weights.out_features)
        size = (weights.in_features, last - first) if target.transposed else (last - first, weights.in_features)
        inside = 0 <= start < stop <= rows and 0 <= first < last <= weights.out_features
        expert = target.expert is None or target.expert < weights.experts
        way = weights.magnitude is None or target.transposed == by_column
        if not (inside and expert and way and size == (stop - start, columns)):
            raise FormatError(f"{sidecar.file}: {delta.module} does not fit {edit.name} {edit.shape} as recorded")
    at = 0
    bits = edit.quantized.bits if edit.quantized else 8
    for block in blocks:
        first, last, gains = block.first, block.last, block.gains
        if first != at or not first < last <= rows or first * columns * bits % 8:
            raise FormatError(f"{sidecar.file}: {block.residual.name} does not go on where {at} of {rows} rows end")
        at = last
        shape = (len(renormalizing), columns if by_column else last - first)
        if gains is not None and (gains.dtype != "F64" or gains.shape != shape):
            raise FormatError(f"{sidecar.file}: {gains.name} is {gains.dtype} {gains.shape}, expected F64 {shape}")
    if at != rows:
        raise FormatError(f"{sidecar.file}: does not restore all {rows} rows of {edit.name}, but the first {at}")
    return tuple(blocks)


def check_fits(merged: Checkpoint, base: Checkpoint, given: Sequence[WeightedAdapter]) -> None:
    """Raise FitError unless `merged` is just `base` with just these adapters in it, as `verify` finds it."""
    if not given:
        raise UsageError(f"{merged.path}: has no receipt that says which adapters are in it: name them")
    from adapterkit.merging.verify import verify

    plan = make_plan(base, given, Path("never written"))
    wrong = [one for one in verify(plan, merged, threads=default_threads()) if not one.fits]
    if wrong:
        raise FitError(
            f"{merged.path}: is not {base.name} with these adapters: {len(wrong)} tensors differ; "
            f"{wrong[0].name} is {wrong[0].kind}: {wrong[0].explanation}"
        )


# --- the end ---------------------------------------------------------------------------------------------------------


def finish_unmerge(receipt: Receipt, plan: MergePlan, folder: Path, hashes: Hashes) -> None:
    """Check every hash, and put the base's other files back. Raises FitError where one differs."""
    merged = plan.base
    read = hashes.base
    for shard, header in zip(receipt.shards, merged.shards, strict=True):
        if read[header.file.name] != shard.after:
            raise FitError(
                f"{header.file}: has changed since it was merged: its SHA-256 is {read[header.file.name]}, the receipt "
                f"has {shard.after}",
                hint="`approximate=True` subtracts the adapters nevertheless",
            )
    _check_restored(receipt, hashes)
    told = receipt.companions
    found = copy_others(merged, folder, told.copied if told else None)
    if merged.is_directory or plan.restores_receipt:
        found |= restore_replaced(receipt.folder, folder)
        _check_companions(told, found, merged.path, "has changed since it was merged")


def finish_copy(receipt: Receipt | None, plan: MergePlan, folder: Path, hashes: Hashes) -> None:
    """Check that what was copied is what the receipt has as the base, if there is one, and copy the rest."""
    told = receipt.companions if receipt is not None else None
    if receipt is not None:
        _check_restored(receipt, hashes)
    if plan.base.is_directory:
        found = copy_others(plan.base, folder, told.copied if told else None) | keep_replaced(plan.base, folder)
        _check_companions(told, found, plan.base.path, "is not the base that was merged into")


def _check_companions(told: Companions | None, found: Mapping[str, str], source: Path, otherwise: str) -> None:
    """Raise FitError unless the files beside the weights are those of the base, byte for byte, and all of them."""
    expected = told.copied | told.replaced if told else found
    for name in dict.fromkeys((*expected, *found)):
        if found.get(name) != expected.get(name):
            has = f"is {found[name]}" if name in found else "is missing"
            wanted = f"the receipt has {expected[name]}" if name in expected else "the receipt does not name it"
            raise FitError(f"{source}: {otherwise}: {name} {has}, {wanted}")


def _check_restored(receipt: Receipt, hashes: Hashes) -> None:
    """Raise FitError unless every shard is the base's, byte for byte."""
    for shard, found in zip(receipt.shards, hashes.outputs.values(), strict=True):
        if found != shard.before:
            raise FitError(f"{shard.name}: comes out as {found}; what was merged into is {shard.before}")
