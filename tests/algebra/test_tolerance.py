"""The error of merges in 16 bits, where the dtype's own limits make it larger."""

from __future__ import annotations

import pytest
import torch

from adapterkit.algebra.tolerance import Rows, Tolerance, half_unit
from adapterkit.algebra.updates import Update


@pytest.mark.parametrize("strength", [0.25, 2.0, 1.3, 64.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_rounded_before_they_are_scaled_are_within_it(dtype: torch.dtype, strength: float) -> None:
    """In fp16 most of these products are subnormal, so that even a power of two scales their error."""
    left, right = (torch.randn(32, 4) * 3e-4).to(dtype), (torch.randn(4, 48) * 1e-3).to(dtype)
    update = Update(0, 32, left.double(), right.double(), strength)
    W, delta = torch.randn(32, 48) * 1e-5, (left.double() @ right.double()) * strength
    found = W + ((left.float() @ right.float()).to(dtype).float() * strength).to(dtype).float()
    rows = Rows(0, W.double(), W.double() + delta, [delta])
    bounds = Tolerance([update], torch.float32, {dtype}).coarse(rows, found.double())
    assert bounds is not None
    off = (found.double() - bounds[0]).abs() / bounds[1]
    assert float(off.max()) <= 1 and float(off.max()) > 0.5


def test_half_a_unit_is_that_of_the_binade_and_of_subnormals() -> None:
    values = torch.tensor([1.0, 1.99, -2.0, 2.0**-14, 2.0**-20, 0.0], dtype=torch.float64)
    assert half_unit(values, torch.float16).tolist() == [2**-11, 2**-11, 2**-10, *[2**-25] * 3]
