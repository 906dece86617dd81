"""Compare adapters module by module: angles, distances, subspaces and signs of their Δs, from the factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from adapterkit.adapter.module_names import layer_of, target_of
from adapterkit.adapter.weighted import WeightedAdapter, check_mergeable
from adapterkit.algebra.lowrank import Product, added, decompose, inner, overlaps
from adapterkit.combining.batches import batches, parts_of
from adapterkit.combining.checks import check_fit
from adapterkit.combining.method import Part
from adapterkit.combining.orientation import aligned
from adapterkit.combining.plan import relative_error
from adapterkit.errors import FitError, UsageError
from adapterkit.reprs import Displayed
from adapterkit.text import counted, number

SAMPLED_ROWS = 32  # rows of each Δ whose signs are compared


@dataclass(frozen=True, slots=True, repr=False)
class Similarity(Displayed):
    """Similarity of two Δs of one module, or of all modules as one vector, with `name` None."""

    name: str | None
    layer: int | None
    target: str | None
    cosine: float  # ⟨Δ₁, Δ₂⟩ / (‖Δ₁‖·‖Δ₂‖)
    distance: float  # ‖Δ₁ − Δ₂‖ / ‖Δ₁‖
    norm_ratio: float  # ‖Δ₂‖ / ‖Δ₁‖
    overlap_in: float  # φ of all right singular vectors: the input subspaces
    overlap_out: float  # φ of all left singular vectors: the output subspaces
    sign_conflict: float  # share of elements with different signs, in a sample of rows
    lost: float  # relative error of Δ₁ + Δ₂ at the higher of the two ranks
    phi: tuple[tuple[float, ...], ...] = ()  # φ(i, j) of the right singular vectors (LoRA, arXiv 2106.09685, eq. 4)

    def brief(self) -> str:
        return f"{self.name or 'in all'}, cosine {self.cosine:+.3f}"

    def lines(self) -> list[str]:
        return [
            f"cosine    {self.cosine:+.3f}",
            f"distance  {number(self.distance)} × the first norm",
            f"norm      {number(self.norm_ratio)} × the first norm",
            f"overlap   {self.overlap_in:.3f} of inputs, {self.overlap_out:.3f} of outputs",
            f"signs     {self.sign_conflict:.1%} in conflict",
            f"sum       loses {self.lost:.1%} at the higher rank",
        ]


@dataclass(frozen=True, slots=True, repr=False)
class Pair(Displayed):
    """Two adapters compared: in total and per shared module, and the number of modules that only one of them has."""

    first: str
    second: str
    total: Similarity
    modules: tuple[Similarity, ...]
    alone: tuple[int, int]

    def brief(self) -> str:
        return (
            f"{self.first} and {self.second}, {counted(len(self.modules), 'module')}, cosine {self.total.cosine:+.3f}"
        )

    def lines(self) -> list[str]:
        alone = f", {self.alone[0]} and {self.alone[1]} in one only" if any(self.alone) else ""
        modules = f"{counted(len(self.modules), 'module')} in both{alone}"
        return [f"{self.first} and {self.second}: {modules}", *self.total.lines()]


def compare(
    adapters: Sequence[WeightedAdapter], on_module: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Pair]:
    """Compare the weighted Δs of every pair of adapters; for DoRA modules, the low-rank part.

    `on_module` is called with the number of modules done and the total over all pairs. Raises FitError if shapes differ
    or a pair shares no module.
    """
    if len(adapters) < 2:
        raise UsageError("give at least two adapters to compare")
    for one in adapters:
        check_mergeable(one)
    pairs = list(combinations(adapters, 2))
    done, total = 0, sum(len(a.adapter.modules.keys() & b.adapter.modules.keys()) for a, b in pairs)
    for pair in pairs:
        first, second = aligned(pair)
        both = dict.fromkeys(name for name in first.adapter.modules if name in second.adapter.modules)
        check_fit((first, second), dict.fromkeys((*first.adapter.modules, *second.adapter.modules)))
        if not both:
            whole = ", ".join(dict.fromkeys((*first.adapter.replaced, *second.adapter.replaced)))
            raise FitError(
                f"{first.label} and {second.label}: no low-rank modules to compare, only {whole or 'tokens'}"
            )
        rows: dict[str, tuple[Similarity, _Sums]] = {}
        for batch in batches((first, second), both):
            a, b = parts_of((first, second), batch)
            for name, found in zip(batch, _measure(a, b, len(batch)), strict=True):
                rows[name] = found.as_row(name), found
            on_module(done := done + len(batch), total)
        alone = (len(first.adapter.modules) - len(both), len(second.adapter.modules) - len(both))
        in_all = _Sums.of([rows[name][1] for name in both]).as_row(None)
        yield Pair(first.label, second.label, in_all, tuple(rows[name][0] for name in both), alone)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over modules of squares, products and signs, and unweighted means of overlaps."""

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

    def as_row(self, name: str | None) -> Similarity:
        norms = math.sqrt(self.first * self.second)
        return Similarity(
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
    """Compare each module of a batch; stacked experts count as one block-diagonal matrix."""
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
    """Numbers of elements, in a sample of rows, whose signs differ, and that are nonzero in both."""
    step = max(1, one.left.shape[-2] // SAMPLED_ROWS)
    first, second = (product.left[..., ::step, :] @ product.right for product in (one, other))
    signs = first.sign() * second.sign()
    return (signs < 0).sum((-2, -1)), (signs != 0).sum((-2, -1))
