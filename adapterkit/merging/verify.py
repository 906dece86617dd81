"""Verify that a checkpoint is exactly a base plus some adapters, by repeating the merge a few rows at a time.

A tensor passes if some tool's arithmetic gives it: in float32 or in 16 bits, from the base and the factors as stored or
as read in another dtype (`Reading`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.algebra.tolerance import Rows, Tolerance
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizationSpec, QuantizedWeight
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.row_reader import reader
from adapterkit.base.tied_embeddings import find_tie
from adapterkit.errors import FitError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, TensorInfo, Weight
from adapterkit.files.stamps import check_unchanged
from adapterkit.merging.blocks.as_trained import trained_rows
from adapterkit.merging.blocks.block import merge_rows, replayed
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.loading import Loaded, load_merge
from adapterkit.merging.plan.edits import MergeEdit
from adapterkit.merging.plan.types import MergePlan
from adapterkit.merging.verdict import (
    DAMAGE_LIMIT,
    DAMAGED,
    DIFFERENT,
    EXACT,
    QUANTIZED,
    Sums,
    Verdict,
    classify,
)
from adapterkit.text import counted

BLOCK_ELEMENTS = 1 << 20


def verify(
    plan: MergePlan,
    merged: Checkpoint,
    *,
    share: float = 1.0,
    threads: int = 1,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Verdict]:
    """Compare `merged` with the output of `plan`, tensor by tensor, without running it.

    Args:
        plan: a merge of the base and the adapters.
        merged: the checkpoint to verify.
        share: the share of rows to check, from the middle of each block.
        threads: number of workers.
        on_tensor: called with the numbers of checked tensors and of all.

    Raises FitError if tensor names or shapes differ, and ChangedError if a file changed meanwhile.
    """
    after, before = _with_heads(plan, merged)
    edits = {
        edit.name: (edit, file.source) for file in plan.files for edit in file.edits if isinstance(edit, MergeEdit)
    }
    modified = {name: pair for name, pair in edits.items() if pair[0].changes}
    _check_names(plan, merged, before, after, modified)
    names = dict.fromkeys((*before, *modified))
    tie = find_tie(plan.base)
    if tie is not None and tie.implied and tie.head not in names and tie.head in merged.tensors:
        names, before[tie.head] = {tie.head: None, **names}, after[tie.embedding]  # some tools store the tied head

    def check(name: str) -> Verdict:
        if name in modified:
            return _check_modified(plan, *modified[name], after[name], share)
        edit = edits[name][0] if name in edits else None
        return _check_unmodified(name, before[name], after[name], share, edit.as_trained if edit else None)

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for done, verdict in enumerate(pool.map(check, names), 1):
            on_tensor(done, len(names))
            yield verdict
    check_unchanged({**plan.stamps, **merged.stamps})


def _with_heads(plan: MergePlan, merged: Checkpoint) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """The tensors of checkpoint and base, each with its tied head even if that is not stored.

    The base's head is added only if the merge unties it. The checkpoint's is added only if its own config ties it:
    otherwise transformers would initialize a random head.
    """
    after: dict[str, Weight] = {**weights_in(merged.tensors, merged.config)}
    before: dict[str, Weight] = {**weights_in(plan.base.tensors, plan.base.config)}
    tie, now = find_tie(plan.base), find_tie(replace(merged, config=merged.config or plan.base.config))
    if tie is not None and tie.implied and tie.head in plan.weight_map:
        before[tie.head] = before[tie.embedding]
    if now is not None and now.implied and (now.head in before or (tie is not None and now.head == tie.head)):
        after[now.head] = after[now.embedding]
    return after, before


def _check_names(
    plan: MergePlan,
    merged: Checkpoint,
    before: Mapping[str, Weight],
    after: Mapping[str, Weight],
    modified: Mapping[str, object],
) -> None:
    """Raise FitError for a checkpoint of another model; a tied head may be stored or not."""
    tie = find_tie(plan.base)
    tied = {tie.head} if tie is not None and tie.certain else set()
    implied = [tie.head] if tie is not None and tie.implied else []
    missing = [name for name in dict.fromkeys((*before, *modified, *implied)) if name not in after]
    extra = [name for name in after if name not in before and name not in modified and name not in tied]
    if missing or extra:
        name, problem = (missing[0], "missing from") if missing else (extra[0], "unexpected in")
        raise FitError(
            f"{name}: {problem} {merged.path} ({counted(len(missing) + len(extra), 'tensor')} differ)",
            hint=f"is {plan.base.path} its base?",
        )
    for name, weight in before.items():
        expected = plan.resized.get(name, weight.shape)
        if name in after and after[name].shape != expected:
            where = "with the adapter's tokens" if name in plan.resized else "in the base"
            raise FitError(f"{name}: shape {expected} {where}, {after[name].shape} in {merged.path}")


# --- tensors that adapters modify ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reading:
    """The dtypes in which a tool read the base and the factors, None if as stored, and to which it rounded W'."""

    base: torch.dtype | None
    factors: torch.dtype | None
    result: torch.dtype

    @property
    def as_stored(self) -> bool:
        return self.base is self.factors is None

    def __str__(self) -> str:
        inputs = [name for name, dtype in (("base", self.base), ("factors", self.factors)) if dtype]
        return f"{' and '.join([*inputs, 'result'])} rounded to {str(self.result).removeprefix('torch.')}"


def _readings(edit: MergeEdit, after: torch.dtype) -> Iterator[Reading]:
    """The readings by which a tensor of dtype `after` may be correct, the likeliest first."""
    stored = set() if edit.source is None else {_torch(edit.source.dtype)}
    # The gains by column of a transposed DoRA are measured with the factors as stored.
    fixed = any(delta.target.transposed and delta.weights.magnitude is not None for delta in edit.deltas)
    for result in dict.fromkeys((after, torch.bfloat16, torch.float16)):
        base, factors = (
            result if any(torch.promote_types(dtype, result) != result for dtype in dtypes) else None
            for dtypes in (stored, set() if fixed else _factor_dtypes(edit))
        )
        for pair in dict.fromkeys([(None, None), (base, None), (base, factors)]):
            yield Reading(*pair, result)


def _factor_dtypes(edit: MergeEdit) -> set[torch.dtype]:
    return {_torch(factor.dtype) for delta in edit.deltas for factor in (delta.weights.A, delta.weights.B)}


def _torch(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype


class _Repeated:
    """The merge of one tensor repeated: as adapterkit rounds it, in float64, and in float64 for each adapter alone."""

    def __init__(self, plan: MergePlan, edit: MergeEdit, after: Weight, fd: int) -> None:
        self.edit = replace(edit, dtype=after.dtype, packing=None, checked_against=None)
        wide = replace(self.edit, dtype="F64")
        alone = [_part_of(wide, number, given) for number, given in enumerate(plan.adapters)]
        self.labels = [given.label for given, part in zip(plan.adapters, alone, strict=True) if part is not None]
        self.rounded, self.exact = load_merge(self.edit, fd), load_merge(wide, fd)
        self.alone = [load_merge(part, fd) for part in alone if part is not None]
        self.read, self.buffers = reader(after, edit.matrix[1]), Buffers()

    def compared(self, reading: Reading, share: float) -> Sums | None:
        """The comparison with the rows found; None if they are not rounded as this reading says."""
        exact, *alone = (
            one
            if reading.factors is None
            else replace(one, updates=[update.read_as(reading.factors) for update in one.updates])
            for one in (self.exact, *(self.alone if len(self.alone) > 1 else ()))
        )
        stored = {reading.factors} if reading.factors else _factor_dtypes(self.edit)
        tolerance = Tolerance(exact.updates, reading.result, stored, _torch(self.edit.dtype))
        sums = Sums(len(self.alone))
        for first, last in _shares(self.edit.spans(_block_rows(self.edit.matrix[1])), share):
            written = self.read(first, last)
            found = written.to(reading.result)
            if not torch.equal(found.to(written.dtype), written) and bool(written.isfinite().all()):
                return None
            if (
                reading.as_stored
                and found.dtype == written.dtype
                and torch.equal(_merged(self.rounded, first, last, self.buffers), written)
            ):
                sums.checked += found.numel()  # a tenth of the cost of the float64 check
                sums.telling += found.numel() if tolerance.coarser else 0
                continue
            before, merged = replayed(exact, first, last, self.buffers, reading.base)
            pairs = [replayed(part, first, last, self.buffers, reading.base) for part in alone]
            deltas = [with_part - without for without, with_part in pairs] or [merged - before]
            sums.add(Rows(first, before, merged, deltas), found, tolerance)
        return sums


def _check_modified(plan: MergePlan, edit: MergeEdit, source: Path, after: Weight, share: float) -> Verdict:
    """Compare a tensor with a repeated merge, and classify any difference from its best reading."""
    with open_regular(source) as stream:
        repeated = _Repeated(plan, edit, after, stream.fileno())
        first, *others = _readings(edit, _torch(after.dtype))
        best, how = repeated.compared(first, share), ""
        assert best is not None  # `after` is the dtype of its result
        for reading in others:
            if best.mismatched and (sums := repeated.compared(reading, share)) and sums.mismatched < best.mismatched:
                best, how = sums, str(reading)
    return classify(edit.name, best, how, repeated.labels, after, plan.adapters)


def _merged(loaded: Loaded[MergeEdit], first: int, last: int, buffers: Buffers) -> torch.Tensor:
    """Merged rows as `run` writes them; values beyond the dtype's range are compared, not refused."""
    dtype, columns = _torch(loaded.edit.dtype), loaded.edit.matrix[1]
    into = bytearray((last - first) * columns * dtype.itemsize)
    with suppress(FitError):
        merge_rows(loaded, first, last, buffers, memoryview(into))
    return torch.frombuffer(into, dtype=dtype).view(-1, columns)


def _part_of(edit: MergeEdit, number: int, given: WeightedAdapter) -> MergeEdit | None:
    """The part of an edit that one adapter contributes, or None."""
    own = tuple(delta for delta in edit.deltas if delta.adapter == number)
    replaced = tuple(
        change for change in edit.replaced if any(change.values is v for v in given.adapter.replaced.values())
    )
    tokens = tuple(c for c in edit.replaced if any(c.values is v for _, v in given.adapter.tokens.values()))
    biases = {id(weights.bias) for weights in given.adapter.modules.values() if weights.bias is not None}
    added = tuple(addition for addition in edit.added if id(addition.vector) in biases)
    if not (own or replaced or tokens or added):
        return None
    return replace(edit, deltas=own, replaced=(*replaced, *tokens), added=added)


# --- the others ------------------------------------------------------------------------------------------------------


def _check_unmodified(
    name: str, before: Weight, after: Weight, share: float, as_trained: QuantizationSpec | None
) -> Verdict:
    """Compare a tensor that no adapter modifies with the base's, converted if the dtype differs.

    A shortened one has the base's first rows, and an extended bias has zeros after them.
    """
    columns = before.shape[-1] if len(before.shape) > 1 and before.shape[1:] == after.shape[1:] else 1
    rows, kept = (prod(weight.shape) // max(1, columns) for weight in (after, before))
    if before.dtype not in FLOAT_DTYPES:
        assert isinstance(before, TensorInfo) and isinstance(after, TensorInfo)
        same = before.read_bytes() == after.read_bytes()
        return Verdict(name, EXACT if same else DIFFERENT, False, prod(before.shape), 0 if same else 1)
    old, new = reader(before, columns), reader(after, columns)
    if as_trained is not None and isinstance(before, TensorInfo):
        old = trained_rows(before, (rows, columns), as_trained)
    dtype = _torch(after.dtype)
    checked = mismatched = 0
    first_mismatch = ""
    spans = ((first, min(rows, first + step)) for step in [_block_rows(columns)] for first in range(0, rows, step))
    for first, last in _shares(spans, share):
        found = new(first, last)
        expected = torch.zeros_like(found)
        if first < kept:
            expected[: kept - first] = old(first, min(last, kept)).to(dtype)
        differ = (expected != found) & ~(expected.isnan() & found.isnan())
        if not mismatched and bool(differ.any()):
            i, j = differ.nonzero()[0].tolist()
            first_mismatch = f"[{first + i}, {j}] is {float(found[i, j]):.6g}, in the base {float(expected[i, j]):.6g}"
        mismatched += int(differ.sum())
        checked += found.numel()
    kind = EXACT if not mismatched else DAMAGED if mismatched <= DAMAGE_LIMIT * checked else DIFFERENT
    if mismatched and isinstance(after, QuantizedWeight) and not isinstance(before, QuantizedWeight):
        kind = QUANTIZED
    return Verdict(name, kind, False, checked, mismatched, (), first_mismatch, first_mismatch)


def _block_rows(columns: int) -> int:
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def _shares(blocks: Iterable[tuple[int, int]], share: float) -> Iterator[tuple[int, int]]:
    """The given share of rows from the middle of each block."""
    for first, last in blocks:
        take = max(1, round((last - first) * share))
        start = first + (last - first - take) // 2
        yield start, start + take
