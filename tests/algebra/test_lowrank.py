"""Norms and ranks of Δ from its factors, against the dense singular values in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.adapter.weights import LoraWeights
from adapterkit.algebra.lowrank import Spectrum, singular_values_of

Weights = LoraWeights[torch.Tensor]


def dense(weights: Weights) -> torch.Tensor:
    """Return the singular values of Δ formed as a matrix."""
    B, A = weights.B.flatten(1).double(), weights.A.flatten(1).double()
    return torch.linalg.svdvals(weights.scaling * B @ A)


def random(out: int, inner: int, rank: int, scaling: float = 1.5) -> Weights:
    return LoraWeights(torch.randn(rank, inner), torch.randn(out, rank), scaling)


def singular_values(weights: Weights) -> torch.Tensor:
    [values] = singular_values_of([weights])
    return values


@pytest.mark.parametrize(("out", "inner", "rank"), [(40, 24, 4), (24, 40, 1), (5, 300, 5), (3, 20, 8), (1, 1, 1)])
@pytest.mark.parametrize("scaling", [1.5, -0.25])
def test_values_equal_those_of_the_dense_matrix(out: int, inner: int, rank: int, scaling: float) -> None:
    weights = random(out, inner, rank, scaling)
    values = singular_values(weights)
    count = min(out, inner, rank)
    assert len(values) == count
    torch.testing.assert_close(values, dense(weights)[:count], rtol=1e-5, atol=1e-6)


def test_small_values_that_a_float32_gram_matrix_would_lose() -> None:
    U, V = (torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64)).Q for _ in range(2))
    sigma = torch.tensor([1.0, 1e-3, 1e-5], dtype=torch.float64)
    values = singular_values(LoraWeights((sigma[:, None] * V.T).float(), U.float(), 1.0))
    torch.testing.assert_close(values, sigma, rtol=1e-2, atol=0)


def test_a_worked_spectrum() -> None:
    # Δ = 2 · diag(2, 1) in a 3 × 3 matrix: σ = 4, 2
    weights = LoraWeights(torch.eye(2, 3), torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 2.0)
    spectrum = Spectrum(tuple(singular_values(weights).tolist()))
    assert spectrum.sigma == pytest.approx((4, 2))
    assert spectrum.frobenius == pytest.approx(math.sqrt(20)) and spectrum.spectral == pytest.approx(4)
    assert spectrum.stable_rank == pytest.approx(20 / 16)
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert spectrum.effective_rank == pytest.approx(math.exp(entropy))
    assert [spectrum.energy_rank(share) for share in (0.5, 0.8, 0.81, 1.0)] == [1, 1, 2, 2]


def test_an_untrained_B_has_rank_0() -> None:
    spectrum = Spectrum(tuple(singular_values(LoraWeights(torch.randn(4, 9), torch.zeros(7, 4), 2.0)).tolist()))
    assert (spectrum.frobenius, spectrum.stable_rank, spectrum.effective_rank) == (0, 0, 0)
    assert spectrum.energy_rank(0.99) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_factors_do_not_affect_others(value: float) -> None:
    good, bad = random(9, 7, 3), random(9, 7, 3)
    bad.B[2, 1] = value
    valid, spoilt = singular_values_of([good, bad])
    assert spoilt.isnan().all() and Spectrum(tuple(spoilt.tolist())).energy_rank(0.99) is None
    torch.testing.assert_close(valid, dense(good)[:3], rtol=1e-5, atol=1e-6)


def test_mixed_shapes_are_returned_in_order() -> None:
    many = [random(9, 7, 3), random(4, 20, 2), random(9, 7, 3, -3.0), random(4, 20, 2, 0.1)]
    for weights, values in zip(many, singular_values_of(many), strict=True):
        torch.testing.assert_close(values, dense(weights)[: weights.rank], rtol=1e-5, atol=1e-6)


def test_a_convolution_is_flattened() -> None:
    weights = LoraWeights(torch.randn(3, 5, 2, 2), torch.randn(8, 3, 1, 1), 0.5, kind="conv")
    torch.testing.assert_close(singular_values(weights), dense(weights)[:3], rtol=1e-5, atol=1e-6)


def test_values_of_stacked_experts() -> None:
    A, B = torch.randn(3 * 2, 7), torch.randn(5, 2 * 3)  # 3 experts of rank 2; the expert runs fastest in B
    each = [LoraWeights(A[2 * e : 2 * e + 2], B[:, e::3], 1.5) for e in range(3)]
    expected = torch.cat([dense(one)[:2] for one in each]).sort(descending=True).values
    values = singular_values(LoraWeights(A, B, 1.5, kind="experts", experts=3))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.floats(0.01, 100), st.integers(0, 2**31))
def test_values_under_orthogonal_transforms_and_scaling(
    out: int, inner: int, rank: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    A, B = torch.randn(rank, inner, dtype=torch.float64), torch.randn(out, rank, dtype=torch.float64)
    Q, R = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q for n in (out, inner))
    values = singular_values(LoraWeights(A, B, 1.0))
    turned = singular_values(LoraWeights(A @ R, Q @ B, scale))
    torch.testing.assert_close(turned, scale * values, rtol=1e-9, atol=1e-9 * scale)
