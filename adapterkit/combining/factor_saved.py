"""Convert what an adapter stores whole (modules_to_save, trained tokens) to factors: `W_saved − W ≈ B·A`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from adapterkit.adapter.formats.peft_names import TASK_HEADS, saves
from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, load_weights
from adapterkit.algebra.truncation import Limit
from adapterkit.base.adapter_fit import check_missing, place_adapter
from adapterkit.base.architectures import CONV1D_MODELS, CONV1D_NAMES, is_embedding
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.checkpoint_names import names_in_model
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.row_reader import reader
from adapterkit.base.targets import Fit
from adapterkit.base.tied_embeddings import Tie, find_tie, unknown_tie
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import Weight
from adapterkit.text import counted

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.sketch import Matrix

Weights: TypeAlias = "LoraWeights[torch.Tensor]"
INSTEAD = "merge the adapter instead"


@dataclass(frozen=True)
class SavedMatrix:
    """The weight of a module that is stored `whole`, or some rows of it, and the weight of the base.

    Its Δ is stored `(out, in)` like a linear layer's weight, or `transposed`, like an embedding's.
    """

    module: str
    base: Weight
    whole: LazyTensor | None
    rows: tuple[int, ...] = ()
    values: LazyTensor | None = None  # of these rows
    factors_of: str = ""  # the module whose factors are added to it
    embedding: bool = False
    transposed: bool = False

    def delta(self, factors: Weights | None) -> Matrix:
        """`W_saved − W`, plus the update by `factors`."""
        import torch

        from adapterkit.algebra.sketch import Matrix

        old = reader(self.base, self.base.shape[1])
        values = torch.empty(0, self.base.shape[1]) if self.values is None else self.values.read().float()
        left, right = (None, None) if factors is None else _as_stored(factors, self.transposed)

        def rows(first: int, last: int) -> torch.Tensor:
            before = old(first, last).float()
            after = (before if self.whole is None else self.whole.read_rows(first, last).float()).clone()
            here = [(at, row - first) for at, row in enumerate(self.rows) if first <= row < last]
            if here:
                after[[row for _, row in here]] = values[[at for at, _ in here]]
            delta = after - before
            if not bool(delta.isfinite().all()):
                raise FitError(f"{self.module}: W_saved − W contains NaN or Inf: the adapter or the base is broken")
            return delta if left is None or right is None else delta + (left[first:last] @ right).float()

        depth, columns = self.base.shape
        return Matrix((depth, columns), rows)


@dataclass(frozen=True)
class FactorSaved:
    """An adapter with factors in place of all that it stores whole, for engines that take only factors.

    A module that has factors already gets those of the sum.
    """

    one: WeightedAdapter
    base: Checkpoint
    saved: tuple[SavedMatrix, ...]
    vectors: tuple[tuple[str, LazyTensor, Weight], ...]  # which have to equal the base's
    limit: Limit
    rslora: bool
    seed: int = 0

    @property
    def modules(self) -> int:
        return len(self.one.adapter.modules.keys() | {one.module for one in self.saved})

    @property
    def notes(self) -> tuple[str, ...]:
        task = self.one.adapter.task
        return (f"task_type {task} is left out: with it, PEFT expects a head stored whole",) if self._has_head else ()

    @property
    def _has_head(self) -> bool:
        """Whether a head that PEFT saves whole for the adapter's task becomes factors."""
        heads = TASK_HEADS.get(self.one.adapter.task or "", ())
        return any(saves(head, one.module) for head in heads for one in self.saved)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per module, then the adapter. Raises FitError for a vector that differs from the base's."""
        for name, values, base in self.vectors:
            _check_equal(f"{self.one.label}: {name}", values, base)
        modules, rows = dict(self.one.adapter.modules), list[ModuleDone]()
        for one in self.saved:
            if (made := self._factored(one)) is not None:
                modules[one.module], energy, discarded = made
                rank = modules[one.module].rank
                rows.append(ModuleDone(one.module, rank, energy, discarded, len(rows) + 1, self.modules))
                yield rows[-1]
        if not modules:
            raise FitError(f"{self.one.label}: all that it stores equals the base")
        for name in (name for name in modules if name not in {row.name for row in rows}):
            weights = load_weights(modules[name])
            rows.append(ModuleDone(name, weights.rank, _energy(weights), 0.0, len(rows) + 1, self.modules))
            yield rows[-1]
        same = [one.module for one in self.saved if one.module not in modules]
        left_out = f"{counted(len(same), 'saved module')} equal to the base's (first: {same[0]})" if same else ""
        yield AdapterMade(self._made(modules), tuple(rows), (f"left out {left_out}",) if same else ())

    def _factored(self, one: SavedMatrix) -> tuple[LoraWeights[LazyTensor], float, float] | None:
        """The factors of a saved weight, its energy, and the energy discarded; None if it equals the base's."""
        from adapterkit.algebra.sketch import sketch
        from adapterkit.combining.batches import best_of

        stored = self.one.adapter.modules.get(one.factors_of)
        own = None if stored is None else load_weights(stored)
        if (own is None or one.factors_of == one.module) and not any(
            bool(rows.any()) for _, _, rows in one.delta(None).chunks()
        ):
            return None
        best = sketch(one.delta(own), self.limit, self.seed, one.module)
        product, energy, discarded = best_of(*best.as_batch(), self.limit)
        left, right = product.left[0].float(), product.right[0].float()
        A, B = (left.mT, right.mT) if one.transposed else (right, left)
        bias = None if own is None or own.bias is None else LazyTensor.of((own.bias.double() * own.scaling).float())
        weights = LoraWeights(
            LazyTensor.of(A.contiguous()), LazyTensor.of(B.contiguous()), 1.0, float(product.rank), bias=bias,
            kind="embedding" if one.embedding else "linear", fan_in_fan_out=one.transposed and not one.embedding,
        )  # fmt: skip
        return weights, energy, discarded

    def _made(self, modules: dict[str, LoraWeights[LazyTensor]]) -> Adapter:
        """The new adapter. Raises FitError unless its factors land on the weights that they are computed from."""
        task = None if self._has_head else self.one.adapter.task
        adapter = replace(
            self.one.adapter, format="", modules=modules, replaced={}, tokens={}, new_tensors=frozenset(),
            ensure_weight_tying=False, rslora=self.rslora, task=task, target_suffixes=(), config={},
        )  # fmt: skip
        targets = place_adapter(adapter, _tensors(self.base, find_tie(self.base)), self.base).targets
        for one in (one for one in self.saved if one.module in modules):
            found = [(target.tensor, target.transposed) for target in targets.get(one.module, ())]
            if found != [(one.base.name, one.transposed)]:
                raise FitError(f"{one.module}: as factors it would not change {one.base.name}", hint=INSTEAD)
        return adapter


# --- from headers ----------------------------------------------------------------------------------------------------


def plan_factors(one: WeightedAdapter, base: Checkpoint, limit: Limit, rslora: bool, seed: int) -> FactorSaved:
    """Plan to convert all that an adapter stores whole to factors for `base`, from headers.

    Raises UsageError if it stores nothing whole, FitError for what factors can't hold: new modules and rows, tensors of
    more dimensions, DoRA, embeddings that an encoder and a decoder share.
    """
    check_mergeable(one)
    adapter, tie = one.adapter, find_tie(base)
    if not (adapter.replaced or adapter.tokens):
        raise UsageError(f"{one.label}: stores no module whole", hint="omit `saved`")
    tensors = _tensors(base, tie)
    found = place_adapter(adapter, tensors, base)
    check_missing(one, found, base, tensors, False)
    vectors = [
        (name, adapter.replaced[name], tensors[at])
        for name, at in found.replaced.items()
        if at in tensors and len(tensors[at].shape) < 2
    ]
    matrices = {saved.module: saved for saved in _matrices(one, found, tensors, base)}
    if tie is not None:
        matrices |= {saved.module: saved for saved in _tied(one, tie, matrices, tensors)}
    return FactorSaved(one, base, tuple(matrices.values()), tuple(vectors), limit, rslora, seed)


def _tensors(base: Checkpoint, tie: Tie | None) -> dict[str, Weight]:
    """The base's weights, with the tied head even if that is not stored."""
    tensors = weights_in(base.tensors, base.config)
    if tie is not None and tie.implied:
        tensors[tie.head] = replace(tensors[tie.embedding], name=tie.head)
    return dict(tensors)


def _matrices(
    one: WeightedAdapter, found: Fit, tensors: Mapping[str, Weight], base: Checkpoint
) -> Iterator[SavedMatrix]:
    """The matrices that an adapter stores whole or some rows of."""
    adapter, conv1d = one.adapter, base.config.get("model_type") in CONV1D_MODELS
    places = {name: at for name, at in found.replaced.items() if len(adapter.replaced[name].shape) > 1}
    places |= {f"{module}.weight": at for module, at in found.tokens.items()}
    for name, at in places.items():
        module, _, leaf = name.rpartition(".")
        info, whole = tensors.get(at), adapter.replaced.get(name)
        rows, values = adapter.tokens.get(module, ((), None))
        if info is None:
            raise FitError(f"{one.label}: {name} is not in the base, so it has no difference to factor", hint=INSTEAD)
        if leaf != "weight" or len(info.shape) != 2:
            raise FitError(f"{one.label}: {name} {info.shape}: factors hold only weight matrices", hint=INSTEAD)
        grown = values is not None and (max(rows) >= info.shape[0] or values.shape[1:] != info.shape[1:])
        if (whole is not None and whole.shape != info.shape) or grown:
            has = values.shape if whole is None and values is not None else whole and whole.shape
            raise FitError(f"{one.label}: {name} is {has}, in the base {info.shape}: factors add no rows", hint=INSTEAD)
        embedding = is_embedding(info.name)
        transposed = embedding or (conv1d and module.rpartition(".")[2] in CONV1D_NAMES)
        if module in adapter.modules and adapter.modules[module].magnitude is not None:
            raise FitError(f"{one.label}: {module} is DoRA", hint="convert the adapter to LoRA first")
        yield SavedMatrix(module, info, whole, rows, values, module, embedding, transposed)


def _tied(
    one: WeightedAdapter, tie: Tie, matrices: Mapping[str, SavedMatrix], tensors: Mapping[str, Weight]
) -> Iterator[SavedMatrix]:
    """The head, where what is stored of the embedding applies to it too: trained tokens, or all if they stay tied."""
    touched = next((saved for saved in matrices.values() if saved.base.name in (tie.embedding, *tie.others)), None)
    if touched is None or (not tie.certain and tie.stored):
        return
    if not tie.certain:
        raise FitError(f"{one.label}: changes {touched.base.name}, and {unknown_tie(tie)}")
    if tie.shared:
        reason = f"{touched.base.name} may be shared by an encoder and a decoder"
        raise FitError(f"{one.label}: {reason}, which factors are not", hint=INSTEAD)
    stays_tied = one.adapter.ensure_weight_tying and (not tie.stored or tie.equal())
    follows = touched if stays_tied else replace(touched, whole=None) if touched.rows else None
    if follows is None or any(saved.base.name == tie.head for saved in matrices.values()):
        return
    head = names_in_model(tie.base.config)(tie.head).removesuffix(".weight")
    factors_of = head if head in one.adapter.modules or not stays_tied else touched.module
    yield replace(
        follows, module=head, base=tensors[tie.head], factors_of=factors_of, embedding=False, transposed=False
    )


# --- values ----------------------------------------------------------------------------------------------------------


def _as_stored(weights: Weights, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`(left, right)` in float64, whose product is the update as the weight is stored."""
    A, B = weights.A.flatten(1).double(), weights.B.flatten(1).double() * weights.scaling
    return (A.mT, B.mT) if transposed else (B, A)


def _check_equal(name: str, values: LazyTensor, base: Weight) -> None:
    """Raise FitError unless a saved vector equals the base's, since no factors hold it."""
    import torch

    before, after = reader(base, 1)(0, prod(base.shape)).view(-1), values.read().view(-1)
    if not torch.equal(after.to(before.dtype), before):
        raise FitError(f"{name} differs from the base's, and factors hold only matrices", hint=INSTEAD)


def _energy(weights: Weights) -> float:
    from adapterkit.algebra.lowrank import Product, decompose

    return float(decompose(Product.of(weights)).sigma.square().sum()) * weights.scaling**2
