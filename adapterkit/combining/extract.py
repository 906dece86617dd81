"""The adapter that makes one checkpoint of another: the best low rank of every difference, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra.lowrank import Limit, Product
from adapterkit.algebra.sketch import Matrix, sketch
from adapterkit.base.architectures import CONV1D_MODELS, is_linear
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.row_reader import reader
from adapterkit.combining.combine import best_of
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TensorInfo, Weight
from adapterkit.text import counted


@dataclass(frozen=True)
class Extraction:
    """`W_tuned − W_base ≈ B·A` for every linear layer that differs.

    With `whole`, what differs beside them (embeddings, norms, heads) is taken over as modules_to_save; without, a note
    names it. Raises FitError where the two do not have the same tensors.
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
        """An event for each layer that differs, the adapter last. Raises FitError where none does."""
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
            raise FitError(
                f"{self.tuned.path}: its linear layers are those of {self.base.path}: there is nothing to extract"
            )
        replaced = {name: _whole(after[name]) for name in changed} if self.whole else {}
        saved = frozenset(name.rpartition(".")[0].rpartition(".")[2] for name in replaced)
        base_model = self.base.name if "/" in self.base.name else None
        adapter = Adapter("", modules, replaced, new_modules=saved, base_model=base_model)
        what = f"{counted(len(changed), 'tensor')} beside linear layers changed"
        notes = (f"{what}, {changed[0]} first: not in the adapter",) if changed and not self.whole else ()
        yield AdapterMade(adapter, tuple(rows), notes)


def _weights(model: Checkpoint) -> dict[str, Weight]:
    return dict(weights_in(model.tensors, model.config))


def _linear(weights: Mapping[str, Weight]) -> list[str]:
    return [name for name, weight in weights.items() if is_linear(name, weight)]


def _whole(weight: Weight) -> LazyTensor:
    return LazyTensor.of(reader(weight, _columns(weight))(0, _depth(weight)).view(weight.shape))


def _check(base: Checkpoint, tuned: Checkpoint, before: dict[str, Weight], after: dict[str, Weight]) -> None:
    for one, ours, theirs in ((base, before, after), (tuned, after, before)):
        lacking = [name for name in ours if name not in theirs]
        if lacking:
            other = tuned if one is base else base
            raise FitError(f"{other.path}: has no {lacking[0]}, and {len(lacking) - 1} others that {one.path} has")
    for name, weight in before.items():
        if weight.shape != after[name].shape:
            raise FitError(
                f"{name}: is {weight.shape} in {base.path} and {after[name].shape} in {tuned.path}; was one retrained "
                "with another vocabulary or layout?"
            )


def _difference(before: Weight, after: Weight) -> Matrix:
    """In float32, where the difference of two 16-bit numbers nearly always is exact."""
    depth, columns = before.shape
    old, new = reader(before, columns), reader(after, columns)
    return Matrix((depth, columns), lambda first, last: new(first, last).float() - old(first, last).float())


def _differs(before: Weight, after: Weight) -> bool:
    """Whether two weights of one shape are not the same, a chunk of rows at a time."""
    if not isinstance(before, TensorInfo) or before.dtype in ("I64", "I32", "U8", "BOOL"):
        return False
    columns = _columns(before)
    old, new = reader(before, columns), reader(after, columns)
    spans = Matrix((_depth(before), columns), old).spans()
    return any(not torch.equal(old(*span).float(), new(*span).float()) for span in spans)


def _columns(weight: Weight) -> int:
    return weight.shape[-1] if len(weight.shape) > 1 else 1


def _depth(weight: Weight) -> int:
    return prod(weight.shape) // max(1, _columns(weight))
