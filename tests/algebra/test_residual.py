"""Undoing a rounded sum: every bit is restored, whichever arithmetic computes the update again."""

from __future__ import annotations

import adversarial
import pytest
import torch
from adversarial import ARITHMETIC, COMPUTED_IN
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.algebra import residual
from adapterkit.algebra.residual import record, restore, subtracted
from adapterkit.algebra.rounding import round_once
from adapterkit.algebra.updates import Update, add_updates, gains, linear, measure_columns
from adapterkit.merging.blocks.block import _merge_plain
from adapterkit.merging.blocks.device import Buffers
from adapterkit.merging.blocks.residual_codec import correct, encode

KINDS = [torch.bfloat16, torch.float16, torch.float32]


def check(W: torch.Tensor, updates: list[Update], monkeypatch: pytest.MonkeyPatch) -> residual.Residual:
    """Merge, record, and restore by every arithmetic; compares bits, not values.

    Residuals of 16-bit weights are recorded in two ways: from `W' − Δ`, and from the sums that W' is rounded from.

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
def test_zeros_denormals_and_non_finite_values(dtype: torch.dtype, zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_bits_of_a_nan_are_restored(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a single one, which torch would replace by its own NaN."""
    W = torch.randn(9, 31).to(dtype)
    residual.integers(W)[4, 7] = torch.tensor(torch.inf).to(dtype).view(residual.integers(W).dtype) + 1
    assert bool(W[4, 7].isnan())
    check(W, updates_of(9, 31, 3, 0.1, dtype), monkeypatch)


def test_several_updates_of_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(40, 60).bfloat16()
    [one], [other] = updates_of(25, 60, 8, 0.05, W.dtype), updates_of(30, 60, 3, 0.2, W.dtype)
    check(W, [one, Update(10, 40, other.left, other.right, -1.7)], monkeypatch)


@settings(max_examples=100)
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
def test_cpu_and_gpu_restore_each_others_residuals(dtype: torch.dtype) -> None:
    W, updates = torch.randn(300, 400).to(dtype), updates_of(300, 400, 16, 0.05, dtype)
    gpu = torch.device("cuda")
    for here, there in ((torch.device("cpu"), gpu), (gpu, torch.device("cpu"))):
        mine, theirs = ([update.to(device) for update in updates] for device in (here, there))
        sums = W.to(here, COMPUTED_IN[dtype])
        add_updates(sums, 0, mine)
        after = sums.to(dtype)
        found = record(W.to(here), after, 0, mine)
        assert torch.equal(restore(after.to(there), 0, theirs, found.to(there)).cpu(), W)


def test_residuals_are_small_and_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(512, 512).mul_(0.02).bfloat16()
    updates = updates_of(512, 512, 16, 0.01 * 0.02 / 0.3 / 4, W.dtype)  # 1% of the weights
    found = check(W, updates, monkeypatch)
    assert len(found) < 0.02 * W.numel()
    sums = W.float()
    add_updates(sums, 0, updates)
    after = sums.bfloat16()
    nothing = residual.Residual(found.at[:0], found.values[:0], found.reach[:0])
    assert not torch.equal(restore(after, 0, updates, nothing), W)


def test_restoring_float64_weights_leaves_the_input_unchanged() -> None:
    """They have the dtype of the computation, so that an in-place subtraction could overwrite them."""
    W = torch.randn(40, 60, dtype=torch.float64)
    updates = [Update(0, 40, torch.randn(40, 3, dtype=torch.float64), torch.randn(3, 60, dtype=torch.float64), 0.5)]
    after = W.clone()
    add_updates(after, 0, updates)
    copy = after.clone()
    found = record(W, after, 0, updates)
    assert torch.equal(restore(after, 0, updates, found), W) and torch.equal(after, copy)
    back = subtracted(after, 0, updates)
    correct(encode(found), back, "here")
    assert torch.equal(back, W) and torch.equal(after, copy) and torch.equal(subtracted(after, 0, []), copy)


# --- where it is hardest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_sums_on_a_midpoint_of_powers_of_two(dtype: torch.dtype, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        W, factors = adversarial.plain(12_000, dtype, seed, parts)
        check(W, [Update(0, len(W), B, A, 1.0) for B, A in factors], monkeypatch)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("share", [0, 27, 64, 129])
@pytest.mark.parametrize("strength", [1.0, 2.0**60])
def test_products_that_are_subnormal(strength: float, share: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last bit is 2⁻¹⁴⁹, whichever factor is small, times the strength."""
    W = (adversarial.weights(6_000, 4, torch.bfloat16, 1).double() * 2.0**-129 * strength).bfloat16()
    W, factors = adversarial.plain(len(W), W.dtype, 2, parts, W=W)
    small = [(B.double() @ A.double(), (A * 2.0**-share)) for B, A in factors]
    updates = [
        Update(0, len(W), torch.linalg.solve(A.double() * strength, delta, left=False).float(), A, strength)
        for delta, A in small
    ]
    check(W, updates, monkeypatch)


@pytest.mark.parametrize("dtype", KINDS)
def test_zeros_that_become_a_value(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is rounded off, and the result of another sum has either sign."""
    delta = adversarial.weights(6_000, 4, dtype, 1)
    B, A = adversarial.factors(delta, 2, COMPUTED_IN[dtype])
    for zero in (0.0, -0.0):
        check(torch.full_like(delta, zero), [Update(0, len(B), B, A, 1.0)], monkeypatch)


def test_factors_whose_squares_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """But their norms are not."""
    W, factors = adversarial.plain(12_000, torch.bfloat16, 3)
    check(W, [Update(0, len(W), B * 2.0**-80, A * 2.0**80, 1.0) for B, A in factors], monkeypatch)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("by_column", [False, True], ids=["by row", "by column"])
def test_renormalized_sums_on_a_midpoint(dtype: torch.dtype, by_column: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for units in (4.0, 30.0):
        W, (B, A), magnitude = adversarial.dora(6_000, dtype, 4, units, by_column)
        left, right = (A.T.contiguous(), B.T.contiguous()) if by_column else (B, A)
        update = Update(0, len(W), left, right, 1.0, magnitude)
        if by_column:
            update = measure_columns(update, lambda: iter([(0, W.double())]))  # noqa: B023
        sums = W.double()
        add_updates(sums, 0, [update])
        after = round_once(sums, dtype)
        plain, factor = linear((len(W), W.shape[1]), 0, [update], gains(W.double(), 0, [update]))
        found = record(W, after, 0, plain, factor)
        assert 0.05 * W.numel() < len(found)
        for name, add in ARITHMETIC.items():
            monkeypatch.setattr(residual, "product", add)
            back = subtracted(after, 0, plain, factor).to(dtype)
            correct(encode(found), back, "here")
            assert torch.equal(back.view(torch.uint8), W.view(torch.uint8)), (name, units)
