"""One kind of adapter made another: LoRA to DoRA exactly, DoRA to LoRA with its error, one scaling for another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, WeightedAdapter, load_weights, refuse_broken
from adapterkit.algebra.lowrank import Limit, Product, decompose
from adapterkit.algebra.sketch import Matrix, sketch
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.placement import place
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.renames import explain_missing
from adapterkit.base.rows import Piece, pieces
from adapterkit.combining.combine import Combined, ModuleDone, Planned, best_of, weights_of
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import Weight

Weights = LoraWeights[torch.Tensor]


def to_dora(one: WeightedAdapter, base: Checkpoint) -> Iterator[Planned | ModuleDone | Combined]:
    """Give every module the magnitude `m = ‖W + s·B·A‖` of each output, by which DoRA's `m/n` is 1.

    The norms are of `W + s·B·A` as merging forms it, in float64: as many operations as through `W·Aᵀ` and the Gram
    matrices, and no cancellation. Raises FitError where a module has no place in the base, or is DoRA already.
    """
    placed = list(_placed(one, base, dora=False))
    yield Planned(len(placed))
    done: dict[str, LoraWeights[LazyTensor]] = {}
    rows = []
    for name, stored, found in placed:
        magnitude = torch.cat([piece.norms(Matrix(piece.shape, piece.before).spans()) for piece in found])
        energy = float(decompose(Product.of(load_weights(stored))).sigma.square().sum()) * stored.scaling**2
        done[name] = replace(stored, magnitude=LazyTensor.of(magnitude.float()))
        rows.append(ModuleDone(name, stored.rank, energy, 0.0, len(done), len(one.adapter.modules)))
        yield rows[-1]
    yield Combined(_like(one.adapter, done), tuple(rows), ())


def to_lora(
    one: WeightedAdapter, base: Checkpoint, limit: Limit, seed: int = 0
) -> Iterator[Planned | ModuleDone | Combined]:
    """The best approximation of each DoRA module's effective `Δ = diag(g)·(W + s·B·A) − W`, `g = m/n`, as LoRA.

    That Δ is of full rank: products with it are computed from rows of W and the factors (see `sketch`). Raises
    FitError where a module has no place in the base.
    """
    placed = list(_placed(one, base, dora=True))
    yield Planned(len(placed))
    done: dict[str, LoraWeights[LazyTensor]] = {}
    rows = []
    for name, stored, found in placed:
        weights = load_weights(stored)
        matrix = _effective(weights, found)
        best = sketch(matrix, limit, seed, name)
        product, energy, discarded = best_of(*best.as_batch(), limit)
        if found[0].transposed:
            product = Product(product.right.mT, product.left.mT)
        new = weights_of(product, weights)
        bias = None if weights.bias is None else LazyTensor.of((weights.bias.double() * weights.scaling).float())
        done[name] = replace(
            stored, A=LazyTensor.of(new.A), B=LazyTensor.of(new.B), scaling=1.0, alpha=float(new.rank), magnitude=None,
            bias=bias,
        )  # fmt: skip
        rows.append(ModuleDone(name, new.rank, energy, discarded, len(done), len(one.adapter.modules)))
        yield rows[-1]
    yield Combined(_like(one.adapter, done), tuple(rows), ())


def rescale(one: WeightedAdapter, rslora: bool) -> Combined:
    """The same factors and the same Δ, described by `alpha / √rank` with rsLoRA, or by `alpha / rank`."""
    refuse_broken(one)
    adapter, many = _like(one.adapter, one.adapter.modules), len(one.adapter.modules)
    rows = tuple(  # their norms are not read: nothing changes
        ModuleDone(name, weights.rank, math.nan, 0.0, done, many)
        for done, (name, weights) in enumerate(adapter.modules.items(), 1)
    )
    return Combined(replace(adapter, rslora=rslora), rows, ())


def _placed(
    one: WeightedAdapter, base: Checkpoint, dora: bool
) -> Iterator[tuple[str, LoraWeights[LazyTensor], Sequence[Piece]]]:
    """Every module with where it lies in the base, all of them checked before the first."""
    refuse_broken(one)
    adapter = one.adapter
    wrong = [name for name, weights in adapter.modules.items() if (weights.magnitude is not None) is not dora]
    if wrong:
        what = "is no DoRA" if dora else "is DoRA already"
        raise FitError(f"{one.label}: {wrong[0]} {what}: nothing to convert")
    if not adapter.modules:
        raise UsageError(f"{one.label}: has no low-rank modules to convert")
    tensors: dict[str, Weight] = dict(weights_in(base.tensors, base.config))
    places = place(adapter, tensors, base)
    missing = [name for name in places.missing if name in adapter.modules]
    if missing:
        raise FitError(f"{one.label}: {explain_missing(tuple(missing), tensors)}")
    replaced = set(places.replaced.values())
    for name, targets in places.targets.items():
        if any(target.tensor in replaced for target in targets):
            raise FitError(f"{one.label}: {name}: the adapter also replaces the weight that it adapts")
    for name, stored in adapter.modules.items():
        weights = load_weights(stored)
        yield name, stored, pieces(name, weights, places.targets[name], tensors)


def _effective(weights: Weights, found: Sequence[Piece]) -> Matrix:
    """`diag(g)·(W + s·B·A) − W` as its rows lie in the base: of several pieces one after the other."""
    assert weights.magnitude is not None
    magnitude = weights.magnitude.double()
    ends, gains = [0], []
    for piece in found:
        norm = piece.norms(Matrix(piece.shape, piece.before).spans())
        gain = torch.where(norm > 0, magnitude[piece.of[0] : piece.of[1]] / norm, 0.0)
        gains.append(gain[None, :] if piece.transposed else gain[:, None])
        ends.append(ends[-1] + piece.shape[0])

    def rows(first: int, last: int) -> torch.Tensor:
        parts = []
        for piece, gain, start, stop in zip(found, gains, ends, ends[1:], strict=False):
            low, high = max(first, start) - start, min(last, stop) - start
            if low < high:
                mine = gain if piece.transposed else gain[low:high]
                parts.append(piece.direction(low, high) * mine - piece.before(low, high))
        return torch.cat(parts)

    return Matrix((ends[-1], found[0].shape[1]), rows)


def _like(adapter: Adapter, modules: dict[str, LoraWeights[LazyTensor]]) -> Adapter:
    """`adapter` with other modules, whose config is to be written anew."""
    ordered = {name: modules[name] for name in adapter.modules}
    return replace(adapter, format="", modules=ordered, rslora=False, config={})
