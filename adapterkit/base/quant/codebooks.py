"""The codebooks of bitsandbytes: the values of 4-bit codes, and of the 8-bit codes of nested scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# NF4: quantiles of the normal distribution, scaled to ±1 (arXiv 2305.14314, appendix E). FP4: 1 sign, 2 exponent and
# 1 mantissa bits, in that order, divided by 12.
CODES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * size / 12 for sign in (1.0, -1.0) for size in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}  # fmt: skip


def dynamic_code() -> torch.Tensor:
    """Return the 256 values of the dynamic data type of nested scales (arXiv 1511.04561; arXiv 2110.02861)."""
    import torch

    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))
