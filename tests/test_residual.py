"""Undoing a rounded sum: every bit comes back, whatever arithmetic computes the update again."""

from __future__ import annotations

from collections.abc import Callable

import adversarial
import pytest
import torch
from adversarial import COMPUTED_IN
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit import residual
from adapterkit.blocks import _merge_plain
from adapterkit.coding import correct, encode
from adapterkit.delta import Update, add_updates
from adapterkit.device import Buffers
from adapterkit.fused import _mark
from adapterkit.residual import gamma, marked, norms, ordered, record, restore, spread, subtracted

KINDS = [torch.bfloat16, torch.float16, torch.float32]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rank_one_at_a_time(order: str) -> Product:
    """Adds `B[:, k]·A[k]` term by term, rounding after each: forwards, backwards, or shuffled."""

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        count = len(right)
        terms = {"forwards": torch.arange(count), "backwards": torch.arange(count).flip(0)}
        total = left.new_zeros(len(left), right.shape[1])
        for k in terms.get(order, torch.randperm(count)).tolist():
            total += left[:, k, None] * right[k]
        return total

    return product


def in_pairs(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Adds the terms up as a tree."""
    terms = [left[:, k, None] * right[k] for k in range(len(right))]
    while len(terms) > 1:
        terms = [sum(terms[at : at + 2][1:], terms[at]) for at in range(0, len(terms), 2)]
    return terms[0]


def in_float64(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left.double() @ right.double()).to(left.dtype)


def in_halves(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    half = len(right) // 2
    return left[:, half:] @ right[half:] + left[:, :half] @ right[:half]


ARITHMETIC: dict[str, Product] = {
    "the same": residual.product, "in pairs": in_pairs, "in float64": in_float64, "in halves": in_halves,
    **{order: rank_one_at_a_time(order) for order in ("forwards", "backwards", "shuffled")},
}  # fmt: skip


def check(W: torch.Tensor, updates: list[Update], monkeypatch: pytest.MonkeyPatch) -> residual.Residual:
    """Merge, record, and restore by every arithmetic; bits, not values, are compared.

    What 16-bit weights leave is recorded twice: by way of `W' − Δ`, and by way of the sums that W' is rounded from.
    """
    after, codes = torch.empty_like(W), []
    if W.dtype is torch.float32:
        sums = W.double()
        add_updates(sums, 0, updates)
        after.copy_(sums)
    else:
        _, undone = _merge_plain(W, 0, updates, after, Buffers(), True)
        assert undone is not None
        codes.append(undone.code)
    found = record(W, after, 0, updates)
    codes.append(encode(found))
    for name, add in ARITHMETIC.items():
        with monkeypatch.context() as patch:
            patch.setattr(residual, "product", add)
            assert torch.equal(restore(after, 0, updates, found).view(torch.uint8), W.view(torch.uint8)), name
            for code in codes:
                back = subtracted(after, 0, updates).to(W.dtype)
                correct(code, back, "here")
                assert torch.equal(back.view(torch.uint8), W.view(torch.uint8)), name
    wide = [Update(u.start, u.stop, u.left.double(), u.right.double(), u.strength) for u in updates]
    for code in codes:
        back = subtracted(after, 0, wide).to(W.dtype)
        correct(code, back, "here")
        assert torch.equal(back.view(torch.uint8), W.view(torch.uint8)), "all in float64"
    return found


def updates_of(rows: int, columns: int, rank: int, size: float, dtype: torch.dtype) -> list[Update]:
    kind = COMPUTED_IN[dtype]
    left, right = torch.randn(rows, rank, dtype=kind) * size, torch.randn(rank, columns, dtype=kind)
    return [Update(0, rows, left, right, 0.3)]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.05, 1.0, 1e3])
@pytest.mark.parametrize("rank", [1, 16, 256])
def test_every_arithmetic_restores_every_bit(
    dtype: torch.dtype, size: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = (torch.randn(40, 120) * torch.logspace(-4, 1, 120)).to(dtype)
    check(W, updates_of(40, 120, rank, size, dtype), monkeypatch)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("zero", [True, False])
def test_zeros_denormals_and_what_is_not_finite(
    dtype: torch.dtype, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = torch.finfo(dtype)
    odd = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        limits.tiny,
        -limits.tiny,
        limits.smallest_normal / 3,
        1e-7,
        1.0,
    ]
    W = torch.tensor(odd * 12).to(dtype).view(-1, 10).contiguous()
    updates = updates_of(len(W), 10, 5, 1e-4, dtype)
    if zero:
        updates[0].left[::2] = 0.0
        updates[0].right[:, :4] = 0.0
    check(W, updates, monkeypatch)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_nan_keeps_its_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One alone too, which torch would put in its place as the NaN of its own."""
    W = torch.randn(9, 31).to(dtype)
    residual.integers(W)[4, 7] = torch.tensor(torch.inf).to(dtype).view(residual.integers(W).dtype) + 1
    assert bool(W[4, 7].isnan())
    check(W, updates_of(9, 31, 3, 0.1, dtype), monkeypatch)


def test_several_updates_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(40, 60).bfloat16()
    [one], [other] = updates_of(25, 60, 8, 0.05, W.dtype), updates_of(30, 60, 3, 0.2, W.dtype)
    check(W, [one, Update(10, 40, other.left, other.right, -1.7)], monkeypatch)


@settings(max_examples=200)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.integers(1, 40), st.floats(-6, 3), st.floats(-6, 3),
)  # fmt: skip
def test_any_sizes(seed: int, dtype: torch.dtype, rank: int, weight: float, update: float) -> None:
    torch.manual_seed(seed)
    W = (torch.randn(9, 31) * 10**weight).to(dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(W, updates_of(9, 31, rank, 10**update, dtype), monkeypatch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", KINDS)
def test_a_gpu_restores_what_the_cpu_recorded_and_the_other_way_round(dtype: torch.dtype) -> None:
    W, updates = torch.randn(300, 400).to(dtype), updates_of(300, 400, 16, 0.05, dtype)
    gpu = torch.device("cuda")
    for here, there in ((torch.device("cpu"), gpu), (gpu, torch.device("cpu"))):
        mine, theirs = ([update.to(device) for update in updates] for device in (here, there))
        sums = W.to(here, COMPUTED_IN[dtype])
        add_updates(sums, 0, mine)
        after = sums.to(dtype)
        found = record(W.to(here), after, 0, mine)
        assert torch.equal(restore(after.to(there), 0, theirs, found.to(there)).cpu(), W)


def test_what_is_recorded_is_little_and_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(512, 512).mul_(0.02).bfloat16()
    updates = updates_of(512, 512, 16, 0.01 * 0.02 / 0.3 / 4, W.dtype)  # 1% of the weights
    found = check(W, updates, monkeypatch)
    assert len(found) < 0.02 * W.numel()
    sums = W.float()
    add_updates(sums, 0, updates)
    after = sums.bfloat16()
    nothing = residual.Residual(found.at[:0], found.values[:0], found.reach[:0])
    assert not torch.equal(restore(after, 0, updates, nothing), W)


# --- where it is hardest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_sums_on_a_midpoint_of_powers_of_two(dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        W, factors = adversarial.plain(12_000, dtype, seed, parts)
        check(W, [Update(0, len(W), B, A, 1.0) for B, A in factors], monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "parts"), [(1, 1), (16, 1), (256, 1), (4, 3)])
def test_what_is_not_marked_comes_back_from_the_worst_sums_there_can_be(
    dtype: torch.dtype, rank: int, parts: int
) -> None:
    """Both merging and subtracting off by all that a bound on any order of summation allows, to every side."""
    unit = torch.finfo(torch.float32).eps / 2
    terms = parts * (rank + 3)
    kept = 0
    for number, size in enumerate((0.0, 0.02, 0.3, 0.9)):  # of the bound on Δ's error, in boundary distances
        W = adversarial.weights(20_000, 1, dtype, number)
        S, N = adversarial.sums(W, size / (2 * gamma(terms, torch.float32)), number)
        after = S.to(dtype)
        updates = [split_norm(N / parts, rank) for _ in range(parts)]
        marks = torch.empty_like(W)
        error = after.float() - S
        _mark(
            0, torch.empty_like(S), error.clone(), W, marks, marks.view(torch.int16), W.view(torch.int16),
            [(0, len(W))] * parts, [norms(update) for update in updates], spread(updates, dtype),
        )  # fmt: skip
        seen = marks.view(torch.int16) != 0
        off = gamma(terms, torch.float32) * (W.double().abs() + N)
        rounded = (parts - 1) * unit * (W.double().abs() + error.double().abs() + N)
        again = gamma(rank + 2, torch.float32) * N + rounded
        at = seen.view(-1).nonzero()[:, 0]
        reach = marked(W, after, updates, at).reach
        for merged in (-off, off):
            for undone in (-again, again):
                back = (after.double() - (S.double() - W.double() + merged) + undone).float().to(dtype)
                lost = (back != W) & ~seen
                assert not bool(lost.any()), (size, W[lost][:3], error[lost][:3])
                steps = (ordered(back).int() - ordered(W).int()).abs().view(-1)[at]
                assert bool(((steps <= reach) | (reach >= 64)).all())
        kept += int((~seen).sum())
    assert kept > 4_000


def split_norm(size: torch.Tensor, rank: int) -> Update:
    """An update of `rank`, of whose rows `‖B_i‖·‖A‖` is `size (rows, 1)`."""
    left, right = torch.zeros(len(size), rank), torch.zeros(rank, 1)
    left[:, :1], right[0] = size, 1.0
    return Update(0, len(size), left, right, 1.0)
