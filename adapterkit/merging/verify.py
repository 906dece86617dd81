"""Whether a checkpoint is just this base with just these adapters in it: merged again a few rows at a time, compared.

Where it is not, the change that is there is measured against the one that should be: `D = W' − W ≈ Σ λᵢ·Δᵢ` by least
squares, so that a merge applied twice, not at all, or by the wrong scaling is named as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from adapterkit.adapter.weights import WeightedAdapter
from adapterkit.algebra.rounding import round_once
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import QuantizedWeight
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.row_reader import reader
from adapterkit.base.ties import find_tie
from adapterkit.display import Displayed
from adapterkit.errors import FitError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, TensorInfo, Weight
from adapterkit.files.stamps import check_unchanged
from adapterkit.merging.blocks.block import merge_rows, replayed
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.loading import Loaded, load_merge
from adapterkit.merging.plan.edits import MergeEdit
from adapterkit.merging.plan.types import MergePlan

BLOCK_ELEMENTS = 1 << 20
FEW = 1e-3  # so small a share of the elements being off is damage, not another merge
NEAR = 0.02  # relative, for naming a scale that is off by a known factor
NOISE = 1.5  # times what two roundings leave, for a change to be explained by the adapters

# What a tensor is found to be, best first. The first two fit.
EXACT, ROUNDED, SCALED, MISSING, QUANTIZED, DAMAGED, DIFFERENT = VERDICTS = (
    "exact", "rounded", "scaled", "missing", "quantized", "damaged", "different",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Verdict(Displayed):
    """One tensor: what it is found to be, how many of the elements looked at are off, and by which scales it fits.

    `scales` are λ by adapter, where the tensor is touched by some; `first` describes the first element that is off.
    """

    name: str
    kind: str
    touched: bool
    checked: int
    off: int
    scales: tuple[tuple[str, float], ...] = ()
    first: str = ""
    explanation: str = ""

    def brief(self) -> str:
        return ", ".join(filter(None, (self.name, self.kind, self.explanation)))

    @property
    def fits(self) -> bool:
        return self.kind in (EXACT, ROUNDED)


def verify(
    plan: MergePlan,
    merged: Checkpoint,
    *,
    share: float = 1.0,
    threads: int = 1,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Verdict]:
    """Compare `merged` with what `plan` would write, tensor by tensor; with a `share`, some of the rows of each.

    `plan` is never run. `on_tensor` is called with how many tensors are done, of how many. Raises FitError where
    tensors of the one are not in the other, or have other shapes, and at the end ChangedError where a file changed
    meanwhile.
    """
    after, before = _with_heads(plan, merged)
    edits = {
        edit.name: (edit, file.source) for file in plan.files for edit in file.edits if isinstance(edit, MergeEdit)
    }
    touched = {name: pair for name, pair in edits.items() if pair[0].changes}
    _check_names(plan, merged, before, after, touched)
    names = dict.fromkeys((*before, *touched))
    tie = find_tie(plan.base)
    if tie is not None and tie.implied and tie.head not in names and tie.head in merged.tensors:
        names, before[tie.head] = {tie.head: None, **names}, after[tie.embedding]  # written out, as some tools do

    def compared(name: str) -> Verdict:
        if name in touched:
            return _touched(plan, *touched[name], after[name], share)
        return _untouched(name, before[name], after[name], share)

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for done, verdict in enumerate(pool.map(compared, names), 1):
            on_tensor(done, len(names))
            yield verdict
    check_unchanged({**plan.stamps, **merged.stamps})


def _with_heads(plan: MergePlan, merged: Checkpoint) -> tuple[dict[str, Weight], dict[str, Weight]]:
    """The tensors of the checkpoint and of the base, with the head that each has without storing it.

    The base's is the embedding before the merge only where the merge parts the two. In the checkpoint it is one only
    where its own config ties them: else transformers would make up a head.
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
    touched: Mapping[str, object],
) -> None:
    """Refuse a checkpoint of another model; a head that is the embedding may be left out, or written out."""
    tie = find_tie(plan.base)
    tied = {tie.head} if tie is not None and tie.certain else set()
    implied = [tie.head] if tie is not None and tie.implied else []
    lacking = [name for name in dict.fromkeys((*before, *touched, *implied)) if name not in after]
    extra = [name for name in after if name not in before and name not in touched and name not in tied]
    if lacking or extra:
        which, where = (lacking[0], "is not in") if lacking else (extra[0], "is only in")
        raise FitError(
            f"{which}: {where} {merged.path} ({len(lacking) + len(extra)} such tensors); was it made of "
            f"{plan.base.path}?"
        )
    for name, weight in before.items():
        if name in after and after[name].shape != weight.shape:
            raise FitError(f"{name}: is {weight.shape} in the base and {after[name].shape} in {merged.path}")


# --- tensors that adapters touch -------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What is added up over the elements of a tensor; by adapter where there are several."""

    count: int
    gram: torch.Tensor = field(init=False)  # Σ Δᵢ·Δⱼ
    toward: torch.Tensor = field(init=False)  # Σ D·Δᵢ
    change: float = 0.0  # Σ D²
    noise: float = 0.0  # Σ of what rounding may leave, squared
    checked: int = 0
    wrong: int = 0  # not the correctly rounded value
    off: int = 0  # and not within rounding either
    first: str = ""

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.toward = torch.zeros(self.count, dtype=torch.float64)

    def add(
        self, first: int, before: torch.Tensor, exact: torch.Tensor, deltas: list[torch.Tensor], found: torch.Tensor
    ) -> None:
        """Rows `first …`: the base, what it should be and the adapters' shares in float64, and what is there."""
        there = found.double()
        limit, fine = torch.finfo(found.dtype), exact.isfinite() & there.isfinite()
        wrong = (round_once(exact, found.dtype) != found) & ~(exact.isnan() & there.isnan())
        # Half a unit of the result, and a whole one of Δ for tools that round that on its own.
        unit = _unit(exact, limit) / 2 + _unit(exact - before, limit)
        off = wrong & ~((there - exact).abs() <= unit)
        change = torch.where(fine, there - before, 0.0)
        shares = torch.stack([torch.where(fine, delta, 0.0).flatten() for delta in deltas])
        self.gram += shares @ shares.T
        self.toward += shares @ change.flatten()
        self.change += float(change.square().sum())
        self.noise += float(torch.where(fine, _unit(there, limit) / 2, 0.0).square().sum())
        self.checked += found.numel()
        self.wrong += int(wrong.sum())
        if not self.off and bool(off.any()):
            i, j = off.nonzero()[0].tolist()
            self.first = f"[{first + i}, {j}] is {float(there[i, j]):.6g}, expected {float(exact[i, j]):.6g}"
        self.off += int(off.sum())


def _unit(values: torch.Tensor, limit: torch.finfo) -> torch.Tensor:
    """The unit in the last place of a dtype at each of `values`."""
    return torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=limit.tiny)))) * limit.eps


def _touched(plan: MergePlan, edit: MergeEdit, source: Path, after: Weight, share: float) -> Verdict:
    """Compare a tensor with its replay, and where they differ find out what is there instead."""
    plain = replace(edit, dtype=after.dtype, packing=None, checked_against=None)
    wide = replace(plain, dtype="F64")  # computed in float64
    alone = [_only(wide, number, one) for number, one in enumerate(plan.given)]
    held = [one.label for one, mine in zip(plan.given, alone, strict=True) if mine is not None]
    parts = [mine for mine in alone if mine is not None]
    rows, columns = edit.matrix
    read, sums, buffers = reader(after, columns), _Sums(len(parts)), Buffers()
    with open_regular(source) as stream:
        fd = stream.fileno()
        ours, whole, loaded = load_merge(plain, fd), load_merge(wide, fd), [load_merge(mine, fd) for mine in parts]
        for first, last in _spans(rows, columns, share):
            found = read(first, last)
            if torch.equal(_merged(ours, first, last, buffers), found):  # at a tenth of what follows
                sums.checked += found.numel()
                continue
            before, exact = replayed(whole, first, last, buffers)
            shares = [exact - before]
            if len(parts) > 1:
                pairs = [replayed(one, first, last, buffers) for one in loaded]
                shares = [after_it - before_it for before_it, after_it in pairs]
            sums.add(first, before, exact, shares, found)
    return _judge(edit.name, sums, held, after, plan.given)


def _merged(loaded: Loaded[MergeEdit], first: int, last: int, buffers: Buffers) -> torch.Tensor:
    """Rows as merging writes them; what is beyond the dtype is left to be compared."""
    dtype, columns = getattr(torch, TORCH_NAMES[loaded.edit.dtype]), loaded.edit.matrix[1]
    into = bytearray((last - first) * columns * dtype.itemsize)
    with suppress(FitError):
        merge_rows(loaded, first, last, buffers, memoryview(into))
    return torch.frombuffer(into, dtype=dtype).view(-1, columns)


def _only(edit: MergeEdit, number: int, one: WeightedAdapter) -> MergeEdit | None:
    """The part of an edit that comes from one adapter, or None where it has none."""
    own = tuple(delta for delta in edit.deltas if delta.adapter == number)
    replaced = tuple(
        change for change in edit.replaced if any(change.values is v for v in one.adapter.replaced.values())
    )
    tokens = tuple(c for c in edit.replaced if any(c.values is v for _, v in one.adapter.tokens.values()))
    biases = {id(weights.bias) for weights in one.adapter.modules.values() if weights.bias is not None}
    added = tuple(addition for addition in edit.added if id(addition.vector) in biases)
    if not (own or replaced or tokens or added):
        return None
    return replace(edit, deltas=own, replaced=(*replaced, *tokens), added=added)


def _judge(name: str, sums: _Sums, labels: list[str], after: Weight, given: tuple[WeightedAdapter, ...]) -> Verdict:
    solved = torch.linalg.lstsq(sums.gram, sums.toward[:, None]).solution[:, 0]
    scales = tuple(zip(labels, solved.tolist(), strict=True))
    left = max(0.0, sums.change - float(solved @ sums.toward))
    explained = left <= NOISE**2 * sums.noise
    explanation = ""
    if not sums.wrong:
        kind = EXACT
    elif not sums.off:
        kind = ROUNDED
    elif isinstance(after, QuantizedWeight):
        kind, explanation = QUANTIZED, f"{after.scheme}: keeps {_percent(solved)} of the update"
    elif not sums.change or (explained and float(solved.abs().max()) < NEAR):
        kind, explanation = MISSING, "is as in the base"
    elif sums.off <= FEW * sums.checked:
        kind, explanation = DAMAGED, sums.first
    elif explained:
        kind = SCALED
        explanation = "; ".join(f"{label} × {scale:.4g}{_named(scale, label, given)}" for label, scale in scales)
    else:
        kind, explanation = DIFFERENT, sums.first
    return Verdict(name, kind, True, sums.checked, sums.off, scales, sums.first, explanation)


def _percent(solved: torch.Tensor) -> str:
    return " and ".join(f"{scale:.1%}" for scale in solved.tolist())


def _named(scale: float, label: str, given: tuple[WeightedAdapter, ...]) -> str:
    """What a factor on the adapter's strength is known to come from."""
    adapter = next(one.adapter for one in given if one.label == label)
    weights = next(iter(adapter.modules.values()), None)
    known = {2.0: "applied twice", -1.0: "subtracted", 3.0: "applied three times", 0.5: "halved"}
    if weights is not None:
        root = weights.rank**0.5
        known |= (
            {1 / root: "α/r where the config has α/√r"} if adapter.rslora else {root: "α/√r where the config has α/r"}
        )
        if weights.scaling:
            known.setdefault(1 / weights.scaling, "without its scaling")
            known.setdefault(weights.scaling, "scaled twice over")
    near = [name for factor, name in known.items() if factor != 1 and abs(scale - factor) <= NEAR * abs(factor)]
    return f" ({near[0]})" if near else ""


# --- the others ------------------------------------------------------------------------------------------------------


def _untouched(name: str, before: Weight, after: Weight, share: float) -> Verdict:
    """Compare a tensor that no adapter touches with the base's, converted where the dtype differs."""
    columns = before.shape[-1] if len(before.shape) > 1 else 1
    rows = prod(before.shape) // max(1, columns)
    if before.dtype not in FLOAT_DTYPES:
        assert isinstance(before, TensorInfo) and isinstance(after, TensorInfo)
        same = before.read_bytes() == after.read_bytes()
        return Verdict(name, EXACT if same else DIFFERENT, False, prod(before.shape), 0 if same else 1)
    old, new = reader(before, columns), reader(after, columns)
    dtype = getattr(torch, TORCH_NAMES[after.dtype])
    checked = off = 0
    first_off = ""
    for first, last in _spans(rows, columns, share):
        expected, found = old(first, last).to(dtype), new(first, last)
        differ = (expected != found) & ~(expected.isnan() & found.isnan())
        if not off and bool(differ.any()):
            i, j = differ.nonzero()[0].tolist()
            first_off = f"[{first + i}, {j}] is {float(found[i, j]):.6g}, in the base {float(expected[i, j]):.6g}"
        off += int(differ.sum())
        checked += found.numel()
    kind = EXACT if not off else DAMAGED if off <= FEW * checked else DIFFERENT
    if off and isinstance(after, QuantizedWeight) and not isinstance(before, QuantizedWeight):
        kind = QUANTIZED
    return Verdict(name, kind, False, checked, off, (), first_off, first_off)


def _spans(rows: int, columns: int, share: float) -> Iterator[tuple[int, int]]:
    """Blocks of rows; with a share below 1 so much of each, at its middle."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        take = max(1, round((last - first) * share))
        start = first + (last - first - take) // 2
        yield start, start + take
