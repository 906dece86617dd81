"""Extract an adapter from two checkpoints: the best low-rank approximation of each difference, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra.truncation import Limit
from adapterkit.base.architectures import CONV1D_MODELS, is_linear
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.row_reader import reader
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TensorInfo, Weight
from adapterkit.text import counted

if TYPE_CHECKING:
    from adapterkit.algebra.sketch import Matrix


@dataclass(frozen=True)
class Extraction:
    """`W_tuned − W_base ≈ B·A` for every linear layer that differs.

    Other tensors that differ (embeddings, norms, heads) are stored as modules_to_save with `whole`, and named in a note
    without. Raises FitError if the two checkpoints have different tensors.
    """

    base: Checkpoint
    tuned: Checkpoint
    limit: Limit
    whole: bool = False
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.base, self.tuned, _weights(self.base), _weights(self.tuned))

    @property
    def modules(self) -> int:
        return len(_linear(_weights(self.base)))

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per layer that differs, then the adapter. Raises FitError if no layer differs."""
        from adapterkit.algebra.lowrank import Product
        from adapterkit.algebra.sketch import sketch
        from adapterkit.combining.batches import best_of

        before, after = _weights(self.base), _weights(self.tuned)
        transposed = self.base.config.get("model_type") in CONV1D_MODELS
        linear = _linear(before)
        modules: dict[str, LoraWeights[LazyTensor]] = {}
        rows: list[ModuleDone] = []
        for number, name in enumerate(linear, 1):
            best = sketch(_difference(before[name], after[name]), self.limit, self.seed, name)
            if not best.energy:
                continue
            product, energy, discarded = best_of(*best.as_batch(), self.limit)
            if transposed:
                product = Product(product.right.mT, product.left.mT)
            module, A, B = name.removesuffix(".weight"), product.right[0].float(), product.left[0].float()
            modules[module] = LoraWeights(
                LazyTensor.of(A.contiguous()), LazyTensor.of(B.contiguous()), 1.0, float(product.rank),
                fan_in_fan_out=transposed,
            )  # fmt: skip
            rows.append(ModuleDone(module, product.rank, energy, discarded, number, len(linear)))
            yield rows[-1]
        changed = [name for name in before if name not in set(linear) and _differs(before[name], after[name])]
        if not modules and not (self.whole and changed):
            raise FitError(f"{self.tuned.path}: nothing to extract: its linear layers equal those of {self.base.path}")
        replaced = {name: _whole(after[name]) for name in changed} if self.whole else {}
        base_model = self.base.name if "/" in self.base.name else None
        adapter = Adapter("", modules, replaced, new_tensors=frozenset(replaced), base_model=base_model)
        yield AdapterMade(adapter, tuple(rows), self._notes_on(changed))

    def _notes_on(self, changed: Sequence[str]) -> tuple[str, ...]:
        """A note on changed tensors that are not in the adapter."""
        if self.whole or not changed:
            return ()
        what = f"{counted(len(changed), 'changed tensor')} outside linear layers (first: {changed[0]})"
        return (f"left out {what}; `whole=True` includes them",)


def _weights(model: Checkpoint) -> dict[str, Weight]:
    return dict(weights_in(model.tensors, model.config))


def _linear(weights: Mapping[str, Weight]) -> list[str]:
    return [name for name, weight in weights.items() if is_linear(name, weight)]


def _whole(weight: Weight) -> LazyTensor:
    return LazyTensor.of(reader(weight, _columns(weight))(0, _depth(weight)).view(weight.shape))


def _check(base: Checkpoint, tuned: Checkpoint, before: dict[str, Weight], after: dict[str, Weight]) -> None:
    for one, ours, theirs in ((base, before, after), (tuned, after, before)):
        missing = [name for name in ours if name not in theirs]
        if missing:
            other, more = (tuned if one is base else base), f" and {len(missing) - 1} more tensors" * (len(missing) > 1)
            raise FitError(f"{other.path}: has no {missing[0]}{more}, found in {one.path}")
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            raise FitError(
                f"{name}: is {weight.shape} in {base.path} and {after[name].shape} in {tuned.path}; were they trained "
                "with the same vocabulary and layout?"
            )


def _difference(before: Weight, after: Weight) -> Matrix:
    """`after − before` in float32, which is nearly always exact for 16-bit numbers."""
    from adapterkit.algebra.sketch import Matrix

    depth, columns = before.shape
    old, new = reader(before, columns), reader(after, columns)
    return Matrix((depth, columns), lambda first, last: new(first, last).float() - old(first, last).float())


def _differs(before: Weight, after: Weight) -> bool:
    """Whether two weights of one shape differ, compared a chunk of rows at a time."""
    if not isinstance(before, TensorInfo) or before.dtype in ("I64", "I32", "U8", "BOOL"):
        return False
    import torch

    from adapterkit.algebra.sketch import Matrix

    columns = _columns(before)
    old, new = reader(before, columns), reader(after, columns)
    spans = Matrix((_depth(before), columns), old).spans()
    return any(not torch.equal(old(*span).float(), new(*span).float()) for span in spans)


def _columns(weight: Weight) -> int:
    return weight.shape[-1] if len(weight.shape) > 1 else 1


def _depth(weight: Weight) -> int:
    return prod(weight.shape) // max(1, _columns(weight))
