"""Adapters combined into one, module by module: their shares gathered and checked, and the result with its error."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch

from adapterkit.adapter.weights import Adapter, LazyTensor, LoraWeights, WeightedAdapter, load_weights, refuse_broken
from adapterkit.algebra.lowrank import Decomposition, Limit, Product, decompose, inner, stacked, tails
from adapterkit.algebra.sketch import sketch
from adapterkit.combining.method import Method, Part, Value
from adapterkit.combining.methods import DEFAULT, method_named
from adapterkit.combining.plan import AdapterMade, ModuleDone
from adapterkit.combining.whole_tensors import RULES, Wholes, pick_wholes
from adapterkit.errors import FitError, UsageError

WINDOW_BYTES = 64 << 20  # of factors in float64, combined at a time

CANCELLED = 1e-24  # of the parts' ‖Δ‖_F²: less is what float64 leaves of a sum that is zero

Weights = LoraWeights[torch.Tensor]


@dataclass(frozen=True)
class Combination:
    """Adapters that fit each other, and how they are combined; made by `checked`."""

    given: tuple[WeightedAdapter, ...]
    method: str
    limit: Limit | None
    settings: Mapping[str, Value]
    wholes: Wholes
    notes: tuple[str, ...]
    pad: bool = False  # a rank above a module's own is made up by zeros
    uniform: bool = False  # every module has the greatest rank that one of them needs

    @property
    def modules(self) -> int:
        return len(_modules(self.given))

    def steps(self) -> Iterator[ModuleDone | AdapterMade]:
        """Combine the modules of all adapters: an event for each of them, the result last."""
        if self.uniform:
            yield from _same_rank(self)
            return
        given, limit, modules = self.given, self.limit, _modules(self.given)
        done: dict[str, tuple[Weights, ModuleDone]] = {}
        method = method_named(self.method)
        for batch in batches(given, modules, most=1 if method.elementwise else None):  # each of those takes seconds
            for name, weights, energy, discarded in _combine_batch(given, batch, method, limit, self.settings):
                if self.pad and limit is not None and limit.rank is not None and weights.rank < limit.rank:
                    weights = replace(weights_of(Product.of(weights).padded(limit.rank), weights), bias=weights.bias)
                row = ModuleDone(name, weights.rank, energy, discarded, len(done) + 1, len(modules))
                done[name] = weights, row
                yield row
        found = {name: _lazy(done[name][0]) for name in modules}
        rows = tuple(done[name][1] for name in modules)
        yield AdapterMade(_joined(given, found, self.wholes), rows, tuple(_nothing_left(rows)))


def checked(
    given: Sequence[WeightedAdapter],
    method: str = DEFAULT,
    *,
    limit: Limit | None = None,
    options: Mapping[str, Value] | None = None,
    seed: int | None = None,
    saved: str = "error",
    pad: bool = False,
    uniform: bool = False,
) -> Combination:
    """The combination of all adapters' modules by `method`, checked from headers.

    Without a `limit` the result is exact, except for methods that always truncate, to the greatest rank among the
    adapters. Raises UsageError for what a method does not take, FitError where adapters do not fit each other.
    """
    how = method_named(method)
    settings = how.settings(options or {}, seed)
    _check_truncation(how, limit)
    if saved not in RULES:
        raise UsageError(f"saved {saved!r}: expected one of {', '.join(RULES)}")
    for one in given:
        refuse_broken(one)
    modules = _modules(given)
    notes = _check(given, modules, how)
    if limit is not None and limit.rank is not None:
        _check_rank(given, modules, limit.rank, pad)
    wholes = pick_wholes(given, saved)
    notes += wholes.notes if len(given) > 1 else []
    return Combination(tuple(given), method, limit, settings, wholes, tuple(notes), pad, uniform)


def _same_rank(how: Combination) -> Iterator[ModuleDone | AdapterMade]:
    """The combination with the greatest rank that its limit asks for in a module."""
    *_, needed = replace(how, uniform=False).steps()
    assert isinstance(needed, AdapterMade)
    rank = max((row.rank for row in needed.modules), default=1)
    _check_rank(how.given, _modules(how.given), rank, pad=True)
    yield from replace(how, limit=Limit(rank=rank), pad=True, uniform=False).steps()


def _modules(given: Sequence[WeightedAdapter]) -> dict[str, None]:
    """The modules that any of the adapters has, in order."""
    return {name: None for one in given for name in one.adapter.modules}


def _joined(given: Sequence[WeightedAdapter], modules: dict[str, LoraWeights[LazyTensor]], wholes: Wholes) -> Adapter:
    """The new adapter, with what it has from those `given` beside its modules."""
    replaced, tokens = wholes.read()
    base = next((one.adapter.base_model for one in given if one.adapter.base_model), None)
    return Adapter(
        "", modules, replaced, tokens, frozenset().union(*(one.adapter.new_modules for one in given)),
        any(one.adapter.keeps_tie for one in given), base,
        target_parameters=tuple(dict.fromkeys(name for one in given for name in one.adapter.target_parameters)),
    )  # fmt: skip


def _nothing_left(rows: Sequence[ModuleDone]) -> list[str]:
    """What to say of modules whose result is zero."""
    gone = [row.name for row in rows if row.energy == 0]
    if not gone:
        return []
    which = "any module" if len(gone) == len(rows) else f"{len(gone)} of {len(rows)} modules (first: {gone[0]})"
    return [f"nothing is left of {which}: the adapters cancel out, or are zero"]


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_truncation(method: Method[..., Any], limit: Limit | None) -> None:
    """Raise UsageError where a limit makes no sense, or the method keeps every rank."""
    if limit is not None and method.truncate == "never":
        raise UsageError(f"{method.name} keeps every rank: to truncate take {DEFAULT}")
    check_limit(limit)


def check_limit(limit: Limit | None) -> None:
    """Raise UsageError where a limit makes no sense."""
    if limit is None:
        return
    for name, kind in (("rank", Integral), ("energy", Real), ("error", Real)):
        value = getattr(limit, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UsageError(f"{name} {value!r}: expected a {'whole ' if kind is Integral else ''}number")
    if limit.rank is not None and limit.rank < 1:
        raise UsageError(f"rank {limit.rank}: expected at least 1")
    if limit.energy is not None and not 0 < limit.energy <= 1:
        raise UsageError(f"energy {limit.energy}: expected a share above 0 and up to 1")
    if limit.error is not None and not 0 <= limit.error < 1:
        raise UsageError(f"error {limit.error}: expected a share from 0 to below 1")
    if [limit.rank, limit.energy, limit.error].count(None) < 2:
        raise UsageError("rank, energy and error each say how much to keep: give one of them")


def _check(given: Sequence[WeightedAdapter], modules: Mapping[str, None], method: Method[..., Any]) -> list[str]:
    """Refuse adapters that do not go together; what a person should know where they do."""
    for one in given:
        mine = one.adapter.modules
        dora = [name for name, weights in mine.items() if weights.magnitude is not None]
        if dora:
            raise FitError(
                f"{one.label}: {dora[0]} is DoRA, so its Δ depends on the base", hint="convert it to LoRA first"
            )
        if not method.biases and any(weights.bias is not None for weights in mine.values()):
            raise FitError(
                f"{one.label}: has trained biases (lora_bias), which {method.name} has no rule for; {DEFAULT} adds them"
            )
    check_fit(given, modules)
    notes = []
    alone = [name for name in modules if sum(name in one.adapter.modules for one in given) < len(given)]
    if alone:
        notes.append(
            f"{len(alone)} of {len(modules)} modules are not in every adapter, as {alone[0]}: their share counts"
        )
    bases = {one.adapter.base_model: one.label for one in given if one.adapter.base_model}
    if len(bases) > 1:
        notes.append("made for different bases by name: " + ", ".join(f"{who}: {base}" for base, who in bases.items()))
    return notes


def check_fit(given: Sequence[WeightedAdapter], modules: Mapping[str, None]) -> None:
    """Raise FitError where an adapter shares no module with the others, or one has another shape in them."""
    for one in given:
        mine, others = one.adapter.modules, [other.adapter.modules for other in given if other is not one]
        if others and mine and not any(name in other for other in others for name in mine):
            here, there = next(iter(mine)), next((name for other in others for name in other), "none")
            raise FitError(f"{one.label}: shares no module with the others ({here} here, {there} there)")
    for name in modules:
        having = [(one, one.adapter.modules[name]) for one in given if name in one.adapter.modules]
        (first, like), *rest = having
        for other, weights in rest:
            if _shape(weights) != _shape(like):
                raise FitError(
                    f"{name}: Δ is {_shape(like)[0]} in {first.label} and {_shape(weights)[0]} in {other.label}. "
                    "Were they trained on the same base?"
                )


def _shape(weights: LoraWeights[LazyTensor]) -> tuple[object, ...]:
    """What has to be equal in adapters that are combined: the shape of Δ and how it lies in the base."""
    return (weights.out_features, *weights.A.shape[1:]), weights.kind, weights.experts, weights.parameters


def _check_rank(given: Sequence[WeightedAdapter], modules: Mapping[str, None], rank: int, pad: bool) -> None:
    """Refuse a rank that no module can have."""
    if pad:
        for name in modules:
            weights = next(one.adapter.modules[name] for one in given if name in one.adapter.modules)
            most = min(weights.in_features, weights.out_features)
            if rank > most:
                raise FitError(
                    f"{name}: Δ is {weights.out_features} × {weights.in_features}: rank {rank} is above {most}"
                )
        return
    ranks = (sum(o.adapter.modules[name].rank for o in given if name in o.adapter.modules) for name in modules)
    most = max(ranks, default=0)
    if rank > most:
        raise UsageError(f"rank {rank}: the adapters have {most} together; adapterkit resize pads a rank upwards")


# --- modules ---------------------------------------------------------------------------------------------------------


def batches(
    given: Sequence[WeightedAdapter], modules: Mapping[str, None], most: int | None = None
) -> Iterator[list[str]]:
    """Modules of equal shapes and ranks, in the same adapters, as many as fit a window, or at `most`."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name in modules:
        held = {one.label: one.adapter.modules[name] for one in given if name in one.adapter.modules}
        groups[tuple((label, w.B.shape, _shape(w), w.bias is None) for label, w in held.items())].append(name)
    for names in groups.values():
        held = {one.label: one.adapter.modules[names[0]] for one in given if names[0] in one.adapter.modules}
        size = sum(8 * math.prod(tensor.shape) for weights in held.values() for tensor in (weights.A, weights.B))
        step = most or max(1, WINDOW_BYTES // size)
        yield from (names[first : first + step] for first in range(0, len(names), step))


def _combine_batch(
    given: Sequence[WeightedAdapter],
    names: list[str],
    method: Method[..., Any],
    limit: Limit | None,
    settings: Mapping[str, Value],
) -> Iterator[tuple[str, Weights, float, float]]:
    """Each module's new weights, its energy as meant, and the energy left out."""
    held = [one for one in given if names[0] in one.adapter.modules]
    loaded = [[_finite(one, name) for name in names] for one in held]
    parts = [_part(one.weight, weights) for one, weights in zip(held, loaded, strict=True)]
    experts = loaded[0][0].experts
    least = CANCELLED * torch.stack([part.weight**2 * inner(part.delta, part.delta) for part in parts]).sum(0)
    if method.truncate == "always" and limit is None:
        limit = Limit(rank=max(part.factors.rank for part in parts))
    if method.elementwise:
        assert limit is not None
        matrices = [f"{name}.{expert}" for name in names for expert in range(experts)]
        found, beyond = _sketches(parts, matrices, method, limit, settings)
    else:
        product = method(parts, **settings)
        if limit is None and product.rank <= product.most:
            for index, name in enumerate(names):
                span = slice(index * experts, (index + 1) * experts)
                mine = Product(product.left[span], product.right[span])
                energy = _energy(mine)
                yield name, _new(mine, held, loaded, index), energy if energy > least[span].sum() else 0.0, 0.0
            return
        found, beyond = decompose(product), torch.zeros(len(product.left), dtype=torch.float64)
    for index, name in enumerate(names):
        span = slice(index * experts, (index + 1) * experts)
        best, energy, discarded = best_of(found[span], beyond[span], limit)
        if energy <= least[span].sum():
            energy = discarded = 0.0
        yield name, _new(best, held, loaded, index), energy, discarded


def best_of(found: Decomposition, beyond: torch.Tensor, limit: Limit | None) -> tuple[Product, float, float]:
    """The best approximation of each of a batch within `limit`, of one rank; its energy as meant, and that left out.

    `beyond (batch,)` is the energy that the decomposition does not have.
    """
    limit = limit or Limit(rank=found.sigma.shape[-1])
    rests = torch.stack([tails(sigma) + more for sigma, more in zip(found.sigma, beyond, strict=True)])
    ranks = [limit.rank_for(sigma, float(more)) for sigma, more in zip(found.sigma, beyond, strict=True)]
    return found.first(max(ranks)), float(rests[:, 0].sum()), float(rests[:, max(ranks)].sum())


def _new(product: Product, held: Sequence[WeightedAdapter], loaded: Sequence[Sequence[Weights]], index: int) -> Weights:
    """The new weights of a module, with `Σ weight · scaling · bias` as its bias, since its own scaling is 1."""
    biases = [
        one.weight * weights[index].scaling * bias.double()
        for one, weights in zip(held, loaded, strict=True)
        if (bias := weights[index].bias) is not None
    ]
    new = weights_of(product, loaded[0][index])
    return replace(new, bias=torch.stack(biases).sum(0).float()) if biases else new


def parts_of(given: Sequence[WeightedAdapter], names: Sequence[str]) -> list[Part]:
    """Each adapter's share in a batch of modules. Raises FitError where a factor is not finite."""
    return [_part(one.weight, [_finite(one, name) for name in names]) for one in given]


def _finite(one: WeightedAdapter, name: str) -> Weights:
    weights = load_weights(one.adapter.modules[name])
    for what, tensor in (("A", weights.A), ("B", weights.B), ("the bias", weights.bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise FitError(f"{one.label}: {name}: {what} holds NaN or Inf: the adapter is broken")
    return weights


def _part(weight: float, weights: Sequence[Weights]) -> Part:
    """One adapter's share in a batch of modules, experts one after the other."""
    products = [Product.of(one) for one in weights]
    factors = Product(torch.cat([one.left for one in products]), torch.cat([one.right for one in products]))
    scaling = torch.tensor([one.scaling for one in weights for _ in range(one.experts)], dtype=torch.float64)
    return Part(factors, scaling, weight)


def _sketches(
    parts: Sequence[Part], names: Sequence[str], method: Method[..., Any], limit: Limit, settings: Mapping[str, Value]
) -> tuple[Decomposition, torch.Tensor]:
    """The leading parts of Δs that are combined element by element, and the energies beyond them."""
    leading, beyond = [], []
    for index, name in enumerate(names):
        matrices = [part.matrix(index, f"{number}:{name}") for number, part in enumerate(parts)]
        found = sketch(method(matrices, **settings), limit, int(settings.get("seed", 0)), name)
        leading.append(found.leading)
        beyond.append(found.beyond)
    return stacked(leading), torch.tensor(beyond, dtype=torch.float64)


def _energy(product: Product) -> float:
    """`‖Δ‖_F²` of all of the batch."""
    left, right = torch.linalg.qr(product.left, mode="r").R, torch.linalg.qr(product.right.mT, mode="r").R
    return float((left @ right.mT).square().sum())


def weights_of(product: Product, like: Weights) -> Weights:
    """A module's float32 weights with the Δ of `product`, one for each expert, in the layout of `like`; scaling 1."""
    left, right = product.left.float(), product.right.float()
    rank = product.rank
    A = right.reshape(like.experts * rank, *like.A.shape[1:])
    B = left.permute(1, 2, 0).reshape(like.out_features, rank * like.experts, *like.B.shape[2:])
    return replace(like, A=A.contiguous(), B=B.contiguous(), scaling=1.0, alpha=float(rank), magnitude=None, bias=None)


def _lazy(weights: Weights) -> LoraWeights[LazyTensor]:
    bias = None if weights.bias is None else LazyTensor.of(weights.bias)
    return LoraWeights(
        LazyTensor.of(weights.A), LazyTensor.of(weights.B), weights.scaling, weights.alpha, None, bias, weights.kind,
        weights.experts, weights.fan_in_fan_out, weights.parameters,
    )  # fmt: skip
