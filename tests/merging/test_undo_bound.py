"""The error bound behind undoing a merge: arithmetic at the limits of the standard model still restores every bit.

In the model, a value rounded k times has a relative error of at most `k·u / (1 − k·u)`. It is written again here, from
the order of the operations, and shares no code with adapterkit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import inf

import adversarial
import numpy as np
import pytest
import torch

from adapterkit.algebra import residual
from adapterkit.algebra.residual import marked, norms, ordered, record, spread
from adapterkit.algebra.rounding import round_once
from adapterkit.algebra.updates import Update, add_updates, gains, linear
from adapterkit.kernels.cpu import DoubtMask, _mark
from adapterkit.merging.blocks.residual_codec import correct, encode

KINDS = [torch.bfloat16, torch.float16]
WHOLE = 64  # so many steps off, values are stored whole
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def share(count: int, kind: torch.dtype = torch.float32) -> float:
    """The largest relative error of `count` roundings."""
    off = count * UNIT[kind]
    return off / (1 - off)


def update_of(size: torch.Tensor, rank: int) -> Update:
    """An update of `rank` whose rows have `‖B_i‖·‖A‖ = size (rows, 1)`."""
    left, right = torch.zeros(len(size), rank), torch.zeros(rank, 1)
    left[:, :1], right[0] = size, 1.0
    return Update(0, len(size), left, right, 1.0)


def marked_by(W: torch.Tensor, S: torch.Tensor, updates: list[Update]) -> torch.Tensor:
    """The flat positions marked when `W` and `updates` are summed to `S`."""
    doubts, error = DoubtMask(torch.empty_like(W)), S.to(W.dtype).float() - S
    _mark(
        0, torch.empty_like(S), error, W, doubts.marks, doubts.marks.view(torch.int16), W.view(torch.int16),
        [(0, len(W))] * len(updates), norms(updates), spread(updates, W.dtype),
    )  # fmt: skip
    return doubts.found(W, S)


def comes_back(W: torch.Tensor, S: torch.Tensor, N: torch.Tensor, rank: int, parts: int) -> Iterator[torch.Tensor]:
    """The rounded result of subtraction, with the largest errors both in merging to `S` and in subtracting.

    Merging sums W and all terms at once. Subtraction sums each update, then subtracts it, rounded except for the last,
    which is rounded here.
    """
    total, left = W.double().abs() + N, (S.to(W.dtype).double() - S).abs()
    merging = share(parts * (rank + 3)) * total
    subtracting = share(rank + 2) * N + (parts - 1) * UNIT[torch.float32] * (total + left)
    for merged in (-merging, merging):
        delta = S.double() - W.double() + merged
        for undone in (-subtracting, subtracting):
            yield (S.to(W.dtype).double() - delta + undone).float().to(W.dtype)


def needless(W: torch.Tensor, S: torch.Tensor, N: torch.Tensor, rank: int, parts: int) -> torch.Tensor:
    """Positions that need no mark: the largest error plus 1% stays short of the boundary."""
    error = S.to(W.dtype).double() - S.double()
    towards = torch.where((error >= 0) == (W > 0), 1, -1).short()  # in bits, which grow away from zero
    distance = ((W.view(torch.int16) + towards).view(W.dtype).double() - W.double()).abs() / 2
    shaky = share(parts * (rank + 4) + 2) * 2.0 ** (9 if W.dtype is torch.bfloat16 else 12)
    off = error.abs() + 4 * share(parts * (rank + 3)) * N
    return (off * 1.01 < distance * (1 - 1.01 * shaky)) & (
        W.abs() > 1e-30
    )  # the norms of smaller ones are not so close


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rank", "parts"), [(1, 1), (16, 1), (256, 1), (1000, 1), (4, 3)])
def test_unmarked_values_are_restored_by_subtraction(dtype: torch.dtype, rank: int, parts: int) -> None:
    rows, restored = min(20_000, 4_000_000 // rank), 0
    for seed, near in enumerate((0.0, 0.02, 0.3, 0.9)):  # Δ's own error, in distances to the boundary
        W = adversarial.weights(rows, 1, dtype, seed)
        S, N = adversarial.sums(W, near / (2 * share(parts * (rank + 3))), seed)
        at = marked_by(W, S, [update_of(N / parts, rank) for _ in range(parts)])
        others = torch.ones(rows, dtype=torch.bool)
        others[at] = False
        for back in comes_back(W, S, N, rank, parts):
            assert torch.equal(back[others], W[others]), near
        assert not bool((needless(W, S, N, rank, parts) & ~others[:, None]).any()), near
        restored += int(others.sum())
    assert restored > 0.05 * rows


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rank", [4, 256])
@pytest.mark.parametrize("subnormal", [False, True])
def test_marked_values_land_within_the_encoded_steps(dtype: torch.dtype, rank: int, subnormal: bool) -> None:
    """All weights have one size here, because the bound uses the largest update for every element."""
    rng = torch.Generator().manual_seed(0)
    rows = 6_000
    step = torch.finfo(dtype).eps
    W = (1 + torch.rand(rows, 1, generator=rng)).to(dtype)
    W[: rows // 4], W[rows // 4 : rows // 2] = 1.0, 2 - step
    if subnormal:  # some of which come out beyond zero
        step *= torch.finfo(dtype).tiny
        W = (torch.randint(-40, 41, W.shape, generator=rng) * step).to(dtype)
    for off in (0.1, 0.48, 0.49, 0.8, 1.3, 1.6, 2.4, 3.1):  # Δ's own error, in steps of W
        N = torch.full((rows, 1), off * step / (2 * share(rank + 3)))
        after = (W.double() * torch.exp2(torch.randint(0, 5, W.shape, generator=rng) * 1.0)).to(dtype)
        half = (after.view(torch.int16) + 1).view(dtype).double() - after.double()
        S = (after.double() + half / 2 * (torch.randint(0, 2, W.shape, generator=rng) * 2 - 1) * (1 - 2.0**-9)).float()
        updates = [update_of(N, rank)]
        at = marked_by(W, S, updates)
        found = marked(W, S.to(dtype), updates, at)
        for back in comes_back(W, S, N, rank, 1):
            steps = (ordered(back).int() - ordered(W).int()).abs().view(-1)[at]
            assert bool((steps <= found.reach.where(found.reach < WHOLE, inf)).all()), off
            correct(encode(found), back, "here")
            assert torch.equal(back, W)


@pytest.mark.parametrize("dtype", KINDS)
def test_the_largest_row_and_column_decide_how_far_off_any_can_be(dtype: torch.dtype) -> None:
    """So weights merged beside others land no further off by the bound."""
    W = adversarial.weights(1000, 1, dtype, 1)
    after, left = (W.double() * 1.3).to(dtype), torch.full((1000, 4), 20.0)
    alone = marked(W, after, [Update(0, 1000, left, torch.full((4, 1), 30.0), 1.0)], torch.arange(1000))
    assert (alone.reach < WHOLE).sum() > 400 < (alone.reach > 4).sum()
    beside = (
        torch.cat([W, W, W], dim=1),
        torch.cat([after] * 3, dim=1),
        torch.tensor([[1e-3, 30.0, 1e-3]]).expand(4, -1),
    )
    for rows in (left, torch.cat([left[:1], left[1:] * 1e-3])):
        among = marked(*beside[:2], [Update(0, 1000, rows, beside[2], 1.0)], torch.arange(1, 3000, 3))
        assert torch.equal(among.values, alone.values) and torch.equal(among.reach, alone.reach)


@pytest.mark.parametrize("dtype", KINDS)
def test_most_marked_values_take_two_bits(dtype: torch.dtype) -> None:
    """Those at most one step off; with realistic updates, a hundredth of the weights."""
    W = (torch.randn(500, 500) * 0.02).to(dtype)
    update = Update(0, 500, torch.randn(500, 16) * 5e-5, torch.randn(16, 500), 1.0)
    S = W.float() + update.left @ update.right
    found = marked(W, S.to(dtype), [update], marked_by(W, S, [update]))
    assert len(found) > 100 and ((found.reach <= 1).sum() > 0.7 * len(found))


def test_only_overlapping_updates_are_summed() -> None:
    """256 experts in one tensor leave no more than a single one."""
    one = Update(0, 8, torch.ones(8, 4), torch.ones(4, 5), 1.0)
    experts = [Update(8 * at, 8 * at + 8, one.left, one.right, 1.0) for at in range(256)]
    assert spread(experts, torch.float16) == spread([one], torch.float16)
    both = spread([one, one], torch.float16)
    assert spread([*experts, one], torch.float16) == both > spread([one], torch.float16)
    assert spread([one] * 600, torch.float16)[0] == torch.inf  # then everything is marked


def furthest(side: float) -> Callable[..., torch.Tensor]:
    """`residual.subtracted` with arithmetic that errs to one side as far as the model allows."""

    def subtract(
        after: torch.Tensor, first: int, updates: Sequence[Update], gain: torch.Tensor | None = None
    ) -> torch.Tensor:
        kind = updates[0].left.dtype
        left = after.double().numpy().astype(np.longdouble)
        total, off, bound = np.abs(left), np.zeros_like(left), np.zeros_like(left)
        for update in updates:
            B, A = (factor.double().numpy().astype(np.longdouble) for factor in (update.left, update.right))
            left = left - update.strength * (B @ A)
            size = abs(update.strength) * np.sqrt((B * B).sum(1))[:, None] * np.sqrt((A * A).sum(0))
            off, bound = off + share(len(A) + 2, kind) * size, bound + size
        off = off + (len(updates) - (gain is None)) * UNIT[kind] * (total + bound)  # the last one is rounded below
        left = left + side * off
        if gain is not None:
            left = left / gain.double().numpy().astype(np.longdouble)
        return torch.from_numpy(left.astype(np.float32 if kind is torch.float32 else np.float64))

    return subtract


def check_recorded(
    W: torch.Tensor, after: torch.Tensor, plain: list[Update], factor: torch.Tensor | None, patch: pytest.MonkeyPatch
) -> None:
    """Recorded with arithmetic that errs to one side, restored with arithmetic that errs to the other."""
    for side in (-1.0, 1.0):
        patch.setattr(residual, "subtracted", furthest(side))
        found = record(W, after, 0, plain, factor)
        for other in (-side, side):
            back = furthest(other)(after, 0, plain, factor).to(W.dtype)
            off = (ordered(back).long() - ordered(W).long()).abs().view(-1)
            assert bool((off[found.at.long()] <= found.reach.where(found.reach < WHOLE, inf)).all())
            off[found.at.long()] = 0
            assert not bool(off.any())
    assert len(found) < W.numel()


@pytest.mark.parametrize("dtype", [*KINDS, torch.float32])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("units", [1.5, 8.0, 40.0])
def test_a_record_of_one_sum_restores_with_any(
    dtype: torch.dtype, parts: int, units: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, factors = adversarial.plain(10_000, dtype, 5, parts, units)
    updates = [Update(0, len(W), B, A, 1.0) for B, A in factors]
    sums = W.to(adversarial.COMPUTED_IN[dtype])
    add_updates(sums, 0, updates)
    check_recorded(W, sums.to(dtype), updates, None, monkeypatch)


@pytest.mark.parametrize("dtype", [*KINDS, torch.float32])
@pytest.mark.parametrize("units", [20.0, 60.0, 200.0])
def test_a_dora_residual_restores_with_any_sum(
    dtype: torch.dtype, units: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, (B, A), magnitude = adversarial.dora(10_000, dtype, 6, units)
    update = Update(0, len(W), B, A, 1.0, magnitude)
    sums = W.double()
    add_updates(sums, 0, [update])
    plain, factor = linear((len(W), W.shape[1]), 0, [update], gains(W.double(), 0, [update]))
    check_recorded(W, round_once(sums, dtype), plain, factor, monkeypatch)
