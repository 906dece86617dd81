"""The adapter that makes one checkpoint of another: the best low rank of every difference, streaming."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights
from adapterkit.algebra.lowrank import Limit, Product
from adapterkit.algebra.sketch import Matrix, sketch
from adapterkit.base.architectures import CONV1D_MODELS, is_linear
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.rows import reader
from adapterkit.combining.combine import Combined, ModuleDone, Planned, best_of
from adapterkit.errors import FitError
from adapterkit.files.safetensors import TensorInfo, Weight
from adapterkit.text import counted


def extract(
    base: Checkpoint, tuned: Checkpoint, limit: Limit, *, whole: bool = False, seed: int = 0
) -> Iterator[Planned | ModuleDone | Combined]:
    """`W_tuned − W_base ≈ B·A` for every linear layer that differs, an event for each, the adapter last.

    With `whole`, what differs beside them (embeddings, norms, heads) is taken over as modules_to_save; without, a note
    names it. Raises FitError where the two do not have the same tensors.
    """
    before: dict[str, Weight] = dict(weights_in(base.tensors, base.config))
    after: dict[str, Weight] = dict(weights_in(tuned.tensors, tuned.config))
    _check(base, tuned, before, after)
    transposed = base.config.get("model_type") in CONV1D_MODELS
    linear = [name for name, weight in before.items() if is_linear(name, weight)]
    yield Planned(len(linear))
    modules: dict[str, LoraWeights[LazyTensor]] = {}
    rows: list[ModuleDone] = []
    for number, name in enumerate(linear, 1):
        best = sketch(_difference(before[name], after[name]), limit, seed, name)
        if not best.energy:
            continue
        product, energy, discarded = best_of(*best.as_batch(), limit)
        if transposed:
            product = Product(product.right.mT, product.left.mT)
        module = name.removesuffix(".weight")
        A, B = LazyTensor.of(product.right[0].float().contiguous()), LazyTensor.of(product.left[0].float().contiguous())
        modules[module] = LoraWeights(A, B, 1.0, float(product.rank), fan_in_fan_out=transposed)
        rows.append(ModuleDone(module, product.rank, energy, discarded, number, len(linear)))
        yield rows[-1]
    changed = [name for name in before if name not in set(linear) and _differs(before[name], after[name])]
    if not modules and not (whole and changed):
        raise FitError(f"{tuned.path}: its linear layers are those of {base.path}: there is nothing to extract")
    replaced = {name: LazyTensor.of(reader(after[name], _columns(after[name]))(0, _depth(after[name])).view(
        after[name].shape)) for name in changed} if whole else {}  # fmt: skip
    notes = []
    if changed and not whole:
        notes.append(
            f"{counted(len(changed), 'tensor')} beside linear layers changed, {changed[0]} first: not in the adapter"
        )
    saved = frozenset(name.rpartition(".")[0].rpartition(".")[2] for name in replaced)
    adapter = Adapter("", modules, replaced, new_modules=saved, base_model=base.name if "/" in base.name else None)
    yield Combined(adapter, tuple(rows), tuple(notes))


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
