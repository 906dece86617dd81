"""Weights and low-rank updates made to lie where undoing a merge is hardest.

Half of the weights are powers of two, whose boundary on one side is half as far as on the other. Every sum W + Δ is a
midpoint of the output dtype, or a unit or so of the computing dtype beside it, so that a last bit of it decides to
which side it is rounded. `A` is a rotation, so that every product has rounding errors.
"""

from __future__ import annotations

import torch

COMPUTED_IN = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
COLUMNS = RANK = 4
UNITS = 0.75  # how far beside a midpoint
Factors = tuple[torch.Tensor, torch.Tensor]  # B (rows, rank), A (rank, columns)


def weights(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Some eleven binades of either sign; half of them powers of two, and a few zeros and subnormals."""
    rng = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-9, 2, (rows, columns), generator=rng)
    mantissa = 1 + torch.rand(rows, columns, dtype=torch.float64, generator=rng)
    mantissa[torch.rand(rows, columns, generator=rng) < 0.5] = 1.0
    sign = torch.randint(0, 2, (rows, columns), generator=rng) * 2 - 1
    values = sign * torch.ldexp(mantissa, exponent)
    odd = torch.rand(rows, columns, generator=rng)
    values[odd < 0.002] *= 0.0
    values[(odd > 0.002) & (odd < 0.004)] *= torch.finfo(dtype).tiny
    return values.to(dtype)


def midpoints(
    near: torch.Tensor, dtype: torch.dtype, seed: int, units: float = UNITS, kind: torch.dtype | None = None
) -> torch.Tensor:
    """For each of `near` the middle between two values of `dtype` thereabouts, in float64, give or take `units`.

    Half of them are a few values away, the others up to a factor of three. The units are those of `kind`.
    """
    rng = torch.Generator().manual_seed(seed)
    shape, integer, limits = near.shape, INTEGERS[dtype], torch.finfo(kind or COMPUTED_IN[dtype])
    close = torch.rand(shape, generator=rng) < 0.5
    factor = torch.exp2(3 * torch.rand(shape, dtype=torch.float64, generator=rng) - 1.5)
    bits = (near.double() * torch.where(close, 1.0, factor)).to(dtype).view(integer)
    bits += torch.where(close & (bits & 0x7FFF > 4), torch.randint(-4, 5, shape, generator=rng), 0).to(integer)
    low, high = bits.view(dtype).double(), (bits + 1).view(dtype).double()
    unit = torch.exp2(torch.frexp(low.abs().clamp(min=limits.tiny))[1] - 1.0) * limits.eps
    return (low + high) / 2 + unit * units * (2 * torch.rand(shape, dtype=torch.float64, generator=rng) - 1)


def factors(delta: torch.Tensor, seed: int, dtype: torch.dtype = torch.float32) -> Factors:
    """`B · A = delta (rows, columns)` as closely as `dtype` has it, A a random rotation of as many columns."""
    rng = torch.Generator().manual_seed(seed)
    columns = delta.shape[1]
    A = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64, generator=rng))[0].to(dtype)
    return torch.linalg.solve(A.double(), delta.double(), left=False).to(dtype), A


def split(delta: torch.Tensor, parts: int, seed: int) -> list[torch.Tensor]:
    """Several that add up to `delta`, not all of the same sign."""
    rng = torch.Generator().manual_seed(seed)
    shares = [delta * (3 * torch.rand(delta.shape, dtype=delta.dtype, generator=rng) - 1) for _ in range(parts - 1)]
    return [*shares, delta - sum(shares, torch.zeros_like(delta))]


def plain(
    rows: int, dtype: torch.dtype, seed: int, parts: int = 1, units: float = UNITS, W: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Factors]]:
    """Weights `(rows, 4)`, or `W`, and updates whose sums with them lie on midpoints of `dtype`."""
    W = weights(rows, COLUMNS, dtype, seed) if W is None else W
    delta = midpoints(W, dtype, seed + 1, units) - W.double()
    kind = COMPUTED_IN[dtype]
    return W, [factors(one, seed + 3 + i, kind) for i, one in enumerate(split(delta, parts, seed + 2))]


def dora(
    rows: int, dtype: torch.dtype, seed: int, units: float = UNITS, by_column: bool = False
) -> tuple[torch.Tensor, Factors, torch.Tensor]:
    """Weights, an update and magnitudes whose `diag(m / n)·(W + B·A)` lies on midpoints of `dtype`, in float64.

    `W (4, rows)` where it is `by_column`, as GPT-2 stores it; `B (rows, 4)` and `A` are those of the module either way.
    """
    W = weights(rows, COLUMNS, dtype, seed)
    rng = torch.Generator().manual_seed(seed + 1)
    gain = torch.exp2(2 * torch.rand(rows, 1, dtype=torch.float64, generator=rng) - 1)
    direction = midpoints((W.double() * gain).to(dtype), dtype, seed + 2, units, torch.float64) / gain
    magnitude = gain[:, 0] * direction.norm(dim=1)
    return (W.T.contiguous() if by_column else W), factors(direction - W.double(), seed + 3, torch.float64), magnitude


def sums(W: torch.Tensor, reach: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 sums whose rounding error nearly takes 16-bit weights to a boundary, and a bound on the Δ in them.

    The bound is `reach` times the distance to the boundary, or as large as Δ is.
    """
    rng = torch.Generator().manual_seed(seed)
    bits, values = W.view(torch.int16), W.double()
    steps = torch.where(torch.rand(W.shape, generator=rng) < 0.5, 1, -1).short()
    boundary = (((bits + steps).view(W.dtype).double() - values) / 2).nan_to_num(0.0)
    share = 1 - 10 ** (-4 * torch.rand(W.shape, dtype=torch.float64, generator=rng))
    error = boundary * torch.where(torch.rand(W.shape, generator=rng) < 0.1, 0.0, share)
    times = torch.exp2(torch.randint(-1, 6, W.shape, generator=rng) * 1.0) * (1 + torch.rand(W.shape, generator=rng))
    total = ((values * times).to(W.dtype).double() - error).float()
    return total, torch.maximum(boundary.abs() * reach, (total.double() - values).abs() * 1.001)
