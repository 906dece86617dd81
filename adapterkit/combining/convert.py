"""One kind of adapter made another: LoRA to DoRA exactly, DoRA to LoRA with its error, one scaling for another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, WeightedAdapter, load_weights, refuse_broken
from adapterkit.algebra.lowrank import Limit, Product, decompose
from adapterkit.algebra.sketch import Matrix, sketch
from adapterkit.base.adapter_fit import place
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.row_reader import Piece, check_readable, pieces
from adapterkit.base.targets import Target
from adapterkit.combining.combine import best_of, weights_of
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import Weight

Weights = LoraWeights[torch.Tensor]


@dataclass(frozen=True)
class Rescale:
    """The same factors and the same Δ, described by `alpha / √rank` with rsLoRA, or by `alpha / rank`."""

    one: WeightedAdapter
    rslora: bool
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_broken(self.one)

    @property
    def modules(self) -> int:
        return len(self.one.adapter.modules)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Every module as it is, the adapter last."""
        adapter = _like(self.one.adapter, self.one.adapter.modules)
        rows = tuple(  # their norms are not read: nothing changes
            ModuleDone(name, weights.rank, math.nan, 0.0, done, self.modules)
            for done, (name, weights) in enumerate(adapter.modules.items(), 1)
        )
        yield from rows
        yield AdapterMade(replace(adapter, rslora=self.rslora), rows)


@dataclass(frozen=True)
class ToDora:
    """Give every module the magnitude `m = ‖W + s·B·A‖` of each output, by which DoRA's `m/n` is 1.

    The norms are of `W + s·B·A` as merging forms it, in float64: as many operations as through `W·Aᵀ` and the Gram
    matrices, and no cancellation.
    """

    placed: Placed
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        return len(self.placed.targets)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Every module with its magnitude, the adapter last."""
        adapter = self.placed.one.adapter
        done: dict[str, LoraWeights[LazyTensor]] = {}
        rows = []
        for name, weights, found in self.placed.read():
            stored = adapter.modules[name]
            magnitude = torch.cat([piece.norms(Matrix(piece.shape, piece.before).spans()) for piece in found])
            energy = float(decompose(Product.of(weights)).sigma.square().sum()) * stored.scaling**2
            done[name] = replace(stored, magnitude=LazyTensor.of(magnitude.float()))
            rows.append(ModuleDone(name, stored.rank, energy, 0.0, len(done), self.modules))
            yield rows[-1]
        yield AdapterMade(_like(adapter, done), tuple(rows))


@dataclass(frozen=True)
class ToLora:
    """The best approximation of each DoRA module's effective `Δ = diag(g)·(W + s·B·A) − W`, `g = m/n`, as LoRA.

    That Δ is of full rank: products with it are computed from rows of W and the factors (see `sketch`).
    """

    placed: Placed
    limit: Limit
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        return len(self.placed.targets)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Every module approximated, the adapter last."""
        adapter = self.placed.one.adapter
        done: dict[str, LoraWeights[LazyTensor]] = {}
        rows = []
        for name, weights, found in self.placed.read():
            best = sketch(_effective(weights, found), self.limit, self.seed, name)
            product, energy, discarded = best_of(*best.as_batch(), self.limit)
            if found[0].transposed:
                product = Product(product.right.mT, product.left.mT)
            new = weights_of(product, weights)
            bias = None if weights.bias is None else LazyTensor.of((weights.bias.double() * weights.scaling).float())
            done[name] = replace(
                adapter.modules[name], A=LazyTensor.of(new.A), B=LazyTensor.of(new.B), scaling=1.0,
                alpha=float(new.rank), magnitude=None, bias=bias,
            )  # fmt: skip
            rows.append(ModuleDone(name, new.rank, energy, discarded, len(done), self.modules))
            yield rows[-1]
        yield AdapterMade(_like(adapter, done), tuple(rows))


@dataclass(frozen=True)
class Placed:
    """An adapter whose modules all have their place in a base, where each can be read; made by `placed_in`."""

    one: WeightedAdapter
    base: Checkpoint
    targets: dict[str, tuple[Target, ...]]

    def read(self) -> Iterator[tuple[str, Weights, Sequence[Piece]]]:
        """Every module's weights, and where it lies in the base."""
        tensors = weights_in(self.base.tensors, self.base.config)
        for name, targets in self.targets.items():
            weights = load_weights(self.one.adapter.modules[name])
            yield name, weights, pieces(name, weights, targets, tensors)


def placed_in(base: Checkpoint, one: WeightedAdapter, dora: bool) -> Placed:
    """Where the modules of an adapter lie in `base`, from headers.

    Raises FitError where one has no place there or cannot be read, or is not the kind of module that `dora` says.
    """
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
        check_readable(name, adapter.modules[name], targets, tensors)
    return Placed(one, base, {name: tuple(targets) for name, targets in places.targets.items()})


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
