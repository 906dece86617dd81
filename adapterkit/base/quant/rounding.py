"""Which code to take for a weight between two of them.

`nearest` has the least error. `stochastic` takes one of the two neighbours by chance, the nearer the likelier: an
update smaller than a step then survives on average, as noise. `compensated` makes up for each weight's error in those
of its row that are rounded later: with nothing known of the inputs in the next one, so that a row keeps its sum; with a
calibration (see `calibration.py`) in all of them, so that what the row computes changes least (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from adapterkit.algebra.counter_rng import seed_for, uniform_at
from adapterkit.files.safetensors import TensorInfo

if TYPE_CHECKING:
    import torch

BINS = 1 << 12  # a table of them stays in the L1 cache
ROUNDINGS = ("nearest", "stochastic", "compensated")


@dataclass(frozen=True, slots=True)
class Rounding:
    """One of `ROUNDINGS`; the seed of its chance; where calibrated, what shares of an error later columns take over."""

    kind: str = "nearest"
    seed: int = 0
    shares: TensorInfo | None = None

    def of(self, name: str) -> Rounding:
        """The same, by a seed of weight `name`'s own."""
        return Rounding(self.kind, seed_for(self.seed, name))

    def read_shares(self) -> torch.Tensor | None:
        """The shares in memory, if there are any."""
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
    """The int32 index of a code for each of `scaled (rows, columns)`.

    `unit`, of the same shape, is what 1 is worth there; `code` is sorted; `at` says how many elements of the weight
    came before, so that chance does not depend on how it is divided; `shares` are those of `rounding`, read.
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
    """`torch.bucketize(values, edges, right=right)`, several times faster where edges are a few thousandths apart.

    Values are sorted into equal bins first. A bin holds one edge at most, and only there is anything compared.
    """
    import torch

    most = float(edges.abs().max())
    if not 1e-30 < most < inf:  # NaN, or nothing to scale by: codes as only a stranger's file has them
        return torch.bucketize(values, edges, right=right, out_int32=True)
    half = BINS / 2 - 0.5
    scale = half / most

    def bins(x: torch.Tensor) -> torch.Tensor:  # never falls where x rises, which is all that this rests on
        return (x * scale).add_(half).clamp_(0, BINS - 1).int()

    one = torch.ones_like(edges, dtype=torch.int32)
    held = one.new_zeros(BINS + 1).index_add_(0, bins(edges) + 1, one)
    if int(held.max()) > 1:
        return torch.bucketize(values, edges, right=right, out_int32=True)
    flat = values.reshape(-1)
    index = held.cumsum(0, dtype=torch.int32).index_select(0, bins(flat))  # edges in the bins before
    edge = torch.cat([edges, edges.new_tensor([inf])]).index_select(0, index)
    return index.add_(flat >= edge if right else flat > edge).view(values.shape)
