"""Planning a merge: adapters fitted to a base, everything checked, and a plan made of it, from headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from adapterkit import __version__
from adapterkit.adapter.weights import WeightedAdapter, check_mergeable
from adapterkit.base.adapter_fit import check_missing, merge_into_original, place_adapter
from adapterkit.base.architectures import CONV1D_MODELS, HEAD_MODULES, is_linear
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import (
    NEAREST,
    QuantizationSettings,
    QuantizationSpec,
    QuantizedWeight,
    Rounding,
    declaration,
    float_dtype,
    spec_for,
    weights,
    writable_kinds,
)
from adapterkit.base.targets import Fit
from adapterkit.base.ties import Tie, find_tie, unknown_tie
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import FLOAT_DTYPES, TORCH_NAMES, Header, TensorInfo, Weight
from adapterkit.files.staging import MADE_BY
from adapterkit.merging.plan.changes import Changes, check_target, gather, idle_note, ledger_of, prefix_note
from adapterkit.merging.plan.layout import Entry, lay_out
from adapterkit.merging.plan.ties import follow, refuse_shared
from adapterkit.merging.plan.types import MergePlan

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass
class _Draft:
    """A plan in the making: what the output holds, one decision after the other."""

    base: Checkpoint
    tensors: dict[str, TensorInfo | QuantizedWeight]  # by the names that the model has for them
    config: dict[str, Any]
    changes: Changes = field(default_factory=Changes)
    ledger: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untied: tuple[str, str] | None = None  # the embedding, and the head that parts from it
    packings: dict[str, QuantizationSpec | None] = field(default_factory=dict)  # None: stays quantized as it is
    twins: dict[str, QuantizedWeight] = field(default_factory=dict)
    dtype: str | None = None

    @classmethod
    def of(cls, base: Checkpoint) -> _Draft:
        return cls(base, weights(base.tensors, base.config), dict(base.config))

    @property
    def schemes(self) -> list[str]:
        """What the base's weights are quantized by."""
        return list(dict.fromkeys(one.scheme for one in self.tensors.values() if isinstance(one, QuantizedWeight)))

    def fit(self, given: Sequence[WeightedAdapter], rename: tuple[str, str] | None, allow_partial: bool) -> None:
        """Find a place for everything that the adapters bring."""
        tie, parted = find_tie(self.base), False
        if tie is not None and tie.implied:
            self.tensors[tie.head] = replace(self.tensors[tie.embedding], name=tie.head)
        for one in given:
            self.notes += [f"{one.label}: {problem}" for problem in one.adapter.problems if not problem.fatal]
            self.notes += idle_note(one)
        for number, one in enumerate(given):
            found = place_adapter(one.adapter, self.tensors, self.base, rename)
            if tie is not None and not (tie.certain or tie.stored or allow_partial):
                self._refuse_unknown_head(one, found, tie)
            if tie is not None and tie.shared and not allow_partial:
                for name in found.missing:
                    if name.endswith("coder.embed_tokens"):
                        raise refuse_shared(tie, one.label, f"{name}.weight")
            self.skipped += check_missing(one, found, self.base, self.tensors, allow_partial)
            self.notes += prefix_note(one, found)
            mine = gather(number, one, found)
            if tie is not None:
                parted |= follow(tie, mine, one.label, one.adapter.ensure_weight_tying)
            self.changes.add(mine)
            self.ledger[one.label] = ledger_of(found)
        for name in (*self.changes.deltas, *self.changes.replaced, *self.changes.added):
            check_target(name, self.tensors, self.base, self.changes)
        if tie is not None and parted:
            self.config, note = tie.untie(self.config)
            self.notes.append(note)
            if not tie.stored:
                self.untied = (tie.embedding, tie.head)

    def _refuse_unknown_head(self, one: WeightedAdapter, found: Fit, tie: Tie) -> None:
        head = next((name for name in found.missing if name.split(".")[0] in HEAD_MODULES), None)
        if head is not None:
            raise FitError(f"{one.label}: changes {head}, which has no tensor in the base, and {unknown_tie(tie)}")

    def compare(self, quantized: Checkpoint) -> None:
        """Have every weight checked to be what `quantized` was made from."""
        found = weights(quantized.tensors, quantized.config)
        self.twins = {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}
        if not self.twins or self.schemes:
            which = self.base if self.schemes else quantized
            what = "is quantized itself" if self.schemes else "is not quantized"
            raise FitError(f"{which.path}: {what}; `original` is the 16-bit model that a quantized base was made from")
        for name, weight in self.twins.items():
            info = self.tensors.get(name)
            if info is None or info.shape != weight.shape:
                has = "has no such weight" if info is None else f"has {info.shape}"
                raise FitError(f"{name}: is {weight.shape} in {quantized.name}, the original {self.base.name} {has}")
        self.notes.append(f"merged onto {self.base.name}, checked to be what {quantized.name} was quantized from")

    def dequantize(self) -> None:
        """Store what is quantized as the model computes with it."""
        if self.schemes:
            self.notes.append(f"the base is quantized ({'; '.join(self.schemes)}): the output is not")
            self.config.pop("quantization_config", None)

    def convert(self, dtype: str) -> None:
        """Store every floating point tensor as `dtype`."""
        if self.base.quantization and not self.schemes:
            raise FitError(f"{self.base.path}: is quantized ({self.base.quantization}); {merge_into_original()}")
        self.dtype = DTYPES[dtype]
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        self.config = _with_nested(self.config, key, TORCH_NAMES[self.dtype])

    def quantize(self, how: QuantizationSettings) -> None:
        """Quantize what the base has quantized, or where that is nothing its linear layers."""
        if self.base.config.get("model_type") in CONV1D_MODELS:
            raise FitError(f"{self.base.path}: its linear layers are stored transposed (Conv1D): not supported")
        packed = self.twins or {name: one for name, one in self.tensors.items() if isinstance(one, QuantizedWeight)}
        linear = {name: weight for name, weight in self.base.tensors.items() if is_linear(name, weight)}
        for name, weight in (packed or linear).items():
            same = isinstance(weight, QuantizedWeight) and weight.kind == how.kind
            stays = same and not self.twins and not self.changes.touch(name)
            self.packings[name] = None if stays else spec_for(weight, how)
        if {weight.kind for weight in packed.values()} != {how.kind}:
            dtype = float_dtype(self.base.config, self.base.tensors)
            self.config["quantization_config"] = declaration(how, dtype)

    def plan(self, out: Path, given: Sequence[WeightedAdapter]) -> MergePlan:
        """Lay out every file."""
        base = self.base
        self.notes += base.notes()
        new = [name for name in self.changes.replaced if name not in self.tensors]
        self.notes += [f"{name}: new in the output, since the base has no such tensor" for name in new]
        kept = {part.name for weight in self.tensors.values() if _stays(weight, self.packings) for part in weight.parts}
        last = base.shards[-1]
        entries = [list(_entries(header, self, kept, new if header is last else [])) for header in base.shards]
        names = Counter(name for file in entries for entry in file for name, *_ in entry.stored())
        for name, count in names.items():
            if count > 1:
                raise FitError(f"{name}: the base has a tensor of this name, which a part of a quantized weight needs")
        mark = {} if base.is_directory else {MADE_BY: __version__}
        files = tuple(lay_out(shard, of_it, mark) for shard, of_it in zip(base.shards, entries, strict=True))
        weight_map = {name: file.name for file in files for name in file.tensors}
        return MergePlan(
            base, out, tuple(given), files, self.config, weight_map, self.ledger, tuple(self.skipped),
            tuple(dict.fromkeys(self.notes)), self.dtype,
        )  # fmt: skip


def make_plan(
    base: Checkpoint,
    given: Sequence[WeightedAdapter],
    out: Path,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    rounding: Rounding = NEAREST,
    calibration: Path | None = None,
    original: Checkpoint | None = None,
    rename: tuple[str, str] | None = None,
    allow_partial: bool = False,
) -> MergePlan:
    """Plan `base + Σ weight · adapter`, written to `out`, from headers only.

    A quantized base is dequantized, unless `quantize` names a kind to write, or "same". With the `original` it
    was made from, that is merged into instead. Raises FitError where anything of an adapter has no place, has two, or
    does not fit in shape, rank or dtype.
    """
    if not given:
        raise UsageError("no adapter given: there is nothing to merge")
    for one in given:
        check_mergeable(one)
    draft = _Draft.of(original or base)
    if original is not None:
        draft.compare(base)
    draft.fit(given, rename, allow_partial)
    if quantize is None:
        draft.dequantize()
    else:
        kind = quantize if quantize != "same" else _same(base, draft.twins or draft.tensors)
        draft.quantize(QuantizationSettings(kind, rounding=rounding))
        if quantize == "same":
            draft.config["quantization_config"] = base.config.get("quantization_config")
    if dtype is not None:
        draft.convert(dtype)
    quantized = base if original is not None else None
    return replace(draft.plan(out, given), calibration=calibration, undoable=True, quantized=quantized)


def plan_quantize(base: Checkpoint, how: QuantizationSettings, out: Path, calibration: Path | None = None) -> MergePlan:
    """Plan `base` with its linear layers quantized, written to `out`. Raises FitError where they are already."""
    draft = _Draft.of(base)
    if draft.schemes or base.quantization:
        raise FitError(f"{base.path}: is quantized already ({'; '.join(draft.schemes) or base.quantization})")
    draft.quantize(how)
    if not draft.packings:
        raise FitError(f"{base.path}: holds no linear layer to quantize")
    return replace(draft.plan(out, ()), calibration=calibration)


def _with_nested(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`config` with `key` set, also in the text model's own section where it stands there."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and key in nested:
        config = config | {"text_config": nested | {key: value}}
    return config | {key: value}


# --- quantized output ------------------------------------------------------------------------------------------------


def _same(base: Checkpoint, tensors: Mapping[str, Weight]) -> str:
    """What the base is quantized to, where that can be written."""
    packed = [weight for weight in tensors.values() if isinstance(weight, QuantizedWeight)]
    if not packed:
        raise UsageError(f"{base.path}: is not quantized; here `quantize` takes one of {', '.join(writable_kinds())}")
    stuck = next((weight for weight in packed if weight.spec() is None), None)
    if stuck is not None:
        raise FitError(
            f"{stuck.name}: is {stuck.scheme}, which cannot be written; `quantize='{writable_kinds()[0]}'` can"
        )
    return packed[0].kind


def _stays(
    weight: TensorInfo | QuantizedWeight, packings: Mapping[str, QuantizationSpec | None]
) -> TypeGuard[QuantizedWeight]:
    """Whether a quantized weight goes to the output as it is stored."""
    return isinstance(weight, QuantizedWeight) and weight.name in packings and packings[weight.name] is None


# --- files -----------------------------------------------------------------------------------------------------------


def _entries(header: Header, draft: _Draft, kept: set[str], new: Sequence[str]) -> Iterator[Entry]:
    """The tensors of one output file, in the order of the base's; those `kept` stay quantized as they are stored."""
    tensors, changes, packings = draft.tensors, draft.changes, draft.packings

    def entry(name: str, source: TensorInfo | QuantizedWeight | None, stored: str, shape: tuple[int, ...]) -> Entry:
        kind = draft.dtype if draft.dtype is not None and stored in FLOAT_DTYPES else stored
        return Entry(
            name, source, kind, shape, tuple(changes.deltas.get(name, ())), tuple(changes.replaced.get(name, ())),
            tuple(changes.added.get(name, ())), packings.get(name), draft.twins.get(name),
        )  # fmt: skip

    for stored in sorted(header.tensors.values(), key=lambda info: (info.start, info.stop)):
        info = tensors.get(stored.name)
        if stored.name in kept:
            yield Entry(stored.name, stored, stored.dtype, stored.shape)
        elif info is not None:  # else a part of a quantized weight
            yield entry(info.name, info, info.dtype, info.shape)
    if draft.untied and draft.untied[0] in header.tensors and draft.untied[1] not in header.tensors:
        info = tensors[draft.untied[0]]
        yield entry(draft.untied[1], info, info.dtype, info.shape)
    for name in new:
        values = changes.replaced[name][0].values
        yield entry(name, None, values.dtype, values.shape)
