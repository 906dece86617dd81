"""How alike adapters are, module by module: angles, distances, subspaces and signs of their Δs, by their factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from adapterkit.adapter.weights import WeightedAdapter, refuse_broken
from adapterkit.algebra.lowrank import Product, added, decompose, inner, overlaps
from adapterkit.combining.combine import batches, check_fit, parts_of
from adapterkit.combining.method import Part
from adapterkit.combining.plan import relative_error
from adapterkit.errors import FitError, UsageError
from adapterkit.inspection.summary import layer_of, target_of

SAMPLED_ROWS = 32  # of each Δ, for the signs of its elements


@dataclass(frozen=True, slots=True)
class Alike:
    """How two Δs agree: one module's, or with `name` None all of them together as one long vector."""

    name: str | None
    layer: int | None
    target: str | None
    cosine: float  # ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖)
    distance: float  # ‖Δ₁ − Δ₂‖ / ‖Δ₁‖
    norm_ratio: float  # ‖Δ₂‖ / ‖Δ₁‖
    overlap_in: float  # φ of all right singular vectors: which inputs they listen to
    overlap_out: float  # φ of all left ones: what they write
    sign_conflict: float  # of the elements, whose signs differ; by a sample of rows
    lost: float  # relative error of Δ₁ + Δ₂ at the greater of the two ranks
    phi: tuple[tuple[float, ...], ...] = ()  # φ(i, j) of the right singular vectors (LoRA, arXiv 2106.09685, eq. 4)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two adapters compared: in all, and in each module that both have; how many modules only one of them has."""

    first: str
    second: str
    total: Alike
    modules: tuple[Alike, ...]
    alone: tuple[int, int]


def compare(
    given: Sequence[WeightedAdapter], on_module: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Pair]:
    """Compare every two of the adapters by their weighted Δs.

    Of DoRA modules it is the low-rank part that is compared. `on_module` is called with how many modules are done, of
    how many in all pairs. Raises FitError where shapes differ or no module is shared.
    """
    if len(given) < 2:
        raise UsageError("give at least two adapters to compare")
    for one in given:
        refuse_broken(one)
    pairs = list(combinations(given, 2))
    done, total = 0, sum(len(a.adapter.modules.keys() & b.adapter.modules.keys()) for a, b in pairs)
    for pair in pairs:
        first, second = pair
        both = dict.fromkeys(name for name in first.adapter.modules if name in second.adapter.modules)
        check_fit(pair, dict.fromkeys((*first.adapter.modules, *second.adapter.modules)))
        if not both:
            whole = ", ".join(dict.fromkeys((*first.adapter.replaced, *second.adapter.replaced)))
            raise FitError(
                f"{first.label} and {second.label}: hold no low-rank modules to compare, only {whole or 'tokens'}"
            )
        rows: dict[str, tuple[Alike, _Sums]] = {}
        for batch in batches(pair, both):
            a, b = parts_of(pair, batch)
            for name, found in zip(batch, _measure(a, b, len(batch)), strict=True):
                rows[name] = found.as_row(name), found
            on_module(done := done + len(batch), total)
        alone = (len(first.adapter.modules) - len(both), len(second.adapter.modules) - len(both))
        in_all = _Sums.of([rows[name][1] for name in both]).as_row(None)
        yield Pair(first.label, second.label, in_all, tuple(rows[name][0] for name in both), alone)


@dataclass(frozen=True, slots=True)
class _Sums:
    """What adds up over modules: squares, products, signs; overlaps as they are, weighted by nothing."""

    inner: float
    first: float
    second: float
    between: float  # ‖Δ₁ − Δ₂‖²
    both: float  # ‖Δ₁ + Δ₂‖²
    lost: float
    differ: int
    signs: int
    overlap_in: float
    overlap_out: float
    phi: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, parts: Sequence[_Sums]) -> _Sums:
        def total(name: str) -> float:
            return math.fsum(getattr(part, name) for part in parts)

        return cls(
            total("inner"), total("first"), total("second"), total("between"), total("both"), total("lost"),
            int(total("differ")), int(total("signs")), total("overlap_in") / len(parts),
            total("overlap_out") / len(parts),
        )  # fmt: skip

    def as_row(self, name: str | None) -> Alike:
        norms = math.sqrt(self.first * self.second)
        return Alike(
            name,
            None if name is None else layer_of(name),
            None if name is None else target_of(name),
            self.inner / norms if norms else math.nan,
            math.sqrt(self.between / self.first) if self.first else math.nan,
            math.sqrt(self.second / self.first) if self.first else math.nan,
            self.overlap_in,
            self.overlap_out,
            self.differ / self.signs if self.signs else 0.0,
            relative_error(self.lost, self.both),
            self.phi,
        )


def _measure(a: Part, b: Part, modules: int) -> Iterator[_Sums]:
    """Every module of a batch; stacked experts count as one matrix with these blocks."""
    one, other = a.delta.times(a.weight), b.delta.times(b.weight)
    experts = len(one.left) // modules
    products = inner(one, other)
    squares = [decompose(product) for product in (one, other)]
    between = decompose(added([one, other.times(-1.0)])).sigma.square().sum(-1)
    together = decompose(added([one, other])).sigma.square()
    lost = together[..., max(one.rank, other.rank) :].sum(-1)
    inside, outside = (overlaps(getattr(squares[0], side), getattr(squares[1], side)) for side in "VU")
    differ, signs = _signs(one, other)
    for index in range(modules):
        span = slice(index * experts, (index + 1) * experts)
        yield _Sums(
            float(products[span].sum()),
            float(squares[0].sigma[span].square().sum()),
            float(squares[1].sigma[span].square().sum()),
            float(between[span].sum()),
            float(together[span].sum()),
            float(lost[span].sum()),
            int(differ[span].sum()),
            int(signs[span].sum()),
            float(inside[span, -1, -1].mean()),
            float(outside[span, -1, -1].mean()),
            tuple(map(tuple, inside[span].mean(0).tolist())),
        )


def _signs(one: Product, other: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """Of how many elements, of a sample of rows, the signs differ, and how many are not zero in both."""
    step = max(1, one.left.shape[-2] // SAMPLED_ROWS)
    first, second = (product.left[..., ::step, :] @ product.right for product in (one, other))
    signs = first.sign() * second.sign()
    return (signs < 0).sum((-2, -1)), (signs != 0).sum((-2, -1))
