"""Rounding once, against exact rational arithmetic, and the search for sums close to a midpoint."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from adapterkit.fused import add_rounded
from adapterkit.rounding import DROPPED_BITS, NEAR, near_midpoints, round_once

KINDS = [torch.bfloat16, torch.float16]


def neighbours(value: torch.Tensor) -> list[torch.Tensor]:
    """A 16-bit value and those next to it."""
    bits = value.view(torch.int16)
    return [(bits + step).view(value.dtype) for step in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", KINDS)
def test_round_once_takes_the_nearest_and_ties_to_even(dtype: torch.dtype) -> None:
    rng = random.Random(1)
    exact = []
    for _ in range(300):
        # Subnormal in float16 too; then the middle to the next value, and a hair to either side of it.
        low = torch.tensor(rng.choice([1, -1]) * rng.uniform(0, 2) * 2.0 ** rng.randint(-20, 8), dtype=dtype)
        middle = (low.double() + neighbours(low)[2].double()) / 2
        exact += [middle + middle.abs() * hair for hair in (0.0, 2.0**-40, -(2.0**-40), 2.0**-52, -(2.0**-52), 0.1)]
    for value, got in zip(exact, round_once(torch.stack(exact), dtype), strict=True):
        candidates = {float(c): int(c.view(torch.int16)) & 1 for c in neighbours(got) if c == c}
        best = min(candidates, key=lambda c: (abs(Fraction(c) - Fraction(float(value))), candidates[c]))
        assert float(got) == best


@pytest.mark.parametrize("dtype", KINDS)
def test_values_that_are_not_finite_stay_so(dtype: torch.dtype) -> None:
    got = round_once(torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1e300]).double(), dtype).tolist()
    assert got[0] == float("inf") and got[1] == -float("inf") and got[2] != got[2]
    assert got[3:] == [0.0, float("inf")]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("chunks", "depth"), [([64, 32], 32), ([3], 1), ([4, 2], 2)])
def test_every_sum_close_to_a_midpoint_is_found(dtype: torch.dtype, chunks: list[int], depth: int) -> None:
    torch.manual_seed(0)
    total = torch.randn(sum(chunks), 75)
    half = 1 << (DROPPED_BITS[dtype] - 1)
    bits = total.view(torch.int32)
    for row, column, step in [(0, 0, -NEAR), (1, 74, 0), (2, 37, NEAR), (len(total) - 1, 5, -1)]:
        bits[row, column] = (bits[row, column] & -2 * half) + half + step
    out = torch.empty(total.shape, dtype=dtype)
    _, least, greatest = add_rounded(total, 0, [], out, torch.empty(max(chunks), 75), depth)
    rows, columns = near_midpoints(least, greatest, dtype, depth)
    found = torch.zeros(total.shape, dtype=torch.bool)
    found[rows, columns] = True
    close = ((bits & 2 * half - 1) - half).abs() <= NEAR
    assert bool(close[0, 0] & close[1, 74] & close[2, 37] & close[-1, 5])
    assert bool((found | ~close).all())
    # And no group of rows without one.
    assert torch.equal(found.view(-1, depth, 75).any(dim=1), close.view(-1, depth, 75).any(dim=1))
