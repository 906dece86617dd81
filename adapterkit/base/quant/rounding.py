"""Rounding of weights to quantization codes.

`nearest` has the smallest error. `stochastic` picks one of the two neighbours at random, the nearer with the higher
probability, so that an update smaller than a step survives on average, as noise. `compensated` adds each weight's error
to weights of its row that are rounded later: without calibration data to the next one, so that a row keeps its sum;
with calibration (see `calibration.py`) to all of them, so that the row's output changes least (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.files.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

BINS = 1 << 12  # so that their table fits in the L1 cache
ROUNDINGS = ("nearest", "stochastic", "compensated")


@dataclass(frozen=True, slots=True)
class Rounding:
    """A rounding mode of `ROUNDINGS`, its random seed, and if calibrated the `shares` of errors for later columns."""

    kind: str = "nearest"
    seed: int = 0
    shares: TensorInfo | None = None

    def of(self, name: str) -> Rounding:
        """Return the same rounding with a seed derived for the weight `name`."""
        return Rounding(self.kind, seed_for(self.seed, name))

    def read_shares(self) -> torch.Tensor | None:
        """Read the shares into memory, if there are any."""
        return None if self.shares is None else self.shares.read()


NEAREST = Rounding()


def choose_codes(
    scaled: torch.Tensor,
    unit: torch.Tensor,
    code: torch.Tensor,
    rounding: Rounding,
    at: int,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round each element of `scaled (rows, columns)` to the int32 index of a code.

    Args:
        unit: The scale of each element: `scaled · unit` is the weight.
        code: The codebook, sorted.
        at: The offset of `scaled` in the weight, so that random numbers don't depend on the chunking.
        shares: The shares of `rounding`, in memory.
    """
    bounds = (code[:-1] + code[1:]) / 2
    if rounding.kind == "nearest":
        return search(scaled, bounds)
    if rounding.kind == "compensated":
        from adapterkit.base.quant.compensated import compensated_codes

        return compensated_codes(scaled, unit, code, bounds, shares)
    below = (search(scaled, code, right=True) - 1).clamp_(0, len(code) - 2)
    gap = code[below + 1] - code[below]
    up = (scaled - code[below]) > gap * uniform_at(scaled.numel(), rounding.seed, at, scaled.device).view_as(scaled)
    return below + up


def search(values: torch.Tensor, edges: torch.Tensor, *, right: bool = False) -> torch.Tensor:
    """Compute `torch.bucketize(values, edges, right=right)`, several times faster.

    Values are first sorted into bins of equal width. If no bin holds more than one edge, one comparison per value is
    enough; otherwise this falls back to bucketize.
    """
    import torch

    largest = float(edges.abs().max())
    if not 1e-30 < largest < inf:  # NaN or zero: only an untrusted file has such a codebook
        return torch.bucketize(values, edges, right=right, out_int32=True)
    half = BINS / 2 - 0.5
    scale = half / largest

    def bins(x: torch.Tensor) -> torch.Tensor:  # monotonic, which is all that is needed
        return (x * scale).add_(half).clamp_(0, BINS - 1).int()

    ones = torch.ones_like(edges, dtype=torch.int32)
    counts = ones.new_zeros(BINS + 1).index_add_(0, bins(edges) + 1, ones)
    if int(counts.max()) > 1:
        return torch.bucketize(values, edges, right=right, out_int32=True)
    flat = values.reshape(-1)
    index = counts.cumsum(0, dtype=torch.int32).index_select(0, bins(flat))  # the number of edges in earlier bins
    edge = torch.cat([edges, edges.new_tensor([inf])]).index_select(0, index)
    return index.add_(flat >= edge if right else flat > edge).view(values.shape)
