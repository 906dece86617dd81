"""Verify that a checkpoint is exactly a base plus some adapters, by repeating the merge a few rows at a time.

Where it is not, least squares fit the actual change to the expected one, `D = W' − W ≈ Σ λᵢ·Δᵢ`, to recognize an update
that was applied twice, not at all, or with another scaling.
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
from adapterkit.base.tied_embeddings import find_tie
from adapterkit.errors import FitError
from adapterkit.files.opening import open_regular
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, TensorInfo, Weight
from adapterkit.files.stamps import check_unchanged
from adapterkit.merging.blocks.block import merge_rows, replayed
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.loading import Loaded, load_merge
from adapterkit.merging.plan.edits import MergeEdit
from adapterkit.merging.plan.types import MergePlan
from adapterkit.reprs import Displayed
from adapterkit.text import counted

BLOCK_ELEMENTS = 1 << 20
DAMAGE_LIMIT = 1e-3  # up to this share of mismatched elements is damage, not another merge
SCALE_TOLERANCE = 0.02  # relative, to recognize a known factor
NOISE_FACTOR = 1.5  # times the error of two roundings, up to which the adapters explain a change

# Kinds of verdict, best first. The first two pass.
EXACT, ROUNDED, SCALED, MISSING, QUANTIZED, DAMAGED, DIFFERENT = (
    "exact", "rounded", "scaled", "missing", "quantized", "damaged", "different",
)  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Verdict(Displayed):
    """The verdict on one tensor: its kind, the number of checked and of mismatched elements, and an explanation.

    `modified` tells whether adapters modify the tensor; if so, `scales` are λ by adapter. `first_mismatch` describes
    the first mismatched element.
    """

    name: str
    kind: str
    modified: bool
    checked: int
    mismatched: int
    scales: tuple[tuple[str, float], ...] = ()
    first_mismatch: str = ""
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
        return _check_unmodified(name, before[name], after[name], share)

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
        if name in after and after[name].shape != weight.shape:
            raise FitError(f"{name}: shape {weight.shape} in the base, {after[name].shape} in {merged.path}")


# --- tensors that adapters modify ------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Sums over the checked elements of a tensor, with one row and column for each of `count` adapters."""

    count: int
    gram: torch.Tensor = field(init=False)  # Σ Δᵢ·Δⱼ
    toward: torch.Tensor = field(init=False)  # Σ D·Δᵢ
    change: float = 0.0  # Σ D²
    noise: float = 0.0  # Σ of squared rounding errors
    checked: int = 0
    inexact: int = 0  # not the correctly rounded value
    mismatched: int = 0  # nor within rounding error
    first_mismatch: str = ""

    def __post_init__(self) -> None:
        self.gram = torch.zeros(self.count, self.count, dtype=torch.float64)
        self.toward = torch.zeros(self.count, dtype=torch.float64)

    def add(
        self, first: int, before: torch.Tensor, exact: torch.Tensor, deltas: list[torch.Tensor], found: torch.Tensor
    ) -> None:
        """Add rows from `first` on: base, expected values and adapters' updates in float64, and the found values."""
        actual = found.double()
        limit, finite = torch.finfo(found.dtype), exact.isfinite() & actual.isfinite()
        inexact = (round_once(exact, found.dtype) != found) & ~(exact.isnan() & actual.isnan())
        # Half a unit of the result, plus one unit of Δ for tools that round Δ separately.
        unit = _unit(exact, limit) / 2 + _unit(exact - before, limit)
        mismatched = inexact & ~((actual - exact).abs() <= unit)
        change = torch.where(finite, actual - before, 0.0)
        updates = torch.stack([torch.where(finite, delta, 0.0).flatten() for delta in deltas])
        self.gram += updates @ updates.T
        self.toward += updates @ change.flatten()
        self.change += float(change.square().sum())
        self.noise += float(torch.where(finite, _unit(actual, limit) / 2, 0.0).square().sum())
        self.checked += found.numel()
        self.inexact += int(inexact.sum())
        if not self.mismatched and bool(mismatched.any()):
            i, j = mismatched.nonzero()[0].tolist()
            self.first_mismatch = f"[{first + i}, {j}] is {float(actual[i, j]):.6g}, expected {float(exact[i, j]):.6g}"
        self.mismatched += int(mismatched.sum())


def _unit(values: torch.Tensor, limit: torch.finfo) -> torch.Tensor:
    """The unit in the last place of a dtype at each of `values`."""
    return torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=limit.tiny)))) * limit.eps


def _check_modified(plan: MergePlan, edit: MergeEdit, source: Path, after: Weight, share: float) -> Verdict:
    """Compare a tensor with a repeated merge, and classify any difference."""
    rounded = replace(edit, dtype=after.dtype, packing=None, checked_against=None)
    wide = replace(rounded, dtype="F64")  # computed in float64
    alone = [_part_of(wide, number, given) for number, given in enumerate(plan.adapters)]
    labels = [given.label for given, part in zip(plan.adapters, alone, strict=True) if part is not None]
    parts = [part for part in alone if part is not None]
    rows, columns = edit.matrix
    read, sums, buffers = reader(after, columns), _Sums(len(parts)), Buffers()
    with open_regular(source) as stream:
        fd = stream.fileno()
        merge, exact_merge = load_merge(rounded, fd), load_merge(wide, fd)
        merge_alone = [load_merge(part, fd) for part in parts]
        for first, last in _spans(rows, columns, share):
            found = read(first, last)
            if torch.equal(_merged(merge, first, last, buffers), found):  # a tenth of the cost of the float64 check
                sums.checked += found.numel()
                continue
            before, exact = replayed(exact_merge, first, last, buffers)
            deltas = [exact - before]
            if len(parts) > 1:
                pairs = [replayed(loaded, first, last, buffers) for loaded in merge_alone]
                deltas = [with_part - without for without, with_part in pairs]
            sums.add(first, before, exact, deltas, found)
    return _classify(edit.name, sums, labels, after, plan.adapters)


def _merged(loaded: Loaded[MergeEdit], first: int, last: int, buffers: Buffers) -> torch.Tensor:
    """Merged rows as `run` writes them; values beyond the dtype's range are compared, not refused."""
    dtype, columns = getattr(torch, TORCH_NAMES[loaded.edit.dtype]), loaded.edit.matrix[1]
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


def _classify(name: str, sums: _Sums, labels: list[str], after: Weight, given: tuple[WeightedAdapter, ...]) -> Verdict:
    solved = torch.linalg.lstsq(sums.gram, sums.toward[:, None]).solution[:, 0]
    scales = tuple(zip(labels, solved.tolist(), strict=True))
    unexplained = max(0.0, sums.change - float(solved @ sums.toward))
    explained = unexplained <= NOISE_FACTOR**2 * sums.noise
    explanation = ""
    if not sums.inexact:
        kind = EXACT
    elif not sums.mismatched:
        kind = ROUNDED
    elif isinstance(after, QuantizedWeight):
        retained = " and ".join(f"{scale:.1%}" for scale in solved.tolist())
        kind, explanation = QUANTIZED, f"{after.scheme} retains {retained} of the update"
    elif not sums.change or (explained and float(solved.abs().max()) < SCALE_TOLERANCE):
        kind, explanation = MISSING, "equals the base"
    elif sums.mismatched <= DAMAGE_LIMIT * sums.checked:
        kind, explanation = DAMAGED, sums.first_mismatch
    elif explained:
        kind = SCALED
        explanation = "; ".join(f"{label} × {scale:.4g}{_cause_of(scale, label, given)}" for label, scale in scales)
    else:
        kind, explanation = DIFFERENT, sums.first_mismatch
    return Verdict(name, kind, True, sums.checked, sums.mismatched, scales, sums.first_mismatch, explanation)


def _cause_of(scale: float, label: str, given: tuple[WeightedAdapter, ...]) -> str:
    """The known cause of a wrong scale, in parentheses."""
    adapter = next(one.adapter for one in given if one.label == label)
    weights = next(iter(adapter.modules.values()), None)
    known = {2.0: "applied twice", -1.0: "subtracted", 3.0: "applied three times", 0.5: "halved"}
    if weights is not None:
        root = weights.rank**0.5
        known |= {1 / root: "α/r instead of α/√r"} if adapter.rslora else {root: "α/√r instead of α/r"}
        if weights.scaling:
            known.setdefault(1 / weights.scaling, "without its scaling")
            known.setdefault(weights.scaling, "scaling applied twice")
    causes = [
        cause for factor, cause in known.items() if factor != 1 and abs(scale - factor) <= SCALE_TOLERANCE * abs(factor)
    ]
    return f" ({causes[0]})" if causes else ""


# --- the others ------------------------------------------------------------------------------------------------------


def _check_unmodified(name: str, before: Weight, after: Weight, share: float) -> Verdict:
    """Compare a tensor that no adapter modifies with the base's, converted if the dtype differs."""
    columns = before.shape[-1] if len(before.shape) > 1 else 1
    rows = prod(before.shape) // max(1, columns)
    if before.dtype not in FLOAT_DTYPES:
        assert isinstance(before, TensorInfo) and isinstance(after, TensorInfo)
        same = before.read_bytes() == after.read_bytes()
        return Verdict(name, EXACT if same else DIFFERENT, False, prod(before.shape), 0 if same else 1)
    old, new = reader(before, columns), reader(after, columns)
    dtype = getattr(torch, TORCH_NAMES[after.dtype])
    checked = mismatched = 0
    first_mismatch = ""
    for first, last in _spans(rows, columns, share):
        expected, found = old(first, last).to(dtype), new(first, last)
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


def _spans(rows: int, columns: int, share: float) -> Iterator[tuple[int, int]]:
    """Blocks of rows, or the given share from the middle of each."""
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        take = max(1, round((last - first) * share))
        start = first + (last - first - take) // 2
        yield start, start + take
