"""The compiled loops, compared with exact sums: the rows of each update, the results, and the marks."""

from __future__ import annotations

import pytest
import torch
from standin_gpu import OnGpu

from adapterkit.algebra.updates import Update
from adapterkit.kernels.cpu import DoubtMask, add_rounded, subtract_rounded

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # as where torch has to make an output fit
FIRST, ROWS, COLUMNS = 100, 23, 5
SPANS = [(80, 100), (100, 123), (95, 107), (110, 140), (104, 106), (123, 130), (90, 150)]


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    """Return integers so small that float32 sums are exact in any order."""
    return torch.randint(low, high, shape).float()


def added(updates: list[Update]) -> torch.Tensor:
    """Return the effect of the updates on rows `FIRST …`, row by row."""
    total = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for update in updates:
        for row in range(ROWS):
            if update.start <= FIRST + row < update.stop:
                left = update.left[FIRST + row - update.start].double()
                total[row] += update.strength * (left @ update.right.double())
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at_once", [1, 3, 4, 8, ROWS])
def test_every_update_is_added_to_its_own_rows(dtype: torch.dtype, at_once: int) -> None:
    W = integers(8, 40, ROWS, COLUMNS) * (integers(0, 2, ROWS, COLUMNS) * 2 - 1)
    W[torch.rand(ROWS, COLUMNS) < 0.2] = 0.0
    updates = [
        Update(
            start, stop, integers(-2, 3, stop - start, rank), integers(-2, 3, rank, COLUMNS), -2.0 if rank % 2 else 1
        )
        for rank, (start, stop) in enumerate(SPANS, start=1)
    ]
    W, exact = W.to(dtype), W.double() + added(updates)
    out = torch.full_like(W, torch.nan)
    sums, products = torch.full((2, at_once, COLUMNS), torch.nan)
    doubts = DoubtMask(torch.full_like(W, torch.nan))
    squares, _ = add_rounded(W, FIRST, updates, out, sums, products, 1, doubts)
    assert torch.equal(out.double(), exact.to(dtype).double())
    assert torch.equal(squares.double(), torch.stack([chunk.square().sum() for chunk in exact.split(at_once)]))
    # Nothing was rounded off, so that only zeros come back as something else: as small a value of either sign.
    marked = (W == 0).view(-1).nonzero()[:, 0]
    assert exact.abs().max() <= 256 and torch.equal(doubts.found(W, squares), marked)
    assert torch.equal(DoubtMask(OnGpu.of(doubts.marks)).found(OnGpu.of(W), squares).cpu(), marked)

    back = torch.full_like(W, torch.nan)
    subtract_rounded(out, FIRST, updates, back, *torch.full((2, at_once, COLUMNS), torch.nan))
    assert torch.equal(back.view(torch.int16) & 0x7FFF, W.view(torch.int16) & 0x7FFF)
    assert torch.equal(back, W)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1)])
def test_terms_are_summed_before_they_are_added_to_the_weight(shape: tuple[int, int]) -> None:
    """In rows or columns alone. 1 + 2⁻⁸ is a midpoint; added to 1 one by one, the small terms that bring the sum below it would be lost."""
    terms = torch.tensor([2.0**-8 + 2.0**-22, *[-(2.0**-25)] * 64])
    left, right = terms.expand(shape[0], -1).contiguous(), torch.ones(len(terms), shape[1])
    base = torch.ones(shape).bfloat16()
    out = torch.empty_like(base)
    add_rounded(base, 0, [Update(0, len(base), left, right, 1.0)], out, torch.empty(shape), torch.empty(shape), 1)
    assert torch.equal(out, base)


@pytest.mark.parametrize("finite", [True, False])
def test_non_finite_values_are_marked(finite: bool) -> None:
    W = torch.tensor([[1.0, -0.0, 2.0]] if finite else [[torch.inf, 1.0, torch.nan]]).bfloat16()
    doubts = DoubtMask(torch.zeros_like(W))
    squares = torch.tensor([3.0, 5.0 if finite else torch.nan])
    assert doubts.found(W, squares).tolist() == ([] if finite else [0, 2])
    doubts.changed(torch.tensor([[0], [0]]), torch.tensor([[0], [1]]), W[:, :2].T, torch.ones(2, 1).bfloat16())
    assert doubts.found(W, squares).tolist() == ([1] if finite else [0, 2])
