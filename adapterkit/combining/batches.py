"""Combine modules of equal shapes as one batch: load them, apply the method, truncate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapterkit.adapter.weighted import WeightedAdapter
from adapterkit.adapter.weights import LoraWeights, load_weights
from adapterkit.algebra.lowrank import Decomposition, Product, decompose, inner, stacked
from adapterkit.algebra.sketch import sketch
from adapterkit.algebra.truncation import Limit, tails
from adapterkit.combining.checks import layout_of
from adapterkit.combining.method import Method, Part, Value
from adapterkit.errors import FitError

WINDOW_BYTES = 64 << 20  # maximum size of the float64 factors of a batch

CANCELLED = 1e-24  # share of the parts' ‖Δ‖_F² below which a sum is the rounding of float64, so zero

Weights = LoraWeights[torch.Tensor]


def batches(
    adapters: Sequence[WeightedAdapter], modules: Mapping[str, None], most: int | None = None
) -> Iterator[list[str]]:
    """Group modules of equal shapes, ranks and weights that the same adapters have, by window size or up to `most`."""
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name in modules:
        having = [(one, one.adapter.modules[name]) for one in adapters if name in one.adapter.modules]
        key = ((one.label, one.weight_of(name), w.B.shape, layout_of(w), w.bias is None) for one, w in having)
        groups[tuple(key)].append(name)
    for names in groups.values():
        factors = [one.adapter.modules[names[0]] for one in adapters if names[0] in one.adapter.modules]
        size = sum(8 * math.prod(tensor.shape) for weights in factors for tensor in (weights.A, weights.B))
        step = most or max(1, WINDOW_BYTES // size)
        yield from (names[first : first + step] for first in range(0, len(names), step))


@dataclass(frozen=True, slots=True)
class CombinedModule:
    """The new weights of a module, `‖Δ‖_F²` before truncation, and the part of it that truncation discarded."""

    name: str
    weights: Weights
    energy: float
    discarded: float


def combine_batch(
    adapters: Sequence[WeightedAdapter],
    names: list[str],
    method: Method[..., Any],
    limit: Limit | None,
    settings: Mapping[str, Value],
) -> Iterator[CombinedModule]:
    """Combine a batch of modules by `method`, truncated within `limit`."""
    having = [one for one in adapters if names[0] in one.adapter.modules]
    loaded = [[_finite(one, name) for name in names] for one in having]
    parts = [_part(one.weight_of(names[0]), weights) for one, weights in zip(having, loaded, strict=True)]
    experts = loaded[0][0].experts
    spans = [slice(index * experts, (index + 1) * experts) for index in range(len(names))]
    noise = CANCELLED * torch.stack([part.weight**2 * inner(part.delta, part.delta) for part in parts]).sum(0)
    if method.truncate == "always" and limit is None:
        limit = Limit(rank=max(part.factors.rank for part in parts))
    if method.elementwise:
        assert limit is not None
        matrices = [f"{name}.{expert}" for name in names for expert in range(experts)]
        found, beyond = _sketches(parts, matrices, method, limit, settings)
        results = [best_of(found[span], beyond[span], limit) for span in spans]
    else:
        product = method(parts, **settings)
        if limit is None and product.rank <= product.max_rank:
            exact = [Product(product.left[span], product.right[span]) for span in spans]
            results = [(one, _energy(one), 0.0) for one in exact]
        else:
            found, beyond = decompose(product), torch.zeros(len(product.left), dtype=torch.float64)
            results = [best_of(found[span], beyond[span], limit) for span in spans]
    for index, (name, span, (best, energy, discarded)) in enumerate(zip(names, spans, results, strict=True)):
        if energy <= noise[span].sum():
            energy = discarded = 0.0
        yield CombinedModule(name, _combined_weights(best, parts, loaded, index), energy, discarded)


def best_of(found: Decomposition, beyond: torch.Tensor, limit: Limit | None) -> tuple[Product, float, float]:
    """The best approximations of a batch within `limit`, all of one rank; the total energy, and the energy discarded.

    `beyond (batch,)` is the energy that is missing from the decomposition.
    """
    limit = limit or Limit(rank=found.sigma.shape[-1])
    rests = torch.stack([tails(sigma) + more for sigma, more in zip(found.sigma, beyond, strict=True)])
    ranks = [limit.rank_for(sigma, float(more)) for sigma, more in zip(found.sigma, beyond, strict=True)]
    return found.first(max(ranks)), float(rests[:, 0].sum()), float(rests[:, max(ranks)].sum())


def parts_of(adapters: Sequence[WeightedAdapter], names: Sequence[str]) -> list[Part]:
    """The part of each adapter in a batch of modules. Raises FitError if a factor is not finite."""
    return [_part(one.weight_of(names[0]), [_finite(one, name) for name in names]) for one in adapters]


def weights_of(product: Product, like: Weights) -> Weights:
    """Float32 weights for the Δ of `product`, a batch over the experts, in the layout of `like`; the scaling is 1."""
    left, right = product.left.float(), product.right.float()
    rank = product.rank
    A = right.reshape(like.experts * rank, *like.A.shape[1:])
    B = left.permute(1, 2, 0).reshape(like.out_features, rank * like.experts, *like.B.shape[2:])
    return replace(like, A=A.contiguous(), B=B.contiguous(), scaling=1.0, alpha=float(rank), magnitude=None, bias=None)


def _combined_weights(
    product: Product, parts: Sequence[Part], loaded: Sequence[Sequence[Weights]], index: int
) -> Weights:
    """The weights of a combined module, with `Σ weight · scaling · bias` as the bias, since the new scaling is 1."""
    biases = [
        part.weight * weights[index].scaling * bias.double()
        for part, weights in zip(parts, loaded, strict=True)
        if (bias := weights[index].bias) is not None
    ]
    new = weights_of(product, loaded[0][index])
    return replace(new, bias=torch.stack(biases).sum(0).float()) if biases else new


def _finite(one: WeightedAdapter, name: str) -> Weights:
    weights = load_weights(one.adapter.modules[name])
    for what, tensor in (("A", weights.A), ("B", weights.B), ("bias", weights.bias)):
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise FitError(f"{one.label}: {name}: {what} contains NaN or Inf: the adapter is broken")
    return weights


def _part(weight: float, weights: Sequence[Weights]) -> Part:
    """One adapter's part in a batch of modules: a matrix per module and expert."""
    products = [Product.of(one) for one in weights]
    factors = Product(torch.cat([one.left for one in products]), torch.cat([one.right for one in products]))
    scaling = torch.tensor([one.scaling for one in weights for _ in range(one.experts)], dtype=torch.float64)
    return Part(factors, scaling, weight)


def _sketches(
    parts: Sequence[Part], names: Sequence[str], method: Method[..., Any], limit: Limit, settings: Mapping[str, Value]
) -> tuple[Decomposition, torch.Tensor]:
    """The leading singular values and vectors of Δs combined elementwise, and the energies beyond them."""
    leading, beyond = [], []
    for index, name in enumerate(names):
        matrices = [part.matrix(index, f"{number}:{name}") for number, part in enumerate(parts)]
        found = sketch(method(matrices, **settings), limit, int(settings.get("seed", 0)), name)
        leading.append(found.leading)
        beyond.append(found.beyond)
    return stacked(leading), torch.tensor(beyond, dtype=torch.float64)


def _energy(product: Product) -> float:
    """`‖Δ‖_F²`, summed over the batch."""
    left, right = torch.linalg.qr(product.left, mode="r").R, torch.linalg.qr(product.right.mT, mode="r").R
    return float((left @ right.mT).square().sum())
