"""Updates of rows of a matrix, compared with whole matrices in float64: in blocks, renormalized, and stacked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from adapterkit.adapter.weights import LoraWeights
from adapterkit.algebra.updates import (
    Retention,
    Update,
    add_updates,
    exact_sum,
    gains,
    linear,
    measure_columns,
    retention,
    update_for,
)
from adapterkit.errors import FitError

ROWS, COLUMNS, RANK = 20, 7, 3
SPANS = [(0, 20), (0, 6), (5, 13), (14, 20), (9, 10)]
BLOCKS = [[(0, 20)], [(0, 7), (7, 14), (14, 20)], [(row, row + 1) for row in range(20)]]


def updates(kinds: str, weights: list[float], by_column: bool = False) -> list[Update]:
    """Return an update per letter, `d` for DoRA, the first for the whole matrix."""
    found = []
    for kind, weight, (start, stop) in zip(kinds, weights, SPANS, strict=False):
        left, right = torch.randn(stop - start, RANK).double(), torch.randn(RANK, COLUMNS).double()
        magnitude = torch.rand(COLUMNS if by_column else stop - start).double() * 4 + 1
        scale = weight * 0.7 if kind == "p" else 0.7
        found.append(Update(start, stop, left, right, scale, magnitude if kind == "d" else None, None, weight))
    return found


def added(W: torch.Tensor, update: Update, by_column: bool = False) -> torch.Tensor:
    """Return the effect of one update on the whole matrix: `s·B·A`, or `w·(m/n·(W + s·B·A) − W)`."""
    total = torch.zeros_like(W)
    rows = slice(update.start, update.stop)
    total[rows] = update.strength * update.left @ update.right
    if update.magnitude is None:
        return total
    direction = (W + total)[rows]
    norm = direction.pow(2).sum(0 if by_column else 1, keepdim=True).sqrt()
    total[rows] = update.weight * (update.magnitude.view(norm.shape) / norm * direction - W[rows])
    return total


def chunks(W: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    yield from ((first, W[first : first + 6]) for first in range(0, ROWS, 6))


@pytest.mark.parametrize("blocks", BLOCKS, ids=len)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize(
    ("kinds", "weights"),
    [("p", [1.0]), ("d", [1.0]), ("d", [0.4]), ("pppp", [1, -1, 0.5, 2.0]), ("dd", [1.0, 1.0]), ("pdpdd", [1, 0.3, -2, 1, 1.0]),
     ("dp", [1.0, 1.0]), ("pd", [1.0, 1.0]), ("ppd", [1.0, 1.0, 0.5])],
)  # fmt: skip
def test_blocks_add_up_to_the_sum_of_updates(
    blocks: list[tuple[int, int]], by_column: bool, kinds: str, weights: list[float]
) -> None:
    W = torch.randn(ROWS, COLUMNS).double()
    given = updates(kinds, weights, by_column)
    expected = W + sum(added(W, update, by_column) for update in given)
    if by_column:
        given = [measure_columns(one, lambda: chunks(W)) if one.renormalizes else one for one in given]
    for first, last in blocks:
        rows = W[first:last].clone()
        add_updates(rows, first, given)
        torch.testing.assert_close(rows, expected[first:last], rtol=1e-12, atol=1e-12)
        # The same again as a factor on W and plain updates, from gains that were measured before.
        found = gains(W[first:last], first, given)
        plain, factor = linear((last - first, COLUMNS), first, given, found)
        assert not any(one.renormalizes for one in plain) and (factor is None) == ("d" not in kinds)
        rows = W[first:last] * (1.0 if factor is None else factor)
        add_updates(rows, first, plain)
        torch.testing.assert_close(rows, expected[first:last], rtol=1e-12, atol=1e-12)
        assert len(found) == kinds.count("d")


@pytest.mark.parametrize("span", SPANS)
def test_column_gains_use_the_rows_of_the_update(span: tuple[int, int]) -> None:
    W, (start, stop) = torch.randn(ROWS, COLUMNS).double(), span
    left, right = torch.randn(stop - start, RANK).double(), torch.randn(RANK, COLUMNS).double()
    update = measure_columns(Update(start, stop, left, right, 0.7, torch.ones(COLUMNS).double()), lambda: chunks(W))
    assert update.gain is not None and update.gain.shape == (1, COLUMNS)
    norm = (W[start:stop] + 0.7 * left @ right).norm(dim=0)
    torch.testing.assert_close(update.gain[0], 1 / norm, rtol=1e-12, atol=0)


def test_chosen_elements_are_summed_in_float64() -> None:
    W = torch.randn(ROWS, COLUMNS).bfloat16()
    given = [
        Update(one.start, one.stop, one.left.float(), one.right.float(), one.strength)
        for one in updates("ppppp", [1, -1, 0.5, 2.0, 3.0])
    ]
    doubled = [Update(u.start, u.stop, u.left.double(), u.right.double(), u.strength) for u in given]
    exact = W.double() + sum(added(W.double(), update) for update in doubled)
    for first in (0, 4, 12):
        i, j = torch.arange(ROWS - first).view(-1, 4), torch.randint(0, COLUMNS, ((ROWS - first) // 4, 1))
        found = exact_sum(W[first:], first, given, i, j)
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, exact[first:][i, j], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("of", [None, (2, 5)])
@pytest.mark.parametrize("expert", [None, 0, 2])
@pytest.mark.parametrize("dora", [False, True])
def test_the_update_of_a_module(transposed: bool, of: tuple[int, int] | None, expert: int | None, dora: bool) -> None:
    """Δ of one expert, or of some stored rows, in either orientation; DoRA scales by the weight after renormalizing."""
    experts = 1 if expert is None else 3
    A, B = torch.randn(experts * RANK, COLUMNS).half(), torch.randn(6, RANK * experts).half()
    magnitude = torch.rand(6).half() if dora else None
    weights = LoraWeights(A, B, 2.0, magnitude=magnitude, experts=experts)
    update = update_for(weights, 0.25, (4, 9), of, expert, transposed, torch.float64)
    picked = slice(*(of or (0, 6 if not transposed else COLUMNS)))
    rank_of = range(RANK * (expert or 0), RANK * (expert or 0) + RANK)
    delta = np.zeros((6, COLUMNS))
    for out in range(6):
        for k, within in enumerate(rank_of):
            delta[out] += float(B[out, k * experts + (expert or 0)]) * A[within].double().numpy()
    found = (update.left @ update.right).numpy()
    assert np.allclose(found, (delta.T if transposed else delta)[picked], rtol=1e-12, atol=1e-12)
    assert (update.start, update.stop, update.strength, update.weight) == (
        4,
        9,
        2.0 if dora else 0.5,
        0.25 if dora else 1.0,
    )
    assert update.left.dtype is torch.float64 and update.left.is_contiguous() and update.right.is_contiguous()
    assert update.magnitude is None if magnitude is None else torch.equal(update.magnitude, magnitude[picked].double())


@pytest.mark.parametrize("broken", ["A", "B", "magnitude", "scaling"])
def test_non_finite_factors_are_refused(broken: str) -> None:
    given = {"A": torch.randn(RANK, COLUMNS), "B": torch.randn(6, RANK), "magnitude": torch.rand(6)}
    for bad in (torch.nan, torch.inf):
        parts = {name: tensor.clone() for name, tensor in given.items()}
        if broken != "scaling":
            parts[broken].view(-1)[-1] = bad
        scaling = 1e39 if broken == "scaling" else 1.0
        weights = LoraWeights(parts["A"], parts["B"], scaling, magnitude=parts["magnitude"])
        with pytest.raises(FitError, match=f"^here: (the )?{'its scaling' if broken == 'scaling' else broken} "):
            update_for(weights, 1.0, (0, 6), None, None, False, where="here")
    update_for(LoraWeights(given["A"], given["B"], 1e39), 1.0, (0, 6), None, None, False, torch.float64)


def test_retention_adds_up() -> None:
    before, exact = torch.randn(2, 40, 5)
    rounded = exact.bfloat16()
    whole = retention(before, exact, rounded)
    delta, applied = (one.double().numpy() - before.double().numpy() for one in (exact, rounded))
    assert whole.retained == pytest.approx((applied * delta).sum() / (delta**2).sum(), rel=1e-12)
    assert whole.error == pytest.approx(np.linalg.norm(applied - delta) / np.linalg.norm(delta), rel=1e-9)
    parts = [retention(before[at], exact[at], rounded[at]) for at in (slice(0, 9), slice(9, 40))]
    total = sum(parts, Retention())
    assert (total.retained, total.error) == pytest.approx((whole.retained, whole.error), rel=1e-12)
    assert np.isnan([Retention().retained, Retention().error]).all()
