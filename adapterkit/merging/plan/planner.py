"""Plan a merge from headers alone: fit adapters to a base, check everything, and lay out the output files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from adapterkit import __version__
from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
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
    kinds,
    spec_for,
    training_settings,
    weights,
    writable_kinds,
)
from adapterkit.base.targets import Fit
from adapterkit.base.tied_embeddings import Tie, find_tie, unknown_tie
from adapterkit.base.vocabulary import find_vocabulary
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import FLOAT_DTYPES, OUTPUT_DTYPES, TORCH_NAMES, Header, TensorInfo, Weight
from adapterkit.files.staging import MADE_BY
from adapterkit.merging.plan.changes import (
    Changes,
    changes_of,
    check_target,
    counter_note,
    idle_note,
    ledger_of,
    prefix_note,
)
from adapterkit.merging.plan.heads import describe_heads, with_new_labels
from adapterkit.merging.plan.layout import Entry, lay_out
from adapterkit.merging.plan.resizing import Resizing, kept_rows
from adapterkit.merging.plan.ties import apply_to_tied, check_shared, shared_embedding_error
from adapterkit.merging.plan.types import MergePlan


@dataclass
class _Draft:
    """A plan under construction: each method adds one decision about the output."""

    base: Checkpoint
    tensors: dict[str, TensorInfo | QuantizedWeight]  # by the model's names
    config: dict[str, Any]
    changes: Changes = field(default_factory=Changes)
    ledger: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    untied: tuple[str, str] | None = None  # the embedding, and the head that needs a tensor of its own
    packings: dict[str, QuantizationSpec | None] = field(default_factory=dict)  # None: packed bytes are copied
    quantized_base: dict[str, QuantizedWeight] = field(default_factory=dict)  # if merging into its original
    training: QuantizationSettings | None = None  # by which the base was quantized for it
    trained: dict[str, QuantizationSpec] = field(default_factory=dict)  # of the weights that are merged onto that
    dtype: str | None = None
    vocabulary: int | None = None  # the output's
    resized: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of tensors that gain or lose rows

    @classmethod
    def of(cls, base: Checkpoint) -> _Draft:
        return cls(base, weights(base.tensors, base.config), dict(base.config))

    @property
    def schemes(self) -> list[str]:
        """The quantization schemes of the base's weights."""
        quantized = (weight for weight in self.tensors.values() if isinstance(weight, QuantizedWeight))
        return list(dict.fromkeys(weight.scheme for weight in quantized))

    @property
    def float_dtype(self) -> str:
        """The dtype of most of the output's weights, in which it stores new ones."""
        return self.dtype or float_dtype(self.config if self.schemes else {}, self.base.tensors)

    def fit(self, given: Sequence[WeightedAdapter], rename: tuple[str, str] | None, allow_partial: bool) -> None:
        """Map everything in the adapters to tensors of the base."""
        tie, unties = find_tie(self.base), False
        if tie is not None and tie.implied:
            self.tensors[tie.head] = replace(self.tensors[tie.embedding], name=tie.head)
        resizing = Resizing.of(find_vocabulary(self.tensors, self.base.config), given)
        for adapter in given:
            self.notes += [f"{adapter.label}: {problem}" for problem in adapter.adapter.problems if not problem.fatal]
            self.notes += [*idle_note(adapter), *counter_note(adapter)]
        for number, adapter in enumerate(given):
            found = place_adapter(adapter.adapter, resizing.seen_by(number, self.tensors), self.base, rename)
            if tie is not None and not allow_partial:
                _check_tied_head(adapter, found, tie)
            self.skipped += check_missing(adapter, found, self.base, self.tensors, allow_partial)
            self.notes += prefix_note(adapter, found, self.tensors)
            changes = changes_of(number, adapter, found)
            if tie is not None:
                unties |= apply_to_tied(tie, changes, adapter.label, adapter.adapter.ensure_weight_tying)
            else:
                check_shared(self.base, changes, adapter.label)
            self.changes.update(changes)
            self.ledger[adapter.label] = ledger_of(found)
        implied = tie.head if tie is not None and tie.implied and not unties else None
        resizing.apply(self.changes, self.base, implied)
        self.vocabulary, resized = resizing.size or None, with_new_labels(self.changes, resizing.after(self.tensors))
        self.resized = {name: after.shape for name, after in resized.items() if after.shape != self.tensors[name].shape}
        self.config = resizing.config(self.config)
        self.notes += resizing.notes(self.base)
        for name in (*self.changes.deltas, *self.changes.replaced, *self.changes.added):
            check_target(name, resized, self.base, self.changes)
        if tie is not None and unties:
            self.config, note = tie.untie(self.config)
            self.notes.append(note)
            if not tie.stored:
                self.untied = (tie.embedding, tie.head)

    def describe(self, given: Sequence[WeightedAdapter]) -> None:
        """Describe the heads of classifiers in the config."""
        self.config, notes = describe_heads(self.config, given, self.base.tensors)
        self.notes += notes

    def check_against(self, quantized: Checkpoint) -> None:
        """Check every weight against its quantized counterpart in `quantized`."""
        found = weights(quantized.tensors, quantized.config)
        self.quantized_base = {name: weight for name, weight in found.items() if isinstance(weight, QuantizedWeight)}
        if not self.quantized_base or self.schemes:
            path = self.base.path if self.schemes else quantized.path
            state = "is quantized" if self.schemes else "is not quantized"
            raise FitError(f"{path}: {state}; `original` takes the 16-bit model that the quantized base was made from")
        for name, weight in self.quantized_base.items():
            info = self.tensors.get(name)
            if info is None or info.shape != weight.shape:
                shape = "no such tensor" if info is None else f"shape {info.shape}"
                raise FitError(
                    f"{name}: shape {weight.shape} in {quantized.name}, but {shape} in the original {self.base.name}"
                )
        self.notes.append(f"merged into {self.base.name}, checked to be the original of {quantized.name}")

    def dequantize(self, adapters: Sequence[WeightedAdapter]) -> None:
        """Store quantized weights dequantized, in the model's compute dtype."""
        if self.schemes:
            self.notes.append(f"the base is quantized ({'; '.join(self.schemes)}); the output is dequantized")
            if not any("quantized base" in one.settled_by for given in adapters for one in given.adapter.problems):
                self.notes.append("`original=BASE16` merges into the 16-bit model that the base was made from")
            self.config.pop("quantization_config", None)

    def convert(self, dtype: str) -> None:
        """Store every floating-point tensor as `dtype`."""
        if self.base.quantization and not self.schemes:
            raise FitError(f"{self.base.path}: is quantized ({self.base.quantization}); {merge_into_original()}")
        self.dtype = OUTPUT_DTYPES[dtype]
        key = "dtype" if "dtype" in self.config else "torch_dtype"
        self.config = _with_nested(self.config, key, TORCH_NAMES[self.dtype])

    def quantize_for_training(self, settings: QuantizationSettings) -> None:
        """Merge onto linear layers as they were quantized for training, of a base that is not quantized."""
        if self.schemes or self.base.quantization:
            state = f"already quantized ({'; '.join(self.schemes) or self.base.quantization})"
            hint = "omit `as_trained`: adapters are merged into its dequantized weights"
            raise FitError(f"{self.base.path}: {state}", hint=hint if self.schemes else merge_into_original())
        self.training = settings
        self.trained = {name: spec_for(weight, settings) for name, weight in self._linear().items()}
        if not self.trained:
            raise FitError(f"{self.base.path}: no linear layer to quantize")
        scheme = next(iter(self.trained.values())).scheme
        self.notes.append(f"all linear layers are first quantized to {scheme} and dequantized, as in training")

    def quantize(self, settings: QuantizationSettings) -> None:
        """Quantize the weights that are quantized in the base, or all linear layers if none are."""
        linear = self._linear()
        packed = self.quantized_base or {
            name: weight for name, weight in self.tensors.items() if isinstance(weight, QuantizedWeight)
        }
        as_trained = self.training is not None and self.training.kind == settings.kind
        if self.training is not None and as_trained:
            settings = replace(settings, nested=self.training.nested)
        for name, weight in (packed or linear).items():
            if name in self.resized:
                raise FitError(f"{name}: quantizing a weight that gains or loses rows is not supported")
            same = isinstance(weight, QuantizedWeight) and weight.kind == settings.kind
            unchanged = same and not self.quantized_base and not self.changes.touches(name)
            self.packings[name] = None if unchanged else spec_for(weight, settings)
            if as_trained and not self.changes.touches(name):  # quantized as for training, and not once more
                self.packings[name] = self.trained.pop(name)
        if {weight.kind for weight in packed.values()} != {settings.kind}:
            dtype = float_dtype(self.base.config, self.base.tensors)
            self.config["quantization_config"] = declaration(settings, dtype)

    def _linear(self) -> dict[str, TensorInfo]:
        """The weights of linear layers. Raises FitError if they are stored transposed."""
        if self.base.config.get("model_type") in CONV1D_MODELS:
            raise FitError(f"{self.base.path}: quantizing Conv1D layers (stored transposed) is not supported")
        return {name: weight for name, weight in self.base.tensors.items() if is_linear(name, weight)}

    def plan(self, out: Path, given: Sequence[WeightedAdapter]) -> MergePlan:
        """Lay out every file."""
        base = self.base
        self.notes += base.notes()
        new = [name for name in self.changes.replaced if name not in self.tensors]
        self.notes += [f"{name}: added to the output, not in the base" for name in new]
        copied = {
            part.name
            for weight in self.tensors.values()
            if _copied_packed(weight, self.packings)
            for part in weight.parts
        }
        last = base.shards[-1]
        entries = [list(_entries(header, self, copied, new if header is last else [])) for header in base.shards]
        names = Counter(name for file in entries for entry in file for name, *_ in entry.stored())
        for name, count in names.items():
            if count > 1:
                raise FitError(f"{name}: the base has this tensor already; a part of a quantized weight needs its name")
        mark = {} if base.is_directory else {MADE_BY: __version__}
        files = tuple(lay_out(shard, stored, mark) for shard, stored in zip(base.shards, entries, strict=True))
        weight_map = {name: file.name for file in files for name in file.tensors}
        return MergePlan(
            base, out, tuple(given), files, self.config, weight_map, self.ledger, tuple(self.skipped),
            tuple(dict.fromkeys(self.notes)), self.dtype, self.vocabulary, self.resized,
        )  # fmt: skip


def _check_tied_head(given: WeightedAdapter, found: Fit, tie: Tie) -> None:
    """Raise FitError for a module without a tensor of its own, if it is unknown whether that is tied to another."""
    if not (tie.certain or tie.stored):
        head = next((name for name in found.missing if name.split(".")[0] in HEAD_MODULES), None)
        if head is not None:
            raise FitError(f"{given.label}: changes {head}, which has no tensor in the base, and {unknown_tie(tie)}")
    if tie.shared:
        for name in found.missing:
            if name.endswith(("coder.embed_tokens", "coder.word_embeddings")):
                raise shared_embedding_error(tie, given.label, f"{name}.weight")


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
    as_trained: str | None = None,
    rename: tuple[str, str] | None = None,
    allow_partial: bool = False,
) -> MergePlan:
    """Plan `base + Σ weight · adapter`, written to `out`, from headers alone.

    A quantized base is dequantized, unless `quantize` names a scheme or is "same". With the `original` that a quantized
    base was made from, the adapters are merged into that instead. With `as_trained`, one of `training_kinds`, they are
    merged onto the base as it was quantized for training. Raises FitError if any part of an adapter matches no
    base tensor or several, or does not fit in shape, rank or dtype.
    """
    if not given:
        raise UsageError("no adapter given: nothing to merge")
    draft, training = _Draft.of(original or base), None if as_trained is None else training_settings(as_trained)
    if "nf4" in kinds(draft.tensors) or (training is not None and training.kind == "nf4"):
        given = [replace(one, adapter=one.adapter.given("quantized base")) for one in given]
    for adapter in given:
        check_mergeable(adapter)
    if original is not None:
        draft.check_against(base)
    if training is not None:
        draft.quantize_for_training(training)
        quantize = training.kind if quantize == "same" else quantize
    draft.fit(given, rename, allow_partial)
    draft.describe(given)
    if quantize is None:
        draft.dequantize(given)
    else:
        kind = quantize if quantize != "same" else _kind_of(base, draft.quantized_base or draft.tensors)
        draft.quantize(QuantizationSettings(kind, rounding=rounding))
        if quantize == "same":
            draft.config["quantization_config"] = base.config.get("quantization_config")
    if dtype is not None:
        draft.convert(dtype)
    quantized = base if original is not None else None
    return replace(draft.plan(out, given), calibration=calibration, undoable=True, quantized=quantized)


def plan_quantize(
    base: Checkpoint, settings: QuantizationSettings, out: Path, calibration: Path | None = None
) -> MergePlan:
    """Plan `base` with its linear layers quantized, written to `out`. Raises FitError if they already are."""
    draft = _Draft.of(base)
    if draft.schemes or base.quantization:
        raise FitError(f"{base.path}: already quantized ({'; '.join(draft.schemes) or base.quantization})")
    draft.quantize(settings)
    if not draft.packings:
        raise FitError(f"{base.path}: no linear layer to quantize")
    return replace(draft.plan(out, ()), calibration=calibration)


def _with_nested(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """`config` with `key` set, also in its `text_config` if that has the key."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and key in nested:
        config = config | {"text_config": nested | {key: value}}
    return config | {key: value}


# --- quantized output ------------------------------------------------------------------------------------------------


def _kind_of(base: Checkpoint, tensors: Mapping[str, Weight]) -> str:
    """The kind of the base's quantization. Raises if it is not quantized, or its scheme cannot be written."""
    packed = [weight for weight in tensors.values() if isinstance(weight, QuantizedWeight)]
    if not packed:
        raise UsageError(
            f"{base.path}: not quantized, so `quantize='same'` has no scheme to use",
            hint=f"give one of {', '.join(writable_kinds())}",
        )
    unwritable = next((weight for weight in packed if weight.spec() is None), None)
    if unwritable is not None:
        raise FitError(
            f"{unwritable.name}: writing {unwritable.scheme} is not supported",
            hint=f"use `quantize='{writable_kinds()[0]}'`",
        )
    return packed[0].kind


def _copied_packed(
    weight: TensorInfo | QuantizedWeight, packings: Mapping[str, QuantizationSpec | None]
) -> TypeGuard[QuantizedWeight]:
    """Whether the output copies the packed bytes of a quantized weight."""
    return isinstance(weight, QuantizedWeight) and weight.name in packings and packings[weight.name] is None


# --- files -----------------------------------------------------------------------------------------------------------


def _entries(header: Header, draft: _Draft, copied: set[str], new: Sequence[str]) -> Iterator[Entry]:
    """The tensors of one output file, in the base's order; `copied` names packed tensors whose bytes are copied."""
    tensors, changes, packings = draft.tensors, draft.changes, draft.packings

    def entry(name: str, source: TensorInfo | QuantizedWeight | None, stored: str, shape: tuple[int, ...]) -> Entry:
        if source is not None and (resized := draft.resized.get(name)) is not None:
            source, shape = kept_rows(source, resized), resized
        trained = draft.trained.get(name)
        stored = trained.dtype if trained is not None else stored
        dtype = draft.dtype if draft.dtype is not None and stored in FLOAT_DTYPES else stored
        return Entry(
            name, source, dtype, shape, tuple(changes.deltas.get(name, ())), tuple(changes.replaced.get(name, ())),
            tuple(changes.added.get(name, ())), packings.get(name), draft.quantized_base.get(name), trained,
        )  # fmt: skip

    for stored in sorted(header.tensors.values(), key=lambda info: (info.start, info.stop)):
        info = tensors.get(stored.name)
        if stored.name in copied:
            yield Entry(stored.name, stored, stored.dtype, stored.shape)
        elif info is not None:  # None for the parts of a quantized weight
            yield entry(info.name, info, info.dtype, info.shape)
    if draft.untied and draft.untied[0] in header.tensors and draft.untied[1] not in header.tensors:
        info = tensors[draft.untied[0]]
        yield entry(draft.untied[1], info, info.dtype, info.shape)
    for name in new:
        yield entry(name, None, draft.float_dtype, changes.replaced[name][0].values.shape)
