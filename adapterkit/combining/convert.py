"""Convert adapters: LoRA to DoRA exactly, DoRA to LoRA with its error, and between LoRA and rsLoRA scaling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, load_weights
from adapterkit.algebra.truncation import Limit
from adapterkit.base.adapter_fit import place_adapter
from adapterkit.base.checkpoint import Checkpoint
from adapterkit.base.quant import weights as weights_in
from adapterkit.base.rename_option import explain_missing
from adapterkit.base.row_reader import Piece, check_readable
from adapterkit.base.row_reader import pieces as pieces_of
from adapterkit.base.target import Target
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.errors import FitError, UsageError
from adapterkit.files.safetensors import Weight

if TYPE_CHECKING:
    import torch

    from adapterkit.algebra.sketch import Matrix

Weights: TypeAlias = "LoraWeights[torch.Tensor]"
Converted: TypeAlias = tuple[LoraWeights[LazyTensor], float, float]  # weights, energy, energy discarded


@dataclass(frozen=True)
class Rescale:
    """The same factors and the same Δ, with the scaling stored as `alpha / √rank` (rsLoRA) or `alpha / rank`."""

    one: WeightedAdapter
    rslora: bool
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_mergeable(self.one)

    @property
    def modules(self) -> int:
        return len(self.one.adapter.modules)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per module, all unchanged, then the adapter."""
        adapter = _like(self.one.adapter, self.one.adapter.modules)
        rows = tuple(  # without norms, since nothing is read
            ModuleDone(name, weights.rank, math.nan, 0.0, done, self.modules)
            for done, (name, weights) in enumerate(adapter.modules.items(), 1)
        )
        yield from rows
        yield AdapterMade(replace(adapter, rslora=self.rslora), rows)


@dataclass(frozen=True)
class ToDora:
    """Every module with the magnitude `m = ‖W + s·B·A‖` per output, so that DoRA's factor `m/n` is 1.

    The norms are computed from `W + s·B·A` in float64, as in merging. `W·Aᵀ` and Gram matrices would take as many
    operations and suffer from cancellation.
    """

    placed: Placed
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        return len(self.placed.targets)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per module, then the adapter."""
        return convert_modules(self.placed, self._converted)

    def _converted(self, name: str, weights: Weights, pieces: Sequence[Piece]) -> Converted:
        import torch

        from adapterkit.algebra.lowrank import Product, decompose
        from adapterkit.algebra.sketch import Matrix

        magnitude = torch.cat([piece.norms(Matrix(piece.shape, piece.base_rows).spans()) for piece in pieces])
        energy = float(decompose(Product.of(weights)).sigma.square().sum()) * weights.scaling**2
        stored = self.placed.one.adapter.modules[name]
        return replace(stored, magnitude=LazyTensor.of(magnitude.float())), energy, 0.0


@dataclass(frozen=True)
class ToLora:
    """The best approximation of each DoRA module's effective `Δ = diag(g)·(W + s·B·A) − W`, `g = m/n`, as LoRA.

    That Δ has full rank; products with it are computed from rows of W and the factors (see `sketch`).
    """

    placed: Placed
    limit: Limit
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> int:
        return len(self.placed.targets)

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """An event per module, then the adapter."""
        return convert_modules(self.placed, self._converted)

    def _converted(self, name: str, weights: Weights, pieces: Sequence[Piece]) -> Converted:
        from adapterkit.algebra.lowrank import Product
        from adapterkit.algebra.sketch import sketch
        from adapterkit.combining.batches import best_of, weights_of

        best = sketch(_effective(weights, pieces), self.limit, self.seed, name)
        product, energy, discarded = best_of(*best.as_batch(), self.limit)
        if pieces[0].transposed:
            product = Product(product.right.mT, product.left.mT)
        new = weights_of(product, weights)
        bias = None if weights.bias is None else LazyTensor.of((weights.bias.double() * weights.scaling).float())
        converted = replace(
            self.placed.one.adapter.modules[name], A=LazyTensor.of(new.A), B=LazyTensor.of(new.B), scaling=1.0,
            alpha=float(new.rank), magnitude=None, bias=bias,
        )  # fmt: skip
        return converted, energy, discarded


@dataclass(frozen=True)
class Placed:
    """An adapter and the tensors of a base that its modules act on, all readable; made by `placed_in`."""

    one: WeightedAdapter
    base: Checkpoint
    targets: dict[str, tuple[Target, ...]]

    def read(self) -> Iterator[tuple[str, Weights, Sequence[Piece]]]:
        """The name and weights of each module, and the pieces of the base that it acts on."""
        tensors = weights_in(self.base.tensors, self.base.config)
        for name, targets in self.targets.items():
            weights = load_weights(self.one.adapter.modules[name])
            yield name, weights, pieces_of(name, weights, targets, tensors)


def placed_in(base: Checkpoint, one: WeightedAdapter, dora: bool) -> Placed:
    """Find the modules of an adapter in `base`, from headers; `dora` is the kind that all modules must have.

    Raises FitError if a module has another kind, does not exist in the base, or cannot be read there.
    """
    check_mergeable(one)
    adapter = one.adapter
    wrong = [name for name, weights in adapter.modules.items() if (weights.magnitude is not None) is not dora]
    if wrong:
        raise FitError(f"{one.label}: {wrong[0]} is {'not' if dora else 'already'} DoRA")
    if not adapter.modules:
        raise UsageError(f"{one.label}: no low-rank modules to convert")
    tensors: dict[str, Weight] = dict(weights_in(base.tensors, base.config))
    places = place_adapter(adapter, tensors, base)
    missing = [name for name in places.missing if name in adapter.modules]
    if missing:
        raise FitError(f"{one.label}: {explain_missing(tuple(missing), tensors)}")
    replaced = set(places.replaced.values())
    for name, targets in places.targets.items():
        if any(target.tensor in replaced for target in targets):
            raise FitError(f"{one.label}: {name}: the adapter also replaces the weight that it adapts")
        check_readable(name, adapter.modules[name], targets, tensors)
    return Placed(one, base, {name: tuple(targets) for name, targets in places.targets.items()})


def convert_modules(
    placed: Placed, convert: Callable[[str, Weights, Sequence[Piece]], Converted]
) -> Iterator[ModuleDone | AdapterMade]:
    """Convert each module: an event per module, then the adapter."""
    done: dict[str, LoraWeights[LazyTensor]] = {}
    rows = []
    for name, weights, pieces in placed.read():
        done[name], energy, discarded = convert(name, weights, pieces)
        rows.append(ModuleDone(name, done[name].rank, energy, discarded, len(done), len(placed.targets)))
        yield rows[-1]
    yield AdapterMade(_like(placed.one.adapter, done), tuple(rows))


def _effective(weights: Weights, pieces: Sequence[Piece]) -> Matrix:
    """`diag(g)·(W + s·B·A) − W` in the layout of the base, with the pieces one after the other."""
    import torch

    from adapterkit.algebra.sketch import Matrix

    assert weights.magnitude is not None
    magnitude = weights.magnitude.double()
    ends, gains = [0], []
    for piece in pieces:
        norm = piece.norms(Matrix(piece.shape, piece.base_rows).spans())
        gain = torch.where(norm > 0, magnitude[piece.delta_rows[0] : piece.delta_rows[1]] / norm, 0.0)
        gains.append(gain[None, :] if piece.transposed else gain[:, None])
        ends.append(ends[-1] + piece.shape[0])

    def rows(first: int, last: int) -> torch.Tensor:
        parts = []
        for piece, gain, start, stop in zip(pieces, gains, ends, ends[1:], strict=False):
            low, high = max(first, start) - start, min(last, stop) - start
            if low < high:
                mine = gain if piece.transposed else gain[low:high]
                parts.append(piece.direction(low, high) * mine - piece.base_rows(low, high))
        return torch.cat(parts)

    return Matrix((ends[-1], pieces[0].shape[1]), rows)


def _like(adapter: Adapter, modules: dict[str, LoraWeights[LazyTensor]]) -> Adapter:
    """`adapter` with other modules and without its config, which no longer describes them."""
    ordered = {name: modules[name] for name in adapter.modules}
    return replace(adapter, format="", modules=ordered, rslora=False, initialization="", config={}, problems=())
