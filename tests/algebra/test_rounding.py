"""Rounding once, compared with exact rational arithmetic, and the search for sums on a midpoint."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from standin_gpu import OnGpu

from adapterkit.algebra.rounding import DROPPED_BITS, on_midpoints, round_once
from adapterkit.kernels.cpu import add_rounded

KINDS = [torch.bfloat16, torch.float16]


def neighbours(value: torch.Tensor) -> list[torch.Tensor]:
    """Return a 16-bit value and those next to it."""
    bits = value.view(torch.int16)
    return [(bits + step).view(value.dtype) for step in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", KINDS)
def test_round_once_rounds_to_nearest_even(dtype: torch.dtype) -> None:
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
def test_non_finite_values_are_unchanged(dtype: torch.dtype) -> None:
    got = round_once(torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1e300]).double(), dtype).tolist()
    assert got[0] == float("inf") and got[1] == -float("inf") and got[2] != got[2]
    assert got[3:] == [0.0, float("inf")]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "step", "depth"), [(96, 64, 32), (3, 3, 1), (6, 4, 2)])
def test_every_sum_on_a_midpoint_is_found(dtype: torch.dtype, rows: int, step: int, depth: int) -> None:
    torch.manual_seed(0)
    total = torch.randn(rows, 75)
    half = 1 << (DROPPED_BITS[dtype] - 1)
    bits = total.view(torch.int32)
    for row, column, off in [(0, 0, 0), (1, 74, 0), (2, 37, 1), (rows - 1, 5, 0), (rows - 1, 6, -1)]:
        bits[row, column] = (bits[row, column] & -2 * half) + half + off
    total[0, 9], total[1, 10] = 0.0, -0.0
    out = torch.empty(total.shape, dtype=dtype)
    _, least = add_rounded(total, 0, [], out, torch.empty(step, 75), torch.empty(step, 75), depth)
    assert torch.equal(out, total.to(dtype))
    found = torch.zeros(total.shape, dtype=torch.bool)
    found[on_midpoints(least, depth)] = True
    there = torch.zeros_like(found)
    there[tuple(at.cpu() for at in on_midpoints(OnGpu.of(least), depth))] = True
    assert torch.equal(there, found)
    on = (bits & 2 * half - 1) == half
    assert bool(on[0, 0] & on[1, 74] & on[-1, 5]) and not bool(on[2, 37] | on[-1, 6])
    # Every one of them, and no group of rows without one.
    assert torch.equal(found, on.view(-1, depth, 75).any(dim=1).repeat_interleave(depth, dim=0))
