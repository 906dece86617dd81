"""Undo a merge: by its receipt, by copying the base, or approximately by subtraction.

With a receipt the plan reverses the merge: the receipt has the header of the base's file, unchanged tensors are copied,
changed ones restored row by row from the sidecar, and the result must have the base's SHA-256.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import Adapter
from adapterkit.base.checkpoint import CONFIG, Checkpoint
from adapterkit.base.quant import QuantizedWeight, weights
from adapterkit.base.vocabulary import first_rows, rows_of
from adapterkit.errors import FitError, FormatError, UsageError
from adapterkit.files.jsonfile import read_json
from adapterkit.files.safetensors import Header, TensorInfo, read_header
from adapterkit.files.staging import BEFORE, RECEIPT
from adapterkit.merging.companions import (
    copied_files,
    copy_companions,
    replaced_files,
    restore_replaced,
    save_replaced,
    saved_files,
)
from adapterkit.merging.plan.edits import ModuleUpdate, Recorded, RestoreEdit
from adapterkit.merging.plan.layout import Entry, lay_out
from adapterkit.merging.plan.planner import make_plan
from adapterkit.merging.plan.types import Copy, FilePlan, Hashes, MergePlan, SidecarCopy
from adapterkit.merging.receipts.receipt import HOLDS, Companions, ModuleShare, Receipt, Shard
from adapterkit.merging.receipts.sidecar import base_header, dropped_name, recorded_rows
from adapterkit.merging.run.budget import default_threads
from adapterkit.text import counted

APPROXIMATE = (
    "approximate: the adapters were subtracted. Weights can differ from the base's by one unit in the last place of "
    "the merged value (bf16 0.8% of it, fp16 0.1%); the larger the update, the more of them differ"
)

# --- the plan --------------------------------------------------------------------------------------------------------


def plan_undo(merged: Checkpoint, receipt: Receipt, adapters: Sequence[Adapter], out: Path) -> MergePlan:
    """Plan to restore the base of `merged`. Raises FitError or FormatError if receipt and files disagree."""
    if receipt.irreversible is not None:
        raise FitError(f"{merged.path}: cannot be undone: {receipt.irreversible}", hint="`base` restores it")
    merged = _with_shards(merged, receipt)
    given = tuple(one.weighting(adapter) for adapter, one in zip(adapters, receipt.adapters, strict=True))
    parts = [_open_shard(shard, header, receipt) for shard, header in zip(receipt.shards, merged.shards, strict=True)]
    found = {name: info for part in parts for name, info in part.tensors.items()}
    config = receipt.folder / BEFORE / CONFIG
    as_before = weights(found, read_json(config) if config.is_file() else {})
    quantized = {name: weight for name, weight in as_before.items() if isinstance(weight, QuantizedWeight)}
    files = [_file(part, quantized, given) for part in parts]
    weight_map = {name: file.name for file in files for name in file.tensors}
    beside = not merged.is_directory and (receipt.folder / BEFORE / RECEIPT).is_file()
    with_companions = merged.is_directory or beside
    unchecked = (*copied_files(merged), *saved_files(receipt.folder / BEFORE)) if with_companions else ()
    return MergePlan(
        merged, out, given, tuple(files), {}, weight_map, {}, notes=tuple(_not_restored(receipt.companions, merged)),
        restores=True, restores_receipt=beside,
        unchecked=() if receipt.companions else unchecked, write_companions=partial(finish_unmerge, receipt),
    )  # fmt: skip


def _not_restored(companions: Companions | None, source: Checkpoint) -> Iterator[str]:
    """Notes on companions of the base that are not restored, and of `source` that are not copied."""
    left_out = {str(file) for file in source.other_files()[1]}
    if companions is not None:
        yield from (
            f"{name}: not restored: the merge left it out" for name in companions.left_out if name not in left_out
        )
        known = {*companions.copied, *companions.replaced, *companions.added}
        extra = (name for name in copied_files(source) if name not in known)
        yield from (f"{name}: not copied: the receipt does not list it" for name in extra)
    yield from source.notes()


def plan_copy(base: Checkpoint, receipt: Receipt | None, out: Path) -> MergePlan:
    """Plan a copy of the base, checked against the receipt if there is one."""
    files = tuple(
        lay_out(header, [Entry(info.name, info, info.dtype, info.shape) for info in header.tensors.values()])
        for header in base.shards
    )
    notes = tuple(_not_restored(receipt.companions if receipt else None, base))
    unchecked = (*copied_files(base), *replaced_files(base)) if receipt and not receipt.companions else ()
    return MergePlan(
        base, out, (), files, base.config, {}, {}, notes=notes, restores=True, unchecked=unchecked,
        write_companions=partial(finish_copy, receipt),
    )  # fmt: skip


def plan_subtraction(merged: Checkpoint, given: Sequence[WeightedAdapter], out: Path) -> MergePlan:
    """Plan to subtract adapters from `merged`. Raises FitError for adapters that subtraction cannot undo."""
    for one in given:
        dora = any(weights.magnitude is not None for weights in one.adapter.modules.values())
        if dora or one.adapter.replaced or one.adapter.tokens:
            effect = "rescales the base's rows (DoRA)" if dora else "replaces tensors of the base"
            raise FitError(
                f"{one.label}: {effect}, so subtraction cannot undo it", hint="use the merge's receipt, or `base`"
            )
    plan = make_plan(merged, [one.times(-1.0) for one in given], out)
    return replace(plan, undoable=False, notes=(*plan.notes, APPROXIMATE))


def _with_shards(merged: Checkpoint, receipt: Receipt) -> Checkpoint:
    """`merged` with a header for each shard of the receipt; its index has no entry for a file without tensors."""
    known, names = {header.file.name: header for header in merged.shards}, [shard.name for shard in receipt.shards]
    if not merged.is_directory:
        known, names = dict(zip(names, merged.shards, strict=False)), names[:1]
    weights_only = not merged.is_directory or all(name.endswith(".safetensors") for name in names)
    if len(names) != len(receipt.shards) or not known.keys() <= set(names) or not weights_only:
        raise FitError(f"{merged.path}: holds {', '.join(known)}, but its receipt lists {', '.join(names)}")
    return replace(merged, shards=tuple(known.get(name) or read_header(merged.path / name) for name in names))


@dataclass(frozen=True)
class _OpenShard:
    """One merged file: its receipt, the headers of base, merged file and sidecar, and the base's tensors.

    `tensors` that the merged file lacks lie in the sidecar; those that it shortens end where `last_rows` begin.
    """

    shard: Shard
    raw: bytes  # the base's header
    before: Header
    after: Header
    sidecar: Header
    tensors: dict[str, TensorInfo]
    last_rows: tuple[SidecarCopy, ...]


def _open_shard(shard: Shard, after: Header, receipt: Receipt) -> _OpenShard:
    sidecar = read_header(receipt.sidecar(shard))
    raw, before = base_header(sidecar, after.file, shard.size)
    tensors, last_rows = {}, []
    for number, info in enumerate(before.tensors.values()):
        stored = sidecar.tensors.get(dropped_name(number))
        if stored is None:
            tensors[info.name] = info
        elif (stored.dtype, stored.shape) == (info.dtype, info.shape):
            tensors[info.name] = replace(stored, name=info.name)
        elif (kept := _without(info, stored)) is not None:
            tensors[info.name] = kept
            last_rows.append(SidecarCopy(stored, kept.stop))
        else:
            raise FormatError(
                f"{sidecar.file}: {stored.name} is {stored.dtype} {stored.shape}, "
                f"expected {info.dtype} {info.shape} for {info.name}, or its last rows"
            )
    return _OpenShard(shard, raw, before, after, sidecar, tensors, tuple(last_rows))


def _without(info: TensorInfo, last: TensorInfo) -> TensorInfo | None:
    """The rows of a tensor before its `last` ones; None if those are not rows of it."""
    rows = rows_of(info.shape) - (last.shape[0] if last.shape else 0)
    kept = first_rows(info, max(0, rows))
    fits = rows > 0 and (last.dtype, last.shape[1:]) == (info.dtype, kept.shape[1:])
    return kept if fits and kept.nbytes + last.nbytes == info.nbytes else None


def _file(opened: _OpenShard, quantized: Mapping[str, QuantizedWeight], given: Sequence[WeightedAdapter]) -> FilePlan:
    """Plan one file of the base."""
    after, before = opened.after, opened.before
    changed = {name: (number, parts) for number, (name, parts) in enumerate(opened.shard.tensors)}
    blocks = recorded_rows(opened.sidecar)
    copies, edits, from_sidecar = [], [], list(opened.last_rows)
    for whole in sorted(before.tensors.values(), key=lambda info: (info.start, info.stop)):
        info, now = opened.tensors[whole.name], after.tensors.get(whole.name)
        if not info.nbytes:
            continue
        if info.file == opened.sidecar.file:
            from_sidecar.append(SidecarCopy(info, whole.start))
            continue
        weight: TensorInfo | QuantizedWeight = quantized.get(info.name, info)
        if now is not None and now.shape != weight.shape:  # a merge added or removed rows
            now = first_rows(now, rows_of(weight.shape))
            weight = first_rows(weight, rows_of(weight.shape)) if isinstance(weight, TensorInfo) else weight
        if info.name in changed:
            fits = now is not None and weight.dtype in HOLDS.get(now.dtype, ())
        else:
            fits = now is not None and now.dtype == info.dtype and isinstance(weight, TensorInfo)
        if now is None or now.shape != weight.shape or not fits:
            found = "is missing" if now is None else f"is {now.dtype} {now.shape}"
            raise FitError(
                f"{after.file}: {info.name} {found}, which the receipt cannot restore to {weight.dtype} {weight.shape}"
            )
        if info.name not in changed:
            copies.append(Copy(now.start, now.stop, info.start))
            continue
        number, parts = changed[info.name]
        edit = RestoreEdit(
            info.name, now, weight.dtype, weight.shape, info.start, info.stop, _deltas(info, parts, given),
            quantized=quantized.get(info.name),
        )  # fmt: skip
        edits.append(replace(edit, recorded=_recorded(edit, blocks.get(number, []), opened.sidecar)))
    return FilePlan(
        opened.shard.name, after.file, opened.raw, before.size, tuple(before.tensors), tuple(copies), tuple(edits),
        tuple(from_sidecar),
    )  # fmt: skip


def _deltas(
    info: TensorInfo, parts: Sequence[ModuleShare], given: Sequence[WeightedAdapter]
) -> tuple[ModuleUpdate, ...]:
    deltas = []
    for part in parts:
        one = given[part.adapter]
        weights = one.adapter.modules.get(part.module)
        if weights is None:
            raise FitError(f"{info.name}: the receipt lists {part.module}, which is not in {one.label}")
        weights = replace(weights, scaling=part.scaling)
        deltas.append(
            ModuleUpdate(part.adapter, part.module, weights, part.weight, replace(part.target, tensor=info.name))
        )
    return tuple(deltas)


def _recorded(edit: RestoreEdit, blocks: Sequence[Recorded], sidecar: Header) -> tuple[Recorded, ...]:
    """Check that the blocks cover every row of a tensor and that its updates fit, and return them."""
    rows, columns = edit.matrix
    renormalizing = [delta for delta in edit.deltas if delta.weights.magnitude is not None]
    by_column = any(delta.target.transposed for delta in renormalizing)
    for delta in edit.deltas:
        target, weights = delta.target, delta.weights
        start, stop = target.rows or (0, rows)
        height, width = weights.out_features, weights.in_features
        if target.transposed:
            height, width = width, height
        first, last = target.delta_rows or (0, height)
        in_range = 0 <= start < stop <= rows and 0 <= first < last <= height
        has_expert = target.expert is None or target.expert < weights.experts
        oriented = weights.magnitude is None or target.transposed == by_column
        if not (in_range and has_expert and oriented and (last - first, width) == (stop - start, columns)):
            raise FormatError(
                f"{sidecar.file}: the recorded position of {delta.module} does not fit {edit.name} {edit.shape}"
            )
    at = 0
    bits = edit.quantized.bits if edit.quantized else 8
    for block in blocks:
        first, last, gains = block.first, block.last, block.gains
        if first != at or not first < last <= rows or first * columns * bits % 8:
            raise FormatError(
                f"{sidecar.file}: {block.residual.name}: expected rows from {at} of {rows} on, in whole bytes"
            )
        at = last
        shape = (len(renormalizing), columns if by_column else last - first)
        if gains is not None and (gains.dtype != "F64" or gains.shape != shape):
            raise FormatError(f"{sidecar.file}: {gains.name} is {gains.dtype} {gains.shape}, expected F64 {shape}")
    if at != rows:
        raise FormatError(f"{sidecar.file}: restores only {at} of {rows} rows of {edit.name}")
    return tuple(blocks)


def check_fits(merged: Checkpoint, base: Checkpoint, given: Sequence[WeightedAdapter]) -> None:
    """Raise FitError unless `merged` is exactly `base` plus these adapters."""
    if not given:
        raise UsageError(f"{merged.path}: no receipt lists the adapters in it", hint="give `adapters`")
    from adapterkit.merging.verify import verify

    plan = make_plan(base, given, Path("unused"))
    wrong = [one for one in verify(plan, merged, threads=default_threads()) if not one.fits]
    if wrong:
        raise FitError(
            f"{merged.path}: not {base.name} plus these adapters: {counted(len(wrong), 'tensor')} differ "
            f"(first: {wrong[0].name}, {wrong[0].kind}: {wrong[0].explanation})"
        )


# --- companions ------------------------------------------------------------------------------------------------------


def finish_unmerge(receipt: Receipt, plan: MergePlan, folder: Path, hashes: Hashes) -> None:
    """Check every hash, and restore the base's companions. Raises FitError if one differs."""
    merged = plan.base
    for shard, header in zip(receipt.shards, merged.shards, strict=True):
        found = hashes.base[header.file.name]
        if found != shard.after:
            raise FitError(
                f"{header.file}: has changed since the merge: SHA-256 is {found}, expected {shard.after}",
                hint="`approximate=True` subtracts the adapters anyway",
            )
    _check_restored(receipt, hashes)
    listed = receipt.companions
    restored = copy_companions(merged, folder, listed.copied if listed else None)
    if merged.is_directory or plan.restores_receipt:
        restored |= restore_replaced(receipt.folder, folder)
        _check_companions(listed, restored, merged.path, "has changed since the merge")


def finish_copy(receipt: Receipt | None, plan: MergePlan, folder: Path, hashes: Hashes) -> None:
    """Check the copied base against the receipt, if there is one, and copy its companions."""
    listed = receipt.companions if receipt is not None else None
    if receipt is not None:
        _check_restored(receipt, hashes)
    if plan.base.is_directory:
        copied = copy_companions(plan.base, folder, listed.copied | listed.replaced if listed else None)
        copied |= save_replaced(plan.base, folder)
        _check_companions(listed, copied, plan.base.path, "not the base of this merge")


def _check_companions(listed: Companions | None, found: Mapping[str, str], source: Path, problem: str) -> None:
    """Raise FitError unless the companions are exactly those that the receipt lists."""
    expected = listed.copied | listed.replaced if listed else found
    for name in dict.fromkeys((*expected, *found)):
        if found.get(name) != expected.get(name):
            has = f"SHA-256 of {name} is {found[name]}" if name in found else f"{name} is missing"
            wanted = f"expected {expected[name]}" if name in expected else "but the receipt does not list it"
            raise FitError(f"{source}: {problem}: {has}, {wanted}")


def _check_restored(receipt: Receipt, hashes: Hashes) -> None:
    """Raise FitError unless every shard has the base's SHA-256."""
    for shard, found in zip(receipt.shards, hashes.outputs.values(), strict=True):
        if found != shard.before:
            raise FitError(f"{shard.name}: the restored SHA-256 is {found}, expected {shard.before}")
